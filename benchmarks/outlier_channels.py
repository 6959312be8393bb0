"""What a few channels of large inputs cost each format: a random Llama in which they are made, without changing it.

    python benchmarks/outlier_channels.py [--factors 1 50 1000] [--threads 1]

Four channels after both norms of each layer are multiplied by a factor, and the columns of the weights that read them
are divided by it: in float32 it is one model. Mean KL divergence of the next token from float32 over 400 positions, and
how often the most probable token is the same (docs/design/formats.md).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.quant.select import select_scheme
from quire.runner.teacher_forcing import TeacherForcing
from quire.weights.load import load_model

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, POSITIONS = 4, 256, 512, 8, 4, 1024, 400
CHANNELS = (3, 70, 141, 250)
FORMATS: tuple[tuple[str, int | None], ...] = (
    ("int8", None), ("int8", 128), ("int8", 64), ("int8", 32), ("int8_w8a8", None), ("int4", 64)
)  # fmt: skip


def write(directory: Path, factor: float) -> None:
    """The checkpoint with its large channels."""
    rng = np.random.default_rng(0)

    def matrix(out: int, inputs: int, gain: float = 1.0) -> Any:
        return (gain * rng.standard_normal((out, inputs)) / np.sqrt(inputs)).astype(np.float32)

    size = HIDDEN // HEADS
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, 16),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN, 3),
    }
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        outs = {"q": HIDDEN, "k": KV_HEADS * size, "v": KV_HEADS * size}
        read = {f"{at}self_attn.{name}_proj.weight": matrix(out, HIDDEN) for name, out in outs.items()}
        read |= {f"{at}mlp.{name}_proj.weight": matrix(INNER, HIDDEN) for name in ("gate", "up")}
        for weight in read.values():
            weight[:, CHANNELS] /= np.float32(factor)
        norms = {
            f"{at}{name}.weight": np.ones(HIDDEN, np.float32)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        for norm in norms.values():
            norm[list(CHANNELS)] *= np.float32(factor)
        tensors |= read | norms
        tensors[f"{at}self_attn.o_proj.weight"] = matrix(HIDDEN, HIDDEN)
        tensors[f"{at}mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "hidden_act": "silu",
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def log_softmax(logits: Any) -> Any:
    """In float64, over the last dimension."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def main() -> None:
    """One line a format and factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 50.0, 1000.0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    ops = CpuOps(options.threads, instruction_sets()[-1])
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, POSITIONS).tolist()
    for factor in options.factors:
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory), factor)

            def logits(scheme: Any, path: Path = Path(directory)) -> Any:
                model = load_model(path, ops, "float32", scheme=scheme)
                return log_softmax(np.concatenate(list(TeacherForcing(model, ops, 16).logits(tokens))))

            exact = logits(None)
            for name, size in FORMATS:
                found = logits(select_scheme(name, size))
                kl = (np.exp(exact) * (exact - found)).sum(axis=-1).mean()
                same = (exact.argmax(-1) == found.argmax(-1)).mean()
                print(
                    f"x {factor:<6g} {name:10} groups {size or 'rows':<5} KL {kl:.2e}  same token {same:.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
