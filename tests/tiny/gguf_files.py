"""GGUF files of the tiny checkpoints, as llama.cpp's converter makes them: with the `gguf` package's writer and names.

What the converter changes is stated here a second time, from the models' side: the rows of q and k of the architectures
that llama.cpp rotates as neighbours are put in turns, Gemma's norms get their 1, GPT-2's matrices are turned over.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file

IN_TURNS = ("llama", "granite", "smollm3")
KEYS: Mapping[str, str] = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_layer": "block_count",
    "n_embd": "embedding_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
"""Hugging Face's key: the header's."""

Kind = Callable[[str, tuple[int, ...]], str]
"""The type of a tensor by its name in GGUF, and its shape."""


def plain(kind: str = "F32") -> Kind:
    """Matrices of one type; vectors are F32, as in all files."""
    return lambda _, shape: kind if len(shape) > 1 else "F32"


def write_gguf(directory: Path, path: Path, architecture: str, kind: Kind | None = None, **header: Any) -> Path:
    """Write the checkpoint of `directory` as one GGUF file.

    Args:
        kind: None is float32.
        header: keys of the architecture with `__` for a point, in place of what the config says; None leaves one out.
    """
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_header(config, architecture) | {k.replace("__", "."): v for k, v in header.items()}).items():
        add(writer, key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}", value)
    for name, values in tensors_of(directory, config, architecture).items():
        add_tensor(writer, name, values, (kind or plain())(name, values.shape))
    return close(writer)


def close(writer: gguf.GGUFWriter) -> Path:
    """Write everything, and return the path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    path = writer.path
    writer.close()
    assert path is not None
    return Path(path)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A value of the type that the converter gives it."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, values: Any, kind: str) -> None:
    """A tensor as one of ggml's types. What the package cannot quantise to are random blocks with small factors."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, values.astype(np.float32 if kind == "F32" else np.float16))
    else:
        writer.add_tensor(name, quantize(values.astype(np.float32), number), raw_dtype=number)


def tensors_of(directory: Path, config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """GGUF's name: the values in the order that they have there."""
    number = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(number, config.get("num_hidden_layers", config.get("n_layer")))
    found: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for theirs, values in load_file(file).items():
            name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            assert name is not None, theirs
            found[name] = _values(name, values.astype(np.float32), config, architecture)
    return found | _factors(config)


def _values(name: str, values: Any, config: Mapping[str, Any], architecture: str) -> Any:
    module = name.split(".")[-2]
    if architecture in IN_TURNS and module in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if module == "attn_q" else "num_key_value_heads"]
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if architecture == "gpt2" and module in ("attn_qkv", "attn_output", "ffn_up", "ffn_down") and values.ndim == 2:
        return np.ascontiguousarray(values.T)
    return values


def _factors(config: Mapping[str, Any]) -> dict[str, Any]:
    """The divisors of rotary frequencies that files hold in place of the settings that they come from."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")
        }
    if rope.get("rope_type") == "llama3":
        import transformers

        theirs = transformers.LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"})
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, device=None)
        size = config["head_dim"]
        unscaled = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
        return {"rope_freqs.weight": (unscaled / scaled.double().numpy()).astype(np.float32)}
    return {}


def _header(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    values = {ours: config[theirs] for theirs, ours in KEYS.items() if config.get(theirs) is not None}
    if architecture == "gpt2":
        return values | {"feed_forward_length": 4 * config["n_embd"]}
    rope = config["rope_parameters"]
    if architecture == "gemma3":
        values |= {"rope.freq_base_swa": rope["sliding_attention"]["rope_theta"]}
        rope = rope["full_attention"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = int(size * rope.get("partial_rotary_factor", 1.0))
    values |= {"rope.freq_base": rope["rope_theta"], "rope.dimension_count": rotated}
    values |= {"attention.key_length": size, "attention.value_length": size}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    if rope["rope_type"] == "longrope":
        original = config["original_max_position_embeddings"]
        share = np.log(config["max_position_embeddings"] / original) / np.log(original)
        values |= {"rope.scaling.original_context_length": original}
        values |= {"rope.scaling.attn_factor": float(np.sqrt(1 + share))}
    if not config.get("use_sliding_window", True):
        values.pop("attention.sliding_window", None)
    return values


def bfloat16(values: Any) -> Any:
    """Rounded to bfloat16 and back."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)
