"""The decoder-only transformer, built from sublayers over `Ops`.

::

    token ids -> embed [+ positions] ---------------------------------------- residual
                                      \\                                     /         \\
       for each layer:                 norm -> attention [-> norm] ------- +           |
                                       norm -> MLP       [-> norm] --------------------+
    residual -> norm -> logits

`norm_places` says which of the norms before and after a sublayer are there. Adding a sublayer's output to the
residual and the norm before the next sublayer are one operation (`ResidualAdd`), so what leaves a layer is the input
of the next.

Sublayers compute with the operations that they are passed: those of a provider, or those that trace what is computed
(`Ops.compile`), so this file is the one definition of what a model does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quire.models.rope import rope_tables
from quire.models.spec import DecoderSpec, LayerSpec, NormSpec, RopeSpec
from quire.ops.types import (
    Array,
    AttentionBatch,
    AttentionSpec,
    CacheDtype,
    CacheShape,
    Device,
    Opaque,
    Ops,
    Provider,
    RopeTables,
    WeightDtype,
)

FIRST_POSITIONS = 8192
"""Of the tables of rotary positions; a longer sequence makes them longer, to twice that or more."""

Weights = Mapping[str, Any]
"""By the names of `decoder_parameters`: a matrix as its provider packed it; a norm as `(weight, bias or None)`, float32
arrays of the provider, with an offset of the weight already added."""

ResidualAdd = Callable[[Ops, Array, Array], Array]
"""`add(ops, x, residual)`: adds a sublayer's output `x [tokens, hidden]` to `residual [tokens, hidden]` in place and
returns the input of the next sublayer `[tokens, hidden]`."""


class RmsNorm:
    """Root mean square norm (arXiv 1910.07467); `add` is the form that first adds to the residual."""

    def __init__(self, spec: NormSpec, weight: Array) -> None:
        self.weight = weight
        self.eps = spec.eps

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, ops: Ops, x: Array, residual: Array) -> Array:
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm:
    """Norm with mean, variance and bias (arXiv 1607.06450)."""

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


def make_norm(spec: NormSpec, weights: Weights, name: str) -> Norm:
    """The norm `name` of hidden states, of the kind that `spec` states."""
    weight, bias = weights[name]
    return RmsNorm(spec, weight) if spec.kind == "rms" else LayerNorm(spec, weight, bias)


def add(_: Ops, x: Array, residual: Array) -> Array:
    """The `ResidualAdd` before a sublayer whose input is the residual itself."""
    residual += x
    return residual


def post_normed(norm: Norm, add: ResidualAdd) -> ResidualAdd:
    """`add` of what `norm` makes of a sublayer's output."""
    return lambda ops, x, residual: add(ops, norm(ops, x), residual)


class Attention:
    """Grouped-query attention with its projections; q, k and v come out of one linear."""

    def __init__(self, weights: Weights, spec: DecoderSpec, i: int, rope: RopeTables | None) -> None:
        layer = spec.layers[i]
        self.layer = i
        self.qkv = weights[f"{i}.qkv"]
        self.o = weights[f"{i}.o"]
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

    def __init__(self, weights: Weights, spec: DecoderSpec, i: int, rope: RopeTables | None) -> None:
        super().__init__(weights, spec, i, rope)
        self.q_norm = RmsNorm(spec.norm, weights[f"{i}.q_norm"][0])
        self.k_norm = RmsNorm(spec.norm, weights[f"{i}.k_norm"][0])
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
    """`down(activation(up(x)))`, `x [tokens, hidden]`."""

    def __init__(self, weights: Weights, spec: DecoderSpec, i: int) -> None:
        self.activation = spec.activation
        self.up = weights[f"{i}.up"]
        self.down = weights[f"{i}.down"]

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.activation(ops.linear(x, self.up), self.activation), self.down)


class GatedMlp:
    """`down(activation(gate(x)) * up(x))` (arXiv 2002.05202); gate and up are one matrix."""

    def __init__(self, weights: Weights, spec: DecoderSpec, i: int) -> None:
        self.activation = spec.activation
        self.gate_up = weights[f"{i}.gate_up"]
        self.down = weights[f"{i}.down"]

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.gated_linear(x, self.gate_up, self.activation), self.down)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: each sublayer is followed by the addition that makes the input of the next one."""

    attention: Attention
    add_attention: ResidualAdd
    mlp: Mlp | GatedMlp
    add_mlp: ResidualAdd


class Decoder:
    """A model of any family that `DecoderSpec` can describe; `Model` is the contract."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        ops: Provider,
        dtype: WeightDtype,
        max_model_len: int,
        weight_bytes: int,
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        """
        Args:
            weights: every parameter of `decoder_parameters(spec, ...)`, packed by `ops`.
            dtype: of the weights that are not quantised.
            max_model_len: positions that the model must be able to compute.
            weight_bytes: of all weights as stored; for reports and for sizing the cache.
            cache_dtype: of keys and values; None is `dtype`.

        Raises:
            KeyError: a parameter is not among `weights`.
        """
        self.spec = spec
        self.max_model_len = max_model_len
        self.weight_bytes = weight_bytes
        self._ops = ops
        self.dtype = dtype
        self._cache_dtype: CacheDtype = cache_dtype or dtype
        self._embedding = weights["embedding"]
        self._positions = weights["positions"] if spec.learned_positions else None
        # What `pack_embedding` returns also serves `logits`, so a tied head costs nothing.
        self._head = self._embedding if spec.tied_head else weights["head"]
        self._weights = weights
        # A device's steps may be captured, and its positions are not read here: all of its tables are made at once.
        self._reach(min(max_model_len, FIRST_POSITIONS) if ops.memory() is None else max_model_len)

    def cache_shape(self, num_blocks: int, block_size: int) -> CacheShape:
        """`Model.cache_shape`."""
        spec = self.spec
        return CacheShape(spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim, self._cache_dtype)

    def forward(self, token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
        """`[tokens]` -> hidden states after the last norm `[outputs, hidden]`."""
        if self._num_positions < self.max_model_len and int(batch.positions.max()) >= self._num_positions:
            self._reach(min(self.max_model_len, max(2 * self._num_positions, int(batch.positions.max()) + 1)))
        return self._compute(token_ids, batch, cache)

    def _reach(self, num_positions: int) -> None:
        """Build the layers with tables of positions up to `num_positions`; their values are the same in any length."""
        tables = _rope_tables(self._ops, self.spec.layers, num_positions, self.max_model_len)
        self._num_positions = num_positions
        self._first_norm, self._layers = _build_layers(self._weights, self.spec, tables)
        self._compute = self._ops.compile(self.compute)

    def compute(self, ops: Ops, token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
        """`forward` of all tokens `[tokens]` -> `[tokens, hidden]`, by operations;
        `ops` holds the weights, or stands for the provider that does."""
        residual = ops.embed(token_ids, self._embedding, self.spec.embedding_scale)
        if self._positions is not None:
            residual += ops.embed(batch.positions, self._positions)
        x = residual if self._first_norm is None else self._first_norm(ops, residual)
        for layer in self._layers:
            x = layer.add_attention(ops, layer.attention(ops, x, batch, cache), residual)
            x = layer.add_mlp(ops, layer.mlp(ops, x), residual)
        return x

    def greedy(self, hidden: Array) -> tuple[Array, Array]:
        """`[rows, hidden]` -> token ids `[rows]` and whether the logits are finite `[rows]`."""
        return self._ops.greedy(hidden, self._head, self.spec.logits_scale, self.spec.logits_softcap)

    def logits(self, hidden: Array) -> Array:
        """`[rows, hidden]` -> `[rows, vocab_size]`."""
        return self._ops.logits(hidden, self._head, self.spec.logits_scale, self.spec.logits_softcap)


def _build_layers(
    weights: Weights, spec: DecoderSpec, rope_tables: dict[RopeSpec | None, RopeTables | None]
) -> tuple[Norm | None, list[Layer]]:
    """The norm before the first layer, if there is one, and the layers."""
    has_input_norms = spec.norm_places != "post"
    has_output_norms = spec.norm_places != "pre"
    attention_kind = Attention if spec.qk_norm == "none" else NormedAttention
    mlp_kind = GatedMlp if spec.gated_mlp else Mlp

    def norm(name: str) -> Norm:
        return make_norm(spec.norm, weights, name)

    def residual_add(output_norm: str, next_norm: str | None) -> ResidualAdd:
        plain = add if next_norm is None else norm(next_norm).add
        return post_normed(norm(output_norm), plain) if has_output_norms else plain

    # The name of the norm before each layer's attention, and of the one after the last layer.
    following = [f"{i}.attention_norm" if has_input_norms else None for i in range(1, spec.num_layers)] + ["final_norm"]
    layers = [
        Layer(
            attention=attention_kind(weights, spec, i, rope_tables[layer.rope]),
            add_attention=residual_add(f"{i}.attention_post_norm", f"{i}.mlp_norm" if has_input_norms else None),
            mlp=mlp_kind(weights, spec, i),
            add_mlp=residual_add(f"{i}.mlp_post_norm", following[i]),
        )
        for i, layer in enumerate(spec.layers)
    ]
    return norm("0.attention_norm") if has_input_norms else None, layers


def _rope_tables(
    ops: Device, layers: Iterable[LayerSpec], num_positions: int, max_model_len: int
) -> dict[RopeSpec | None, RopeTables | None]:
    """One pair of tables for each kind of rotary positions in the model."""
    tables: dict[RopeSpec | None, RopeTables | None] = {None: None}
    for spec in {layer.rope for layer in layers if layer.rope is not None}:
        cos, sin = rope_tables(spec, num_positions, max_model_len)
        tables[spec] = RopeTables(ops.array(cos, "float32"), ops.array(sin, "float32"))
    return tables
