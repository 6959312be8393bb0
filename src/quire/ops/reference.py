"""The definition of every operation.

Written against the array-API standard: the same lines run on numpy and on torch. Everything is float32 unless
a line says otherwise; dtypes of weights and cache appear as *rounding*: a weight or a cached key is rounded to its
dtype and kept as float32, so the arithmetic is the same for each. Other providers are compared with this one,
operation by operation, at the tolerance stated in each docstring; `rel` is relative to the largest magnitude
in the result, `abs` is absolute.

This provider is for reading and for tests. Its GEMMs are the array library's, so it does not
promise row independence to the last bit; the providers that serve do.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace, to_device

from quire.ops import composed, quantize_reference, sampling_reference
from quire.ops.packed import VERSION, Buffer, PackedHeader, PackedState, check_header, checked_buffers
from quire.ops.types import (
    ACTIVATION_QMAX,
    CACHE_QMAX,
    Activation,
    Array,
    AttentionBatch,
    AttentionSpec,
    CacheDtype,
    CacheShape,
    Logprobs,
    QuantizedFormat,
    QuantizedWeight,
    QuantSpec,
    RopeTables,
    SampleBatch,
    WeightDtype,
)


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """A weight rounded to its dtype. Also what `pack_embedding` returns, so heads can be tied."""

    weight: Array  # [out, in] float32
    bias: Array | None  # [out] float32
    format: QuantizedFormat | None = None  # inputs are rounded as it says, each row by its largest


@dataclass(frozen=True, slots=True)
class ReferenceCache:
    """Keys are `data[0]`, values `data[1]`."""

    shape: CacheShape
    data: Array  # [2, layers, blocks, block_size, kv_heads, head_dim] float32


class ReferenceOps(composed.ComposedOps):
    """`ReferenceOps(numpy)` or `ReferenceOps(torch)`; `device` as the library's `asarray` takes it."""

    formats = tuple(ACTIVATION_QMAX)
    cache_dtypes: tuple[CacheDtype, ...] = get_args(CacheDtype)

    def __init__(self, namespace: Any, device: Any | None = None) -> None:
        self.xp = array_namespace(namespace.asarray([0.0]))
        self.device = device
        self.name = f"reference ({namespace.__name__})"

    # arrays and weights

    def array(self, values: Any, dtype: str) -> Array:
        return self.xp.asarray(np.array(values, dtype=dtype), device=self.device)

    def to_numpy(self, x: Array) -> Any:
        return np.asarray(to_device(x, "cpu"))

    def quantize(self, weight: Any, quant: QuantSpec) -> QuantizedWeight:
        """Defined in `quantize_reference`. Exact."""
        return quantize_reference.quantize(weight, quant)

    def pack_linear(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> ReferenceLinear:
        """Rounds to `dtype`, to nearest even; the bias stays float32. Exact. A `QuantizedWeight` becomes what it
        stands for: its values times its scales, then plus its minima, in float32."""
        kind = None
        if isinstance(weight, QuantizedWeight):
            kind = weight.format
            weight.require_range()
            rounded = quantize_reference.dequantized(weight)
        else:
            rounded = np.asarray(weight).astype(np.float32).astype(_numpy_dtype(dtype))
        return ReferenceLinear(
            self.array(rounded, "float32"),
            None if bias is None else self.array(np.asarray(bias).astype(np.float32), "float32"),
            kind,
        )

    def pack_embedding(self, table: Any, dtype: WeightDtype) -> ReferenceLinear:
        return self.pack_linear(table, None, dtype)

    def packed_state(self, packed: ReferenceLinear) -> PackedState:
        """The weight as it is multiplied, float32 `[out, in]`, then the bias `[out]` if there is one."""
        kind, has_bias = packed.format or "float32", packed.bias is not None
        rows, inputs = packed.weight.shape
        header = PackedHeader(VERSION, "reference", "rows", kind, "float32", rows, inputs, 0, False, has_bias)
        arrays = [x for x in (packed.weight, packed.bias) if x is not None]
        return PackedState(header, tuple(self.to_numpy(x).view(np.uint8).reshape(-1) for x in arrays))

    def map_packed(self, header: PackedHeader, buffers: Sequence[Buffer]) -> ReferenceLinear:
        """`PackedStore.map_packed`; with a namespace other than numpy's the memory is copied."""
        kind = header.format if header.format in ACTIVATION_QMAX else None
        expected = {"layout": "rows", "format": kind or "float32", "dtype": "float32", "group_size": 0, "gated": False}
        check_header(header, "reference", **expected, scale_dtype="float32")
        rows, inputs = header.out_features, header.in_features
        sizes = [4 * rows * inputs, 4 * rows] if header.has_bias else [4 * rows * inputs]
        arrays = [view.view(np.float32) for view in checked_buffers(buffers, sizes)]
        if not self.xp.__name__.endswith("numpy"):
            arrays = [self.array(x, "float32") for x in arrays]
        return ReferenceLinear(arrays[0].reshape(rows, inputs), arrays[1] if header.has_bias else None, kind)

    # GEMMs

    def linear(self, x: Array, packed: ReferenceLinear) -> Array:
        """`y[t, o] = sum_i x[t, i] w[o, i] + b[o]` in float32. Where w has 16 bits a provider may round x to its
        dtype first, to nearest even, if that is what its AMX unit or tensor cores take.
        Tolerance: rel 2e-5 (order of sums) for the x it multiplies; so, of rounding to bfloat16, within
        `2^-8 sum_i |x[t, i] w[o, i]|` of this line.

        With a `QuantizedWeight` x first goes through `quantize_activations`, but not with `fp8_groups`. Tolerance: rel
        2e-5 (order of sums); with `fp8` 1e-3, as the sums of a device's unit may be shorter."""
        y_scale = None
        if packed.format is not None and ACTIVATION_QMAX[packed.format]:
            x, y_scale = self.quantize_activations(x, ACTIVATION_QMAX[packed.format], packed.format == "fp8")
        y = x @ self.xp.permute_dims(packed.weight, (1, 0))
        if y_scale is not None:
            y = y * y_scale
        return y if packed.bias is None else y + packed.bias

    def quantize_activations(self, x: Array, qmax: int, e4m3: bool = False) -> tuple[Array, Array]:
        """`q [tokens, in] = rint(x * (qmax / absmax))`, integers kept as float32 (`e4m3`: the nearest of those),
        and the activation scale `absmax / qmax [tokens, 1]`, absmax being the largest magnitude of each row. One below
        2^-100 counts as zero, and a row with an infinity or NaN gives NaN for all its outputs. Exact."""
        xp = self.xp
        none = xp.zeros((x.shape[0], 1), dtype=xp.float32, device=self.device)
        absmax = xp.max(xp.abs(x), axis=-1, keepdims=True) if x.shape[1] else none
        finite = xp.isfinite(absmax)
        some = finite & (absmax >= 2.0**-100)
        inverse = xp.where(some, qmax / xp.where(some, absmax, 1.0), 0.0)
        scaled = xp.where(some, x, 0.0) * inverse
        if e4m3:
            nearest = quantize_reference.e4m3(self.to_numpy(scaled)).astype(np.float32)
            return self.array(nearest, "float32"), xp.where(finite, absmax / qmax, math.nan)
        q = xp.where(some, xp.round(scaled), 0.0)
        return q, xp.where(finite, absmax / qmax, math.nan)

    def embed(self, token_ids: Array, packed: ReferenceLinear, scale: float = 1.0) -> Array:
        """Rows of the table times `scale` in float32. Exact."""
        return self.xp.take(packed.weight, token_ids, axis=0) * scale

    def logits(self, x: Array, packed: Any, scale: float = 1.0, softcap: float | None = None) -> Array:
        """`z = linear(x) * scale`, then `softcap * tanh(z / softcap)`. Tolerance: as `linear`."""
        z = self.linear(x, packed) * scale
        return z if softcap is None else softcap * self.xp.tanh(z / softcap)

    # norms

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """`x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467). Tolerance: rel 2e-6."""
        mean_square = self.xp.mean(x * x, axis=-1, keepdims=True)
        return x / self.xp.sqrt(mean_square + eps) * weight

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> Array:
        """`residual += x` (exact, in place), then `rms_norm(residual)`. Tolerance: rel 2e-6."""
        residual[...] = residual + x
        return self.rms_norm(residual, weight, eps)

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        """`(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias` (arXiv 1607.06450).
        Tolerance: rel 4e-6."""
        centred = x - self.xp.mean(x, axis=-1, keepdims=True)
        variance = self.xp.mean(centred * centred, axis=-1, keepdims=True)
        y = centred / self.xp.sqrt(variance + eps) * weight
        return y if bias is None else y + bias

    # positions and attention

    def _rotate(self, x: Array, positions: Array, cos: Array, sin: Array) -> None:
        """Dimension `i` of the first half and `i + n` of the second, `n = cos.shape[1]`, turn together
        (arXiv 2104.09864): `(a, b) -> (a cos - b sin, b cos + a sin)`. Tolerance: rel 1e-6."""
        half = cos.shape[1]
        c = self.xp.take(cos, positions, axis=0)[:, None, :]
        s = self.xp.take(sin, positions, axis=0)[:, None, :]
        a, b = x[:, :, :half] + 0.0, x[:, :, half : 2 * half] + 0.0
        x[:, :, :half] = a * c - b * s
        x[:, :, half : 2 * half] = b * c + a * s

    def make_cache(self, shape: CacheShape) -> ReferenceCache:
        dims = (2, shape.num_layers, shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        return ReferenceCache(shape, self.xp.zeros(dims, dtype=self.xp.float32, device=self.device))

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: ReferenceCache,
        layer: int,
        batch: AttentionBatch,
        spec: AttentionSpec,
        rope: RopeTables | None = None,
    ) -> Array:
        """For the query at position p of its row: `softmax_j(cap(scale q . k_j)) v_j` over the visible j (see
        `AttentionSpec`), with `cap(s) = softcap * tanh(s / softcap)` and the sink's logit, if any, in the
        denominator only. Keys and values are rounded to the cache's dtype when written and read back so,
        also by the queries of the same step. With `int8` and `fp8` each of them, of one token and head and after its
        rotation, is rounded as a row of `quantize_activations` with `CACHE_QMAX` and read as its numbers times its
        scale: a NaN or an infinity makes all of it NaN. Query head h reads key-value head `h // (heads // kv_heads)`.
        Tolerance: rel 1e-5."""
        xp, size = self.xp, cache.shape.block_size
        if rope is not None:
            q, k = q + 0.0, k + 0.0
            self._rotate(q, batch.positions, rope.cos, rope.sin)
            self._rotate(k, batch.positions, rope.cos, rope.sin)
        k, v = (self._as_cached(x, cache.shape.dtype) for x in (k, v))
        keys, values = cache.data[0, layer, ...], cache.data[1, layer, ...]
        rows: list[tuple[int, int, int, Array]] = []
        bounds = [int(start) for start in batch.query_starts]
        for row, (first, last) in enumerate(itertools.pairwise(bounds)):
            if first == last:
                continue
            start = int(batch.starts[row])
            stop = start + last - first
            table = xp.astype(batch.block_tables[row, : -(-stop // size)], xp.int64)
            positions = xp.arange(start, stop, device=self.device)
            blocks, slots = xp.take(table, positions // size), positions % size
            keys[blocks, slots, ...] = k[first:last, ...]
            values[blocks, slots, ...] = v[first:last, ...]
            rows.append((first, last, start, table))
        out = []  # only now: a row may read what another one has just written
        for first, last, start, table in rows:
            stop = start + last - first
            row_keys = xp.reshape(xp.take(keys, table, axis=0), (-1, *k.shape[1:]))[:stop, ...]
            row_values = xp.reshape(xp.take(values, table, axis=0), (-1, *v.shape[1:]))[:stop, ...]
            out.append(self._attend(q[first:last, ...], row_keys, row_values, start, spec))
        return xp.concat(out, axis=0) if out else xp.zeros((0, q.shape[1] * q.shape[2]), dtype=xp.float32)

    def _as_cached(self, x: Array, dtype: CacheDtype) -> Array:
        """`x [tokens, kv_heads, head_dim]` as a cache of `dtype` gives it back, float32."""
        qmax = CACHE_QMAX.get(dtype)
        if qmax is None:
            return self.xp.astype(self.xp.astype(x, _namespace_dtype(self.xp, dtype)), self.xp.float32)
        numbers, scales = self.quantize_activations(self.xp.reshape(x, (-1, x.shape[2])), qmax, dtype == "fp8")
        return self.xp.reshape(numbers * scales, x.shape)

    def _attend(self, q: Array, k: Array, v: Array, start: int, spec: AttentionSpec) -> Array:
        """`q [tokens, heads, dim]` at positions from `start`; `k, v [stop, kv_heads, dim]`."""
        xp = self.xp
        tokens, heads, dim = q.shape
        group = heads // k.shape[1]
        per_head = xp.permute_dims(q, (1, 0, 2))  # [heads, tokens, dim]
        k = xp.permute_dims(xp.repeat(k, group, axis=1), (1, 2, 0))  # [heads, dim, stop]
        v = xp.permute_dims(xp.repeat(v, group, axis=1), (1, 0, 2))  # [heads, stop, dim]
        scores = (per_head @ k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * xp.tanh(scores / spec.softcap)
        query = xp.arange(start, start + tokens, device=self.device)[:, None]
        key = xp.arange(k.shape[2], device=self.device)[None, :]
        visible = key <= query
        if spec.window is not None:
            visible = visible & (key > query - spec.window)
        scores = xp.where(visible[None, :, :], scores, -math.inf)
        m_i = xp.max(scores, axis=-1, keepdims=True)
        sink = None if spec.sinks is None else spec.sinks[:, None, None]
        if sink is not None:
            m_i = xp.maximum(m_i, sink)
        p = xp.exp(scores - m_i)
        l_i = xp.sum(p, axis=-1, keepdims=True)
        if sink is not None:
            l_i = l_i + xp.exp(sink - m_i)
        acc = (p @ v) / l_i  # [heads, tokens, dim]
        return xp.reshape(xp.permute_dims(acc, (1, 0, 2)), (tokens, heads * dim))

    def block_bytes(self, cache: ReferenceCache, block: int, layer: int) -> bytes:
        """All of them, float32. Exact."""
        return bytes(self.to_numpy(cache.data[:, layer, block, ...]).tobytes())

    def release_blocks(self, cache: ReferenceCache, first: int, number: int) -> None:
        """They are zero afterwards. Exact."""
        cache.data[:, :, first : first + number, ...] = 0.0

    # element by element

    def activation(self, x: Array, kind: Activation) -> Array:
        """silu `x / (1 + e^-x)`; gelu `x (1 + erf(x / sqrt 2)) / 2`; gelu_tanh its tanh form
        (arXiv 1606.08415); relu `max(x, 0)`; ValueError for another kind. Tolerance: each element rel 5e-6
        or abs 1e-6."""
        xp = self.xp
        if kind == "silu":
            return x / (1.0 + xp.exp(-x))
        if kind == "gelu":
            return 0.5 * x * (1.0 + self._erf(x / math.sqrt(2.0)))
        if kind == "gelu_tanh":
            return 0.5 * x * (1.0 + xp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
        if kind == "relu":
            return xp.where(x < 0.0, 0.0 * x, x)
        raise ValueError(f"activation {kind!r} is not one of silu, gelu, gelu_tanh, relu")

    def _erf(self, x: Array) -> Array:
        # The standard has no erf; math.erf is slow here and exact.
        host = self.to_numpy(x)
        flat = np.fromiter((math.erf(value) for value in host.ravel()), np.float32, host.size)
        return self.array(flat.reshape(host.shape), "float32")

    def activation_multiply(self, gate_up: Array, kind: Activation) -> Array:
        """`activation(gate) * up` of `gate_up [tokens, 2 n]`. Tolerance: as `activation`, times `up`."""
        width = gate_up.shape[1] // 2
        return self.activation(gate_up[:, :width], kind) * gate_up[:, width:]

    # choosing tokens

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        """Defined in `sampling_reference`. Providers may differ only where the two best candidates are closer
        than 1e-5, or where the mass at top_p's border is within 1e-6 of top_p."""
        seeds = [int(seed) for seed in self.to_numpy(batch.seeds)]
        sample_row = sampling_reference.sample_row
        samples = [sample_row(self.xp, logits[row, :], batch, row, seed) for row, seed in enumerate(seeds)]
        return self.xp.asarray(samples, dtype=self.xp.int32, device=self.device)

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> Logprobs:
        """`logit - log(sum(exp(logit)))`, computed after subtracting the row's maximum. Tolerance: abs 1e-5;
        ranks and ids are exact."""
        xp = self.xp
        top = xp.max(logits, axis=-1, keepdims=True)
        normalised = logits - (top + xp.log(xp.sum(xp.exp(logits - top), axis=-1, keepdims=True)))
        ids = xp.astype(token_ids, xp.int64)[:, None]
        rank = xp.sum(xp.astype(logits > xp.take_along_axis(logits, ids, axis=-1), xp.int32), axis=-1) + 1
        best = xp.argsort(logits, axis=-1, descending=True, stable=True)[:, :num_top]
        return Logprobs(
            chosen=xp.take_along_axis(normalised, ids, axis=-1)[:, 0],
            rank=xp.astype(rank, xp.int32),
            top_ids=xp.astype(best, xp.int32),
            top_logprobs=xp.take_along_axis(normalised, best, axis=-1),
        )

    def rows_finite(self, logits: Array) -> Array:
        """Exact."""
        xp = self.xp
        bad = xp.any(xp.isnan(logits) | (logits == math.inf), axis=-1)
        return xp.any(logits > -math.inf, axis=-1) & ~bad


def _numpy_dtype(dtype: WeightDtype) -> Any:
    return {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]


def _namespace_dtype(xp: Any, dtype: CacheDtype) -> Any:
    # numpy itself has no bfloat16; ml_dtypes adds it.
    if dtype == "bfloat16" and xp.__name__.endswith("numpy"):
        return ml_dtypes.bfloat16
    return getattr(xp, dtype)
