"""Where a checkpoint keeps the parameters of a decoder, and the shapes that they must have.

A *part* is a parameter as the decoder wants it (`3.qkv.weight`); it is made of one or more *tensors* of the
checkpoint (`model.layers.3.self_attn.q_proj.weight`, ...), joined along their outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from quire.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class NameMap:
    """Names of modules in a checkpoint, without `.weight` and `.bias`. The defaults are Llama's.

    Names of a layer follow `layer`, in which `{i}` is its number. A tuple lists what is joined: three names
    or one fused for q, k, v; two or one for gate and up.
    """

    prefix: str = "model."
    other_prefixes: tuple[str, ...] = ("",)
    """Tried in turn when no tensor `prefix + embedding` is there."""
    embedding: str = "embed_tokens"
    positions: str = "wpe"
    final_norm: str = "norm"
    head: str = "lm_head"
    """Without the prefix."""
    layer: str = "layers.{i}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = "post_feedforward_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    transposed: bool = False
    """Linear weights are `[in, out]` (GPT-2's Conv1D)."""
    unused: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns of tensors that checkpoints carry and that change nothing."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One part: the tensors that it is joined from, with the shape of each in the checkpoint."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool = False


class PartSource(Protocol):
    """Hands out parts, linear weights as `[out, in]`."""

    def part(self, name: str) -> Any:
        """The array of a part: float32, float16 or bfloat16, contiguous; or, of a matrix, a `StoredWeight`. Good until
        the next matrix is taken."""


def decoder_parameters(spec: DecoderSpec, names: NameMap) -> dict[str, Parameter]:
    """Every part of the decoder. What is not in here has no place in the model."""
    hidden = spec.hidden_size
    parts = {"embedding.weight": _single(f"{names.prefix}{names.embedding}.weight", spec.vocab_size, hidden)}
    if spec.learned_positions:
        name = f"{names.prefix}{names.positions}.weight"
        parts["positions.weight"] = _single(name, spec.max_position_embeddings, hidden)
    for i in range(spec.num_layers):
        parts.update(_layer_parameters(spec, names, i))
    parts.update(_norm("final_norm", names.prefix + names.final_norm, spec))
    if not spec.tied_head:
        parts["head.weight"] = _single(f"{names.head}.weight", spec.vocab_size, hidden)
    return parts


def _layer_parameters(spec: DecoderSpec, names: NameMap, i: int) -> Iterator[tuple[str, Parameter]]:
    at = names.prefix + names.layer.format(i=i)
    hidden, head_dim = spec.hidden_size, spec.head_dim
    q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    inner = (spec.intermediate_size,) * (2 if spec.gated_mlp else 1)

    def linear(part: str, modules: tuple[str, ...], outputs: tuple[int, ...], inputs: int, bias: bool) -> None:
        if len(modules) == 1:
            outputs = (sum(outputs),)
        pairs = [(at + module, size) for module, size in zip(modules, outputs, strict=True)]
        shapes = [(inputs, size) if names.transposed else (size, inputs) for _, size in pairs]
        found[f"{i}.{part}.weight"] = Parameter(
            tuple((f"{name}.weight", shape) for (name, _), shape in zip(pairs, shapes, strict=True)),
            names.transposed,
        )
        if bias:
            found[f"{i}.{part}.bias"] = Parameter(tuple((f"{name}.bias", (size,)) for name, size in pairs))

    found: dict[str, Parameter] = {}
    linear("qkv", names.qkv, (q_size, kv_size, kv_size), hidden, spec.qkv_bias)
    linear("o", (names.o,), (hidden,), q_size, spec.o_bias)
    linear("up", names.up, inner, hidden, spec.mlp_bias)
    linear("down", (names.down,), (hidden,), spec.intermediate_size, spec.mlp_bias)
    if spec.norm_places != "post":
        found.update(_norm(f"{i}.attention_norm", at + names.attention_norm, spec))
        found.update(_norm(f"{i}.mlp_norm", at + names.mlp_norm, spec))
    if spec.norm_places != "pre":
        found.update(_norm(f"{i}.attention_post_norm", at + names.attention_post_norm, spec))
        found.update(_norm(f"{i}.mlp_post_norm", at + names.mlp_post_norm, spec))
    if spec.qk_norm != "none":
        q_width, k_width = (head_dim, head_dim) if spec.qk_norm == "head" else (q_size, kv_size)
        found[f"{i}.q_norm.weight"] = _single(f"{at}{names.q_norm}.weight", q_width)
        found[f"{i}.k_norm.weight"] = _single(f"{at}{names.k_norm}.weight", k_width)
    yield from found.items()


def _norm(part: str, module: str, spec: DecoderSpec) -> dict[str, Parameter]:
    parts = {f"{part}.weight": _single(f"{module}.weight", spec.hidden_size)}
    if spec.norm.kind == "layer":
        parts[f"{part}.bias"] = _single(f"{module}.bias", spec.hidden_size)
    return parts


def _single(tensor: str, *shape: int) -> Parameter:
    return Parameter(((tensor, shape),))
