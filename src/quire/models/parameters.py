"""The parameters of a decoder, and where a checkpoint keeps them.

A *parameter* is what the decoder computes with as one: `3.qkv` is one matrix with its bias. Its weight is made of one
or more *tensors* of the checkpoint (`model.layers.3.self_attn.q_proj.weight`, ...), concatenated along their outputs.
"""

import math
from dataclasses import dataclass
from typing import Literal

from quire.models.spec import DecoderSpec

ParameterKind = Literal["linear", "gated_linear", "embedding", "positions", "rms_norm", "layer_norm"]
"""How a parameter is packed: `Ops.pack_linear`, `pack_gated`, `pack_embedding` (`positions`: never quantised), or kept
as float32 vectors."""


@dataclass(frozen=True, slots=True)
class NameMap:
    """Names of modules in a checkpoint, without `.weight` and `.bias`. The defaults are Llama's.

    Names of a layer follow `layer`, in which `{i}` is its number. A tuple lists what is concatenated: three names or
    one fused for q, k, v; two or one for gate and up.
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
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Of a gated MLP."""
    up: str = "mlp.up_proj"
    """Of an MLP without a gate."""
    down: str = "mlp.down_proj"
    transposed: bool = False
    """Linear weights are `[in, out]` (GPT-2's Conv1D)."""
    unused: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns of tensors that checkpoints carry and that change nothing."""


@dataclass(frozen=True, slots=True)
class Concatenated:
    """Tensors of a checkpoint that become one array, with the shape that each must have there."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool = False
    """Each is `[in, out]` in the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[out, in]` of a matrix, `[size]` of a vector."""
        shapes = [shape[::-1] if self.transposed else shape for _, shape in self.tensors]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True, slots=True)
class Parameter:
    """A matrix or a norm, with its bias if it has one."""

    kind: ParameterKind
    weight: Concatenated
    bias: Concatenated | None = None

    @property
    def arrays(self) -> tuple[Concatenated, ...]:
        """The weight, and the bias where there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return sum(math.prod(array.shape) for array in self.arrays)


def decoder_parameters(spec: DecoderSpec, names: NameMap) -> dict[str, Parameter]:
    """Every parameter of the decoder by its name there. A tensor that is not in here has no place in the model."""
    hidden = spec.hidden_size
    found = {"embedding": _table("embedding", names.prefix + names.embedding, spec.vocab_size, hidden)}
    if spec.learned_positions:
        module = names.prefix + names.positions
        found["positions"] = _table("positions", module, spec.max_position_embeddings, hidden)
    if not spec.tied_head:
        found["head"] = _table("embedding", names.head, spec.vocab_size, hidden)
    for i in range(spec.num_layers):
        at = names.prefix + names.layer.format(i=i)
        layer = _layer_linears(spec, names, at) | _layer_norms(spec, names, at)
        found.update({f"{i}.{name}": parameter for name, parameter in layer.items()})
    found["final_norm"] = _norm(spec, names.prefix + names.final_norm)
    return found


def _layer_linears(spec: DecoderSpec, names: NameMap, at: str) -> dict[str, Parameter]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def linear(
        modules: tuple[str, ...], outputs: tuple[int, ...], inputs: int, bias: bool, kind: ParameterKind = "linear"
    ) -> Parameter:
        if len(modules) == 1:
            outputs = (sum(outputs),)
        named = [(at + module, size) for module, size in zip(modules, outputs, strict=True)]
        shapes = [(inputs, size) if names.transposed else (size, inputs) for size in outputs]
        weights = tuple((f"{module}.weight", shape) for (module, _), shape in zip(named, shapes, strict=True))
        biases = tuple((f"{module}.bias", (size,)) for module, size in named)
        return Parameter(kind, Concatenated(weights, names.transposed), Concatenated(biases) if bias else None)

    found = {
        "qkv": linear(names.qkv, (q_size, kv_size, kv_size), hidden, spec.qkv_bias),
        "o": linear((names.o,), (hidden,), q_size, spec.o_bias),
    }
    if spec.gated_mlp:
        found["gate_up"] = linear(names.gate_up, (inner, inner), hidden, spec.mlp_bias, "gated_linear")
    else:
        found["up"] = linear((names.up,), (inner,), hidden, spec.mlp_bias)
    return found | {"down": linear((names.down,), (hidden,), inner, spec.mlp_bias)}


def _layer_norms(spec: DecoderSpec, names: NameMap, at: str) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    if spec.norm_places != "post":
        found["attention_norm"] = _norm(spec, at + names.attention_norm)
        found["mlp_norm"] = _norm(spec, at + names.mlp_norm)
    if spec.norm_places != "pre":
        found["attention_post_norm"] = _norm(spec, at + names.attention_post_norm)
        found["mlp_post_norm"] = _norm(spec, at + names.mlp_post_norm)
    if spec.qk_norm != "none":
        q_heads, kv_heads = (1, 1) if spec.qk_norm == "head" else (spec.num_heads, spec.num_kv_heads)
        found["q_norm"] = Parameter("rms_norm", _single(f"{at}{names.q_norm}.weight", q_heads * spec.head_dim))
        found["k_norm"] = Parameter("rms_norm", _single(f"{at}{names.k_norm}.weight", kv_heads * spec.head_dim))
    return found


def _norm(spec: DecoderSpec, module: str) -> Parameter:
    weight = _single(f"{module}.weight", spec.hidden_size)
    if spec.norm.kind == "rms":
        return Parameter("rms_norm", weight)
    return Parameter("layer_norm", weight, _single(f"{module}.bias", spec.hidden_size))


def _table(kind: ParameterKind, module: str, rows: int, width: int) -> Parameter:
    return Parameter(kind, _single(f"{module}.weight", rows, width))


def _single(tensor: str, *shape: int) -> Concatenated:
    return Concatenated(((tensor, shape),))
