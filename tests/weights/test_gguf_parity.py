"""Every architecture: a tiny checkpoint written as GGUF has the logits of transformers on the checkpoint itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quire.errors import ModelFileError, UnsupportedModelError
from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import Ops
from quire.weights.load import load_model, read_model_config
from tests.models.paged import PagedModel
from tests.models.test_parity import assert_close, tokens, transformers_logits
from tests.tiny.checkpoints import make_tiny
from tests.tiny.gguf_files import plain, write_gguf

DEFAULT = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama-3.1": ("llama-3.1", "llama", {}),
    "llama-bias": ("llama-bias", "llama", {}),
    "mistral": ("mistral", "llama", {}),
    "qwen2": ("qwen2", "qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", "qwen3", {}),
    "phi3": ("phi3", "phi3", {}),
    "gemma2": ("gemma2", "gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3", "gemma3", {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6, "num_hidden_layers": 7}),
    "granite": ("granite", "granite", {}),
    "smollm3": ("smollm3", "smollm3", {"no_rope_layer_interval": 4, "use_sliding_window": False}),
    "olmo2": ("olmo2", "olmo2", {}),
    "gpt2": ("gpt2", "gpt2", {"scale_attn_by_inverse_layer_idx": False}),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": None}),
}
"""Family of `FAMILIES`, architecture of GGUF, and the settings that no header has, as llama.cpp fixes them."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint, and the same as a GGUF file."""
    root = tmp_path_factory.mktemp("gguf")
    made = {}
    for name, (family, architecture, settings) in CASES.items():
        directory = make_tiny(family, root / name, **settings)
        made[name] = directory, write_gguf(directory, root / f"{name}.gguf", architecture)
    return made


def logits(path: Path, ops: Ops, prompt: list[int], chunks: list[int]) -> Any:
    model = PagedModel(load_model(path, ops, "float32", 256), ops, num_blocks=32, block_size=16)
    return model.all_logits(prompt, chunks)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_on_the_checkpoint(name: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    directory, file = pairs[name]
    prompt = tokens(100)
    theirs = transformers_logits(directory, [prompt])[0]
    ours = logits(file, CpuOps(2, instruction_sets()[-1]), prompt, [60, 1, 39])
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("llama-3.1", "llama-bias")])
def test_the_bits_are_those_of_the_checkpoint(name: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    """Where no factor went through float32 on its way into the header."""
    ops = CpuOps(1, instruction_sets()[-1])
    prompt = tokens(40)
    directory, file = pairs[name]
    ours, theirs = (logits(path, ops, prompt, [40]) for path in (file, directory))
    if name in ("gemma2", "gemma3", "granite"):  # norms around 1 were rounded there, multipliers here
        assert_close(ours, theirs)
    else:
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_same_file_alike(family: str, tmp_path: Path) -> None:
    """A second judge, of files without what it does not read (scaled rotary positions, windows)."""
    directory = make_tiny(family, tmp_path / "checkpoint", **DEFAULT, use_sliding_window=False)
    file = write_gguf(directory, tmp_path / "x.gguf", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    prompt = tokens(60)
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt]), use_cache=False).logits[0].numpy()
    assert_close(logits(file, CpuOps(2, instruction_sets()[-1]), prompt, [60]), theirs)


def test_the_reference_operations_take_it_too(pairs: dict[str, tuple[Path, Path]]) -> None:
    directory, file = pairs["llama"]
    prompt = tokens(30)
    assert_close(logits(file, ReferenceOps(np), prompt, [30]), transformers_logits(directory, [prompt])[0])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_a_quantised_file_is_the_checkpoint_of_its_values(
    kind: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Bit for bit: the same values as float32 tensors, written by the package's own dequantiser."""
    import gguf
    from gguf.quants import dequantize

    from tests.tiny.gguf_files import add, add_tensor, close

    directory, _ = pairs["llama"]
    file = write_gguf(directory, tmp_path / "quantised.gguf", "llama", plain(kind))
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    for key, value in reader.fields.items():
        if key.startswith("llama."):
            add(writer, key, value.contents())
    for tensor in reader.tensors:
        add_tensor(writer, tensor.name, dequantize(tensor.data, tensor.tensor_type), "F32")
    unpacked = close(writer)
    ops, prompt = CpuOps(2, instruction_sets()[-1]), tokens(40)
    assert np.array_equal(logits(file, ops, prompt, [40]), logits(unpacked, ops, prompt, [40]))


def test_settings_that_a_header_holds_matter(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A value that is read and not used would pass the tests above."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("llama", {"rope__freq_base": 500.0}),
        ("llama-bias", {"rope__scaling__factor": 4.0}),
        ("mistral", {"attention__sliding_window": 11}),
        ("qwen2", {"rope__scaling__factor": 2.0}),
        ("phi3", {"attention__sliding_window": 0}),
        ("phi3", {"rope__scaling__attn_factor": 1.0}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"attention__sliding_window": 11}),
        ("gemma3", {"rope__freq_base_swa": 100.0}),
        ("gemma3", {"rope__scaling__type": "none"}),
        ("granite", {"logit_scale": 1.0}),
        ("granite", {"residual_scale": 1.0}),
        ("starcoder2", {"attention__layer_norm_epsilon": 0.1}),
    ]
    ops, prompt = CpuOps(2, instruction_sets()[-1]), tokens(60)
    for name, header in changes:
        directory, file = pairs[name]
        other = write_gguf(directory, tmp_path / "other.gguf", CASES[name][1], **header)
        right, wrong = (logits(path, ops, prompt, [60]) for path in (file, other))
        assert np.abs(right - wrong).max() > 1e-3 * np.abs(right).max(), (name, header)


@pytest.mark.parametrize(
    ("name", "header", "error", "match"),
    [
        ("llama", {"expert_count": 8}, UnsupportedModelError, r"x\.gguf: llama\.expert_count = 8 is not supported"),
        ("llama", {"block_count": 0}, ModelFileError, "num_hidden_layers must be a whole number from 1"),
        ("llama", {"block_count": 4}, ModelFileError, r"lacks blk\.3\."),
        ("llama", {"embedding_length": 96}, ModelFileError, r"has the shape .*; the config asks for"),
        ("llama", {"rope__scaling__type": "su"}, UnsupportedModelError, r"rope\.scaling\.type = 'su'"),
        ("llama-3.1", {"rope__scaling__type": "yarn"}, UnsupportedModelError, r"rope_freqs\.weight too"),
        ("llama", {"rope__dimension_count": 8}, UnsupportedModelError, "partial_rotary_factor"),
        ("llama", {"attention__value_length": 8}, UnsupportedModelError, r"attention\.value_length = 8"),
        ("llama", {"attention__head_count_kv": [2, 1, 2]}, UnsupportedModelError, "differs from layer to layer"),
        ("olmo2", {"attention__sliding_window": 8}, UnsupportedModelError, r"olmo2\.attention\.sliding_window = 8"),
        ("qwen3", {"attention__clamp_kqv": 8.0}, UnsupportedModelError, r"attention\.clamp_kqv = 8\.0"),
        ("llama", {"general__type": "adapter"}, UnsupportedModelError, "general.type is 'adapter'"),
        ("llama", {"attention__head_count": "nine"}, ModelFileError, "num_attention_heads must be a whole number"),
        ("gemma2", {"attention__head_count": 0}, ModelFileError, "num_attention_heads must be"),
    ],
)
def test_what_the_header_says_and_quire_lacks_is_refused_by_name(
    name: str,
    header: dict[str, Any],
    error: type[Exception],
    match: str,
    pairs: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    file = write_gguf(pairs[name][0], tmp_path / "x.gguf", CASES[name][1], **header)
    with pytest.raises(error, match=match):
        load_model(file, ReferenceOps(np), "float32")


def test_an_architecture_that_is_not_held_is_named(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    data = pairs["llama"][1].read_bytes().replace(b"llama", b"mamba")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf: the architecture 'mamba' is not supported; these are: "):
        read_model_config(tmp_path / "x.gguf")


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_the_share_of_a_head(architecture: str, layers: int, tmp_path: Path) -> None:
    """No header says `query_pre_attn_scalar`: 144 and 168 in these two, the head's length in all others."""
    directory = make_tiny(architecture, tmp_path / "tiny", num_hidden_layers=2)
    config = json.loads((directory / "config.json").read_text())
    for count, scalar in ((layers, config["hidden_size"] // config["num_attention_heads"]), (2, config["head_dim"])):
        file = write_gguf(directory, tmp_path / "x.gguf", architecture, block_count=count)
        assert read_model_config(file).spec.layers[0].attention_scale == scalar**-0.5


def test_the_type_that_weights_are_unpacked_to_is_stated(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    for kind, dtype, reason in (
        ("F32", "float32", "the file's own"),
        ("F16", "float16", "the file's own"),
        ("BF16", "bfloat16", "the file's own"),
        ("Q8_0", "bfloat16", "of what is not blocks, and of Q8_0 where they are unpacked, which float32 holds"),
    ):
        config = read_model_config(write_gguf(pairs["llama"][0], tmp_path / "x.gguf", "llama", plain(kind)))
        assert config.dtype == dtype and config.dtype_reason.startswith(reason)
