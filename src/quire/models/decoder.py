"""The decoder-only transformer, built from parts over `Ops`.

::

    token ids -> embed [+ positions] ---------------------------------------- residual
                                      \\                                     /         \\
       for each layer:                 norm -> attention [-> norm] ------- +           |
                                       norm -> MLP       [-> norm] --------------------+
    residual -> norm -> logits

`norm_places` says which of the norms before and after a part are there. The addition to the residual and the
norm before the next part are one operation, so what leaves a layer is the input of the next one.

Parts compute with the operations that they are handed: those of a provider, or those that write down what is computed
(`Ops.compile`), so this file is the one definition of what a model does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.errors import ModelFileError
from quire.models.rope import rope_tables
from quire.models.spec import DecoderSpec, LayerSpec, NormSpec, RopeSpec
from quire.models.weights_map import NameMap, Parameter, PartSource, decoder_parameters
from quire.ops.types import (
    Array,
    AttentionBatch,
    AttentionSpec,
    CacheShape,
    Device,
    Opaque,
    Ops,
    Provider,
    QuantSpec,
    RopeTables,
    WeightDtype,
)
from quire.quant.types import Scheme, quantized_bytes

Join = Callable[[Ops, Array, Array], Array]
"""`join(ops, x, residual)`: adds `x` to the residual in place and returns the input of the next part."""


class RmsNorm:
    """Root mean square norm; `add` is the form that first adds to the residual."""

    def __init__(self, spec: NormSpec, weight: Array) -> None:
        self.weight = weight
        self.eps = spec.eps

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, ops: Ops, x: Array, residual: Array) -> Array:
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm:
    """Norm with mean, variance and bias."""

    def __init__(self, spec: NormSpec, weight: Array, bias: Array) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = spec.eps

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, ops: Ops, x: Array, residual: Array) -> Array:
        residual += x
        return ops.layer_norm(residual, self.weight, self.bias, self.eps)


Norm = RmsNorm | LayerNorm


def add(_: Ops, x: Array, residual: Array) -> Array:
    """The join of a part whose input is the residual itself."""
    residual += x
    return residual


def norm_then(post_norm: Norm, join: Join) -> Join:
    """A join that norms the output of a part before it reaches the residual."""
    return lambda ops, x, residual: join(ops, post_norm(ops, x), residual)


class Parts:
    """Takes parts from their source and packs them, one at a time."""

    def __init__(
        self,
        ops: Provider,
        source: PartSource,
        spec: DecoderSpec,
        names: NameMap,
        storage: WeightDtype,
        scheme: Scheme | None,
    ) -> None:
        self.ops = ops
        self.storage = storage
        self._scheme = scheme
        self._source = source
        self._norm = spec.norm
        self._parameters = decoder_parameters(spec, names)

    def linear(self, module: str) -> Opaque:
        """A packed linear, with its bias if the decoder has one there."""
        return self._layer(self.ops.pack_linear, module)

    def gated_linear(self, module: str) -> Opaque:
        """Gate and up, one matrix, packed for `gated_linear`."""
        return self._layer(self.ops.pack_gated, module)

    def embedding(self, module: str) -> Opaque:
        """A packed table of tokens, or the head."""
        return self._packed(self.ops.pack_embedding, module, self._scheme.tables if self._scheme else None)

    def positions(self) -> Opaque:
        """The packed table of learned positions; never rounded."""
        return self._packed(self.ops.pack_embedding, "positions", None)

    def _layer(self, pack: Callable[[Any, Array | None, WeightDtype], Opaque], module: str) -> Opaque:
        bias = self._source.part(f"{module}.bias") if f"{module}.bias" in self._parameters else None
        rounding = self._scheme.layers if self._scheme else None
        return self._packed(lambda weight, storage: pack(weight, bias, storage), module, rounding)

    def _packed(self, pack: Callable[[Any, WeightDtype], Opaque], module: str, rounding: QuantSpec | None) -> Opaque:
        weight = self._source.part(f"{module}.weight")
        try:
            return pack(weight if rounding is None else self.ops.quantize(weight, rounding), self.storage)
        except ValueError as error:
            tensors = ", ".join(name for name, _ in self._parameters[f"{module}.weight"].tensors)
            raise ModelFileError(f"{tensors} cannot be packed: {error}") from error

    def norm_weight(self, part: str) -> Array:
        """The weight of an RMS norm as it is applied: a `1 + weight` is added up here, once."""
        weight = self._source.part(part).astype(np.float32)
        return self.ops.array(weight + np.float32(self._norm.weight_offset), "float32")

    def norm(self, module: str) -> Norm:
        """A norm of hidden states."""
        if self._norm.kind == "rms":
            return RmsNorm(self._norm, self.norm_weight(f"{module}.weight"))
        weight, bias = (self._source.part(f"{module}.{part}").astype(np.float32) for part in ("weight", "bias"))
        return LayerNorm(self._norm, self.ops.array(weight, "float32"), self.ops.array(bias, "float32"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parts: matrices as stored, vectors in float32."""
        return sum(self._part_bytes(name, part) for name, part in self._parameters.items())

    def _part_bytes(self, name: str, part: Parameter) -> int:
        shapes = [shape[::-1] if part.transposed else shape for _, shape in part.tensors]
        if len(shapes[0]) == 1:
            return 4 * sum(size for (size,) in shapes)
        rows, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        if self._scheme is None or name == "positions.weight":
            return rows * inputs * (4 if self.storage == "float32" else 2)
        is_table = name in ("embedding.weight", "head.weight")
        return quantized_bytes(self._scheme.tables if is_table else self._scheme.layers, rows, inputs)


class Attention:
    """Grouped-query attention with its projections; q, k and v come out of one linear."""

    def __init__(self, parts: Parts, spec: DecoderSpec, i: int, rope: RopeTables | None) -> None:
        layer = spec.layers[i]
        self.layer = i
        self.qkv = parts.linear(f"{i}.qkv")
        self.o = parts.linear(f"{i}.o")
        self.spec = AttentionSpec(layer.attention_scale, layer.window, spec.attention_softcap)
        self.rope = rope
        self.shape = (-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        self.num_heads = spec.num_heads
        self.num_qk_heads = spec.num_heads + spec.num_kv_heads

    def __call__(self, ops: Ops, x: Array, batch: AttentionBatch, cache: Opaque) -> Array:
        heads = ops.linear(x, self.qkv).reshape(self.shape)
        q, k = heads[:, : self.num_heads], heads[:, self.num_heads : self.num_qk_heads]
        v = heads[:, self.num_qk_heads :]
        return ops.linear(ops.attention(q, k, v, cache, self.layer, batch, self.spec, self.rope), self.o)


class NormedAttention(Attention):
    """Attention with an RMS norm of queries and keys before they are rotated."""

    def __init__(self, parts: Parts, spec: DecoderSpec, i: int, rope: RopeTables | None) -> None:
        super().__init__(parts, spec, i, rope)
        self.q_norm = RmsNorm(spec.norm, parts.norm_weight(f"{i}.q_norm.weight"))
        self.k_norm = RmsNorm(spec.norm, parts.norm_weight(f"{i}.k_norm.weight"))
        self.q_shape = (-1, spec.num_heads, spec.head_dim)
        self.k_shape = (-1, spec.num_kv_heads, spec.head_dim)
        # One norm sees one head, or the whole projection as if it were a single head.
        per_head = spec.qk_norm == "head"
        self.q_groups = self.q_shape if per_head else (-1, spec.num_heads * spec.head_dim)
        self.k_groups = self.k_shape if per_head else (-1, spec.num_kv_heads * spec.head_dim)

    def __call__(self, ops: Ops, x: Array, batch: AttentionBatch, cache: Opaque) -> Array:
        heads = ops.linear(x, self.qkv).reshape(self.shape)
        q, k = heads[:, : self.num_heads], heads[:, self.num_heads : self.num_qk_heads]
        q = self.q_norm(ops, q.reshape(self.q_groups)).reshape(self.q_shape)
        k = self.k_norm(ops, k.reshape(self.k_groups)).reshape(self.k_shape)
        v = heads[:, self.num_qk_heads :]
        return ops.linear(ops.attention(q, k, v, cache, self.layer, batch, self.spec, self.rope), self.o)


class Mlp:
    """`down(activation(up(x)))`."""

    def __init__(self, parts: Parts, spec: DecoderSpec, i: int) -> None:
        self.activation = spec.activation
        self.up = parts.linear(f"{i}.up")
        self.down = parts.linear(f"{i}.down")

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.activation(ops.linear(x, self.up), self.activation), self.down)


class GatedMlp:
    """`down(activation(gate(x)) * up(x))` (arXiv 2002.05202); gate and up are one matrix."""

    def __init__(self, parts: Parts, spec: DecoderSpec, i: int) -> None:
        self.activation = spec.activation
        self.up = parts.gated_linear(f"{i}.up")
        self.down = parts.linear(f"{i}.down")

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.gated_linear(x, self.up, self.activation), self.down)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: each part is followed by its join, which makes the input of the next part."""

    attention: Attention
    after_attention: Join
    mlp: Mlp | GatedMlp
    after_mlp: Join


class Decoder:
    """A model of any family that `DecoderSpec` can describe; `Model` is the contract."""

    def __init__(
        self,
        spec: DecoderSpec,
        names: NameMap,
        ops: Provider,
        source: PartSource,
        storage: WeightDtype,
        max_model_len: int,
        scheme: Scheme | None = None,
    ) -> None:
        parts = Parts(ops, source, spec, names, storage, scheme)
        self.spec = spec
        self.max_model_len = max_model_len
        self.weight_bytes = parts.weight_bytes
        self._ops = ops
        self._storage = storage
        self._embedding = parts.embedding("embedding")
        self._positions = parts.positions() if spec.learned_positions else None
        # What `pack_embedding` returns also serves `logits`, so a tied head costs nothing.
        self._head = self._embedding if spec.tied_head else parts.embedding("head")
        self._first_norm, self._layers = _build_layers(parts, spec, _rope_tables(ops, spec.layers, max_model_len))
        self._compute = ops.compile(self.compute)

    def cache_shape(self, num_blocks: int, block_size: int) -> CacheShape:
        """The cache holds keys and values in the type of the weights."""
        spec = self.spec
        return CacheShape(spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim, self._storage)

    def forward(self, token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
        """`[tokens]` -> hidden states after the last norm `[outputs, hidden]`."""
        return self._compute(token_ids, batch, cache)

    def compute(self, ops: Ops, token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
        """`forward` of all tokens, by operations; `ops` holds the weights, or stands for the provider that does."""
        residual = ops.embed(token_ids, self._embedding, self.spec.embedding_scale)
        if self._positions is not None:
            residual += ops.embed(batch.positions, self._positions)
        x = residual if self._first_norm is None else self._first_norm(ops, residual)
        for layer in self._layers:
            x = layer.after_attention(ops, layer.attention(ops, x, batch, cache), residual)
            x = layer.after_mlp(ops, layer.mlp(ops, x), residual)
        return x

    def greedy(self, hidden: Array) -> tuple[Array, Array]:
        """`[rows, hidden]` -> token ids `[rows]` and whether the logits are finite `[rows]`."""
        return self._ops.greedy(hidden, self._head, self.spec.logits_scale, self.spec.logits_softcap)

    def logits(self, hidden: Array) -> Array:
        """`[rows, hidden]` -> `[rows, vocab_size]`."""
        return self._ops.logits(hidden, self._head, self.spec.logits_scale, self.spec.logits_softcap)


def _build_layers(
    parts: Parts, spec: DecoderSpec, rope_tables: dict[RopeSpec | None, RopeTables | None]
) -> tuple[Norm | None, list[Layer]]:
    """The norm before the first layer, if there is one, and the layers."""
    has_input_norms = spec.norm_places != "post"
    has_output_norms = spec.norm_places != "pre"
    attention_kind = Attention if spec.qk_norm == "none" else NormedAttention
    mlp_kind = GatedMlp if spec.gated_mlp else Mlp
    input_norms = [parts.norm(f"{i}.attention_norm") if has_input_norms else None for i in range(spec.num_layers)]

    def join(output_norm: str, next_norm: Norm | None) -> Join:
        plain = add if next_norm is None else next_norm.add
        return norm_then(parts.norm(output_norm), plain) if has_output_norms else plain

    layers = []
    for i, layer in enumerate(spec.layers):
        following = parts.norm("final_norm") if i + 1 == spec.num_layers else input_norms[i + 1]
        layers.append(
            Layer(
                attention=attention_kind(parts, spec, i, rope_tables[layer.rope]),
                after_attention=join(
                    f"{i}.attention_post_norm", parts.norm(f"{i}.mlp_norm") if has_input_norms else None
                ),
                mlp=mlp_kind(parts, spec, i),
                after_mlp=join(f"{i}.mlp_post_norm", following),
            )
        )
    return input_norms[0], layers


def _rope_tables(
    ops: Device, layers: Iterable[LayerSpec], max_model_len: int
) -> dict[RopeSpec | None, RopeTables | None]:
    """One pair of tables for each kind of rotary positions in the model."""
    tables: dict[RopeSpec | None, RopeTables | None] = {None: None}
    for spec in {layer.rope for layer in layers if layer.rope is not None}:
        cos, sin = rope_tables(spec, max_model_len)
        tables[spec] = RopeTables(ops.array(cos, "float32"), ops.array(sin, "float32"))
    return tables
