"""Loading takes no more memory than what is packed and the largest tensor twice, whatever is done to the weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import PATIENCE_S

LAYERS, HIDDEN, INNER, VOCABULARY = 8, 512, 2048, 8192
SLACK = 12 * 2**20  # pages of the interpreter, scratch memory of the threads

CHILD = """
import sys
from pathlib import Path
from quire.ops.select import instruction_sets
from quire.quant.select import select_scheme
from quire.weights.load import load_model
import tqdm

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

if sys.argv[4] == "cuda":  # whose device is the host here, so that what it holds is counted too
    from quire.ops.cuda.provider import CudaOps
    ops = CudaOps("cpu")
    ops.pack_linear(__import__("numpy").ones((2, 2), "float32"), None, "float32")
else:
    from quire.ops.cpu import CpuOps
    ops = CpuOps(2, instruction_sets()[-1])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = load_model(Path(sys.argv[1]), ops, sys.argv[2], scheme=select_scheme(sys.argv[3] or None, None))
print(model.weight_bytes, status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return (rng.standard_normal(shape, dtype=np.float32) * 0.03).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": matrix(HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name in "qkvo":
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            tensors[f"{at}mlp.{name}_proj.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = matrix(HIDDEN)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "quantization", "item", "provider"),
    [
        ("auto", "", 2, "cpu"),
        ("float16", "", 2, "cpu"),
        ("float32", "", 4, "cpu"),
        ("auto", "int8", 2, "cpu"),
        ("auto", "int4", 2, "cpu"),
        ("auto", "", 2, "cuda"),
        ("float32", "", 4, "cuda"),
    ],
)
def test_peak_memory(checkpoint: Path, dtype: str, quantization: str, item: int, provider: str) -> None:
    command = [sys.executable, "-c", CHILD, str(checkpoint), dtype, quantization, provider]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    weights, peak, settled = map(int, done.stdout.split())
    largest = VOCABULARY * HIDDEN * item
    assert weights * 0.9 < settled
    assert peak <= weights + 2 * largest + SLACK
    read_whole = weights + 2 * (VOCABULARY * HIDDEN + LAYERS * HIDDEN * (4 * HIDDEN + 3 * INNER))
    assert read_whole > weights + 2 * largest + SLACK  # so a loader that reads everything first would fail
