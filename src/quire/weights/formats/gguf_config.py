"""The hyper-parameters of a GGUF header as the `config.json` that transformers would have, and GGUF's names.

A key of the architecture that is not read here is refused by name, unless its value changes nothing.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quire.errors import ModelFileError, UnsupportedModelError
from quire.models.parameters import NameMap
from quire.models.registry import load_spec
from quire.models.spec import DecoderSpec
from quire.ops.types import WeightDtype
from quire.weights.formats.gguf_file import GgufArray
from quire.weights.formats.gguf_parts import GgufParts
from quire.weights.formats.safetensors import DTYPES_BY_FORMAT
from quire.weights.json_file import printable
from quire.weights.source import ModelConfig

NAMES = NameMap(
    prefix="",
    other_prefixes=(),
    embedding="token_embd",
    positions="position_embd",
    final_norm="output_norm",
    head="output",
    layer="blk.{i}.",
    qkv=("attn_q", "attn_k", "attn_v"),
    o="attn_output",
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    attention_norm="attn_norm",
    attention_post_norm="post_attention_norm",
    mlp_norm="ffn_norm",
    mlp_post_norm="post_ffw_norm",
    gate_up=("ffn_gate", "ffn_up"),
    up="ffn_up",
    down="ffn_down",
    unused=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
)

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
_GRANITE = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_SOFT_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}

_ROPE_KEYS = frozenset(
    f"rope.{name}"
    for name in (
        "freq_base dimension_count scaling.type scaling.factor scaling.original_context_length scaling.attn_factor "
        "scaling.finetuned scaling.yarn_beta_fast scaling.yarn_beta_slow"
    ).split()
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
    "use_parallel_residual": (False,),
}
"""Keys that change the result of some model, with the values that change nothing. Of the layouts the second says that
the rows of q and k are in turns, which is so of the architectures for which it is written."""


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one of llama.cpp's architectures is one of transformers'."""

    name: str
    more_keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What llama.cpp's code says and no header."""
    keys: Mapping[str, str] = field(default_factory=lambda: _KEYS)
    in_turns: bool = False
    """The rows of q and k are rotated as neighbours: the halves of each head are in turns."""
    biases: tuple[tuple[str, str], ...] = (("attention_bias", "attn_q"),)
    """Settings that are true where the first layer's module has a bias."""
    many_layers: int = 0
    """With so many layers (the 27B models), scores are scaled by the embedding's share of a head, not by its length."""


_LLAMA_BIASES = (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up"))

ARCHITECTURES: Mapping[str, _Architecture] = {
    "gemma2": _Architecture("Gemma2ForCausalLM", _SOFT_CAPS | _WINDOW, biases=(), many_layers=46),
    "gemma3": _Architecture(
        "Gemma3ForCausalLM",
        {"final_logit_softcapping": "final_logit_softcapping"} | _WINDOW,
        {"sliding_window_pattern": 6},
        biases=(),
        many_layers=62,
    ),
    "gpt2": _Architecture("GPT2LMHeadModel", keys=_GPT2_KEYS, biases=()),
    "granite": _Architecture("GraniteForCausalLM", _GRANITE, in_turns=True, biases=_LLAMA_BIASES),
    "llama": _Architecture("LlamaForCausalLM", in_turns=True, biases=_LLAMA_BIASES),
    "mistral": _Architecture("MistralForCausalLM", _WINDOW, {"sliding_window": None}, in_turns=True, biases=()),
    "olmo2": _Architecture("Olmo2ForCausalLM"),
    "phi3": _Architecture("Phi3ForCausalLM", _WINDOW, biases=()),
    "qwen2": _Architecture("Qwen2ForCausalLM", biases=()),
    "qwen3": _Architecture("Qwen3ForCausalLM"),
    "smollm3": _Architecture(
        "SmolLM3ForCausalLM", {}, {"no_rope_layer_interval": 4}, in_turns=True, biases=_LLAMA_BIASES
    ),
    "starcoder2": _Architecture(
        "Starcoder2ForCausalLM",
        {"attention.layer_norm_epsilon": "norm_epsilon"},
        {"sliding_window": None},
        biases=(("use_bias", "attn_q"),),
    ),
}


FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 21: "Q2_K_S", 25: "IQ4_NL",
    30: "IQ4_XS", 32: "BF16", 38: "MXFP4_MOE",
}  # fmt: skip
"""What `general.file_type` says of most tensors, by llama.cpp's numbers (`LLAMA_FTYPE`)."""


def read_gguf_config(path: Path) -> ModelConfig:
    """Read the header of a model.

    Raises:
        ModelFileError: a file is missing or damaged, or a value is missing, of a wrong type or out of range.
        UnsupportedModelError: an architecture or a setting that Quire does not have, named.
    """
    with GgufParts(path) as parts:
        name = str(parts.values.get("general.architecture"))
        if parts.values.get("general.type", "model") != "model":
            raise UnsupportedModelError(f"{parts.name}: general.type is {parts.values['general.type']!r}, not a model")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            text = f"{parts.name}: the architecture {printable(name)!r} is not supported; these are: {known}"
            raise UnsupportedModelError(text)
        architecture = _windowed(ARCHITECTURES[name], name, parts)
        config = _Header(parts, name).config(architecture)
        try:
            spec, names = load_spec(config)
        except (ModelFileError, UnsupportedModelError) as error:
            text = f"{parts.name}: its header, read as a config.json: {error.message.removeprefix('config.json: ')}"
            raise type(error)(text) from None
        dtype, reason = _dtype(parts)
        heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads} if architecture.in_turns else {}
        found = ModelConfig(_held(spec), _names(names, parts), dtype, reason, rotated_heads=heads, gguf=parts)
        stated = parts.values.get("general.file_type")
        return replace(found, family=name, stored_as=FILE_TYPES.get(stated, "") if type(stated) is int else "")


def _windowed(architecture: _Architecture, name: str, parts: GgufParts) -> _Architecture:
    """Mistral's models are of the architecture llama; those with a window say so."""
    has_window = name == "llama" and parts.values.get("llama.attention.sliding_window")
    return ARCHITECTURES["mistral"] if has_window else architecture


def _held(spec: DecoderSpec) -> DecoderSpec:
    """GGUF's norms hold what is added to the weights of others (Gemma's 1)."""
    return replace(spec, norm=replace(spec.norm, weight_offset=0.0))


def _names(theirs: NameMap, parts: GgufParts) -> NameMap:
    """GGUF's names, with those fused that are fused there."""
    names = replace(NAMES, gate_up=("ffn_up",) if len(theirs.gate_up) == 1 else NAMES.gate_up)
    return replace(names, qkv=("attn_qkv",)) if "blk.0.attn_qkv.weight" in parts.tensors else names


def _dtype(parts: GgufParts) -> tuple[WeightDtype, str]:
    formats = {tensor.format for tensor in parts.tensors.values() if len(tensor.shape) > 1}
    blocks = sorted(formats - DTYPES_BY_FORMAT.keys())
    if blocks:
        shown = ", ".join(blocks)
        return "bfloat16", f"of what is not blocks, and of {shown} where they are unpacked, which float32 holds exactly"
    embedding = parts.tensors.get("token_embd.weight")
    return DTYPES_BY_FORMAT["F32" if embedding is None else embedding.format], "the file's own"


class _Header:
    """The keys of one architecture, each read at most once and none forgotten."""

    def __init__(self, parts: GgufParts, name: str) -> None:
        self._parts = parts
        self._prefix = f"{name}."
        self._values = {
            key.removeprefix(self._prefix): _single(parts.name, key, value)
            for key, value in parts.values.items()
            if key.startswith(self._prefix)
        }

    def config(self, architecture: _Architecture) -> dict[str, Any]:
        keys = {**architecture.keys, **architecture.more_keys}
        self._refuse_unread(set(keys) | self._gemma3_keys(architecture))
        has_head = "output.weight" in self._parts.tensors
        embedding = self._parts.tensors.get("token_embd.weight")
        found = {"architectures": [architecture.name], "tie_word_embeddings": not has_head, **architecture.fixed}
        found |= {"vocab_size": 0 if embedding is None else embedding.shape[0]}
        found |= {theirs: self._values[ours] for ours, theirs in keys.items() if ours in self._values}
        for setting, module in architecture.biases:
            found[setting] = f"blk.0.{module}.bias" in self._parts.tensors
        if found.get("sliding_window") == 0:
            found["sliding_window"] = None
        if architecture.keys is _GPT2_KEYS:
            return found
        self._head_dim(found)
        if architecture.many_layers:
            self._scale(found, architecture.many_layers)
        return found | self._rope(found, architecture)

    def _gemma3_keys(self, architecture: _Architecture) -> set[str]:
        ours = {"rope.freq_base_swa"}
        return {"attention.value_length", *(ours if "sliding_window_pattern" in architecture.fixed else ())}

    def _refuse_unread(self, keys: set[str]) -> None:
        for key, value in self._values.items():
            if key in keys or key in _ROPE_KEYS or value in _NEUTRAL.get(key, ()):
                continue
            raise self._unsupported(key, "Quire has no such feature in this architecture")

    def _head_dim(self, found: dict[str, Any]) -> None:
        hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
        if "head_dim" not in found and isinstance(hidden, int) and isinstance(heads, int) and heads:
            found["head_dim"] = hidden // heads
        if self._values.get("attention.value_length", found.get("head_dim")) != found.get("head_dim"):
            raise self._unsupported("attention.value_length", "it must be attention.key_length")

    def _scale(self, found: dict[str, Any], many_layers: int) -> None:
        hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
        is_large = found.get("num_hidden_layers") == many_layers and isinstance(hidden, int) and isinstance(heads, int)
        found["query_pre_attn_scalar"] = hidden // heads if is_large and heads else found.get("head_dim")

    def _rope(self, found: dict[str, Any], architecture: _Architecture) -> dict[str, Any]:
        rope = self._scaling(found) | {"rope_theta": self._values.get("rope.freq_base", 10_000.0)}
        rotated, head_dim = self._values.get("rope.dimension_count"), found.get("head_dim")
        if isinstance(rotated, int) and isinstance(head_dim, int) and head_dim and rotated != head_dim:
            # The least number of which the product, rounded down, is as many again.
            share = rotated / head_dim
            rope["partial_rotary_factor"] = share if int(head_dim * share) == rotated else math.nextafter(share, 2)
        if "sliding_window_pattern" not in architecture.fixed:
            return {"rope_parameters": rope}
        sliding = {"rope_type": "default", "rope_theta": self._values.get("rope.freq_base_swa", 10_000.0)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": sliding}}

    def _scaling(self, found: dict[str, Any]) -> dict[str, Any]:
        factors = [self._factors(f"rope_{name}.weight") for name in ("factors_short", "factors_long", "freqs")]
        kind = self._values.get("rope.scaling.type", "none")
        positions = self._values.get("rope.scaling.original_context_length", found.get("max_position_embeddings"))
        short, long, single = factors
        if single is not None:
            if kind not in ("none", "linear") or self._values.get("rope.scaling.factor", 1.0) not in (0.0, 1.0):
                raise self._unsupported("rope.scaling.type", "the file has rope_freqs.weight too")
            short, long, kind = single, single, "longrope"
        attention = self._values.get("rope.scaling.attn_factor", 1.0)
        if short is not None and long is not None and kind in ("none", "longrope"):
            lengths = {"original_max_position_embeddings": positions, "factor": 1.0}
            found |= {"original_max_position_embeddings": positions} if single is None else {}
            factors_of = {"short_factor": short, "long_factor": long}
            return {"rope_type": "longrope", "attention_factor": attention, **lengths, **factors_of}
        if attention != 1.0:
            raise self._unsupported("rope.scaling.attn_factor", "only the factors of LongRoPE come with one")
        factor = self._values.get("rope.scaling.factor", 0.0)
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return {"rope_type": "default"}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            betas = {f"beta_{name}": self._values.get(f"rope.scaling.yarn_beta_{name}") for name in ("fast", "slow")}
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": positions, **betas}
        raise self._unsupported("rope.scaling.type", "known are none, linear, yarn and longrope with its factors")

    def _factors(self, tensor: str) -> list[float] | None:
        info = self._parts.tensors.get(tensor)
        if info is None:
            return None
        if len(info.shape) != 1 or info.format != "F32":
            raise ModelFileError(f"{self._parts.name}: {tensor} must be a vector of F32")
        file, size = self._parts.home[tensor], info.end - info.start
        data = os.pread(file.descriptor, size, info.start)
        if len(data) != size:
            raise ModelFileError(f"{file.name}: truncated while {tensor} was read")
        return [float(value) for value in np.frombuffer(data, "<f4")]

    def _unsupported(self, key: str, why: str) -> UnsupportedModelError:
        value = printable(repr(self._values.get(key)))
        return UnsupportedModelError(f"{self._parts.name}: {self._prefix}{key} = {value} is not supported: {why}")


def _single(name: str, key: str, value: Any) -> Any:
    """A value that is a list by layer, where all are alike."""
    if not isinstance(value, GgufArray):
        return value
    distinct = set(value.items[:4096])
    if len(distinct) != 1 or value.count > 4096:
        text = f"{name}: {printable(key)} differs from layer to layer, which Quire does not have"
        raise UnsupportedModelError(text)
    return distinct.pop()
