"""The operations on the CPU: arrays are numpy, the work is native (see `native/`).

Row independence holds to the last bit for one instruction set: every reduction has an order that depends on the
row's own data and on the shapes of the weights. With the instruction set `amx` the inputs of GEMMs with bfloat16
weights are rounded to bfloat16 (`docs/design/amx.md`). The native side checks every shape and index and raises
ValueError; it never reads outside an array.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import ml_dtypes
import numpy as np

from quire.ops import _native, cpu_packed
from quire.ops.composed import ComposedOps
from quire.ops.cpu_program import ACTIVATION, NO_WINDOW, CpuProgram
from quire.ops.graph.fuse import fuse
from quire.ops.graph.operations import trace
from quire.ops.packed import Buffer, PackedHeader, PackedState
from quire.ops.quantize_reference import TOO_LARGE, require_rounding
from quire.ops.types import (
    E4M3_FORMATS,
    FORMATS,
    Activation,
    Array,
    AttentionBatch,
    AttentionSpec,
    CacheDtype,
    CacheShape,
    Forward,
    Logprobs,
    Opaque,
    QuantizedFormat,
    QuantizedWeight,
    QuantSpec,
    RopeTables,
    SampleBatch,
    Step,
    StoredWeight,
    WeightDtype,
)

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
_FLOAT32 = np.dtype(np.float32)


class CpuOps(ComposedOps):
    """`threads` includes the calling one. `isa` is one of `quire.ops.select.instruction_sets()`. `affinity` names the
    processors of each thread (`quire.ops.select.core_processors`); empty leaves them to the system. All providers of a
    process share its threads: their operations run one after another, whichever thread calls."""

    formats: tuple[QuantizedFormat, ...] = cpu_packed.HELD
    cache_dtypes: tuple[CacheDtype, ...] = get_args(CacheDtype)

    def __init__(self, threads: int, isa: str, affinity: Sequence[Sequence[int]] = ()) -> None:
        self._native = _native.Runtime(threads, isa, affinity)
        self.threads, self.isa = threads, isa
        self.name = f"cpu ({isa}, {threads} threads)"

    @cached_property
    def xp(self) -> Any:
        """For the composed operations; its import takes longer than all others here together."""
        from array_api_compat import numpy

        return numpy

    def compile(self, forward: Forward) -> Step:
        """One native call for all operations of a step."""
        return CpuProgram(self._native, fuse(trace(forward)))

    # arrays and weights

    def array(self, values: Any, dtype: str) -> Array:
        return np.array(values, dtype=dtype)

    def to_numpy(self, x: Array) -> Any:
        return x

    def probe(self, kind: str, data: Array) -> int:
        """For benchmarks: read the bytes of `data` ("read"), or multiply with one of the units ("float32", "bfloat16",
        "int8"), with all threads. `data [bytes]` is uint8. The number of bytes, or of multiplications and additions; 0
        without such a unit."""
        return self._native.probe(kind, data)

    def quantize(self, weight: Any, quant: QuantSpec) -> QuantizedWeight | StoredWeight:
        """See `Ops.quantize`. ValueError as there."""
        require_rounding(quant)
        has_minima = FORMATS[quant.format].has_minima
        if isinstance(weight, StoredWeight) and not has_minima:
            return replace(weight, quant=quant)
        weight = np.ascontiguousarray(np.asarray(weight))
        out, inputs = weight.shape
        dtype = next(name for name, one in _DTYPES.items() if one == weight.dtype)
        size, is_e4m3 = quant.group_size or inputs, quant.format in E4M3_FORMATS
        rounding = "fp8" if is_e4m3 else f"int{FORMATS[quant.format].bits}"
        if has_minima:
            rounding += "_min_half" if quant.half_scales else "_min"
        values, groups = np.empty((out, inputs), np.int8), -(-inputs // size) if inputs else 0
        scales = np.empty((out, groups * (1 + has_minima)), _FLOAT32)  # a row's minima behind its scales
        items = weight if dtype == "float32" else weight.view(np.uint16)
        if not self._native.quantize(items, dtype, rounding, size, values, scales):
            raise ValueError("a weight is not finite")
        whole = values.view(ml_dtypes.float8_e4m3fn) if is_e4m3 else values
        if not has_minima:
            return QuantizedWeight(quant.format, whole, scales, size)
        if not np.isfinite(scales).all():
            raise ValueError(TOO_LARGE)
        kept = scales.astype(np.float16) if quant.half_scales else scales
        return QuantizedWeight(quant.format, whole, kept[:, :groups], size, kept[:, groups:])

    def pack_linear(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> Opaque:
        return self._pack(weight, bias, dtype, gated=False)

    def pack_gated(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> Opaque:
        return self._pack(weight, bias, dtype, gated=True)

    def _pack(self, weight: Any, bias: Any | None, dtype: WeightDtype, gated: bool) -> Opaque:
        if bias is not None:
            bias = np.ascontiguousarray(bias, dtype=np.float32)
        if isinstance(weight, QuantizedWeight):
            return self._pack_integers(weight, bias, gated)
        if isinstance(weight, StoredWeight) and (weight.quant is not None or weight.dtype == dtype):
            return self._pack_stored(weight, bias, gated)
        weight = np.asarray(weight)
        if weight.dtype != _DTYPES[dtype]:
            weight = _converted(weight, _DTYPES[dtype])
        if weight.strides[-1] != weight.itemsize:
            weight = np.ascontiguousarray(weight)
        # The buffer protocol has no name for bfloat16.
        items = weight if dtype == "float32" else weight.view(np.uint16)
        return self._native.pack(items, bias, dtype, gated, None)

    def _pack_stored(self, weight: StoredWeight, bias: Any | None, gated: bool) -> Opaque:
        inputs, quant = weight.shape[1], None
        if weight.quant is not None:
            quant = cpu_packed.native_integers(weight.quant.format, weight.quant.group_size or inputs, False)
        return self._native.pack((inputs, list(weight.files)), bias, weight.dtype, gated, quant)

    def _pack_integers(self, weight: QuantizedWeight, bias: Any | None, gated: bool) -> Opaque:
        if not FORMATS[weight.format].group_sizes:
            weight.require_range()  # the native side knows groups, all of whose integers are numbers
        values, halves = weight.values, weight.scales.dtype == np.float16
        if values.strides[-1] != 1:
            values = np.ascontiguousarray(values)
        values = values.view(np.int8)  # e4m3 as its bits
        # The buffer protocol's name for float16 is not C's.
        scales, minima = (
            None if one is None else np.ascontiguousarray(one).view(np.uint16 if halves else np.float32)
            for one in (weight.scales, weight.minima)
        )
        integers = cpu_packed.native_integers(weight.format, weight.group_size, halves)
        return self._native.pack_integers(values, scales, minima, bias, integers, gated)

    def pack_embedding(self, table: Any, dtype: WeightDtype) -> Opaque:
        return self.pack_linear(table, None, dtype)

    def packed_state(self, packed: Opaque) -> PackedState:
        return cpu_packed.packed_state(packed)

    def map_packed(self, header: PackedHeader, buffers: Sequence[Buffer]) -> Opaque:
        return cpu_packed.map_packed(self._native, header, buffers)

    # GEMMs

    def linear(self, x: Array, packed: Opaque) -> Array:
        y = np.empty((x.shape[0], packed.out_features), _FLOAT32)
        self._native.linear(x, packed, y, 1.0, 0.0, False)
        return y

    def gated_linear(self, x: Array, packed: Opaque, kind: Activation) -> Array:
        y = np.empty((x.shape[0], packed.out_width), _FLOAT32)
        self._native.gated_linear(x, packed, ACTIVATION[kind], y)
        return y

    def embed(self, token_ids: Array, packed: Opaque, scale: float = 1.0) -> Array:
        y = np.empty((token_ids.shape[0], packed.in_features), _FLOAT32)
        self._native.embed(token_ids, packed, scale, y)
        return y

    def logits(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> Array:
        y = np.empty((x.shape[0], packed.out_features), _FLOAT32)
        self._native.linear(x, packed, y, scale, softcap or 0.0, False)
        return y

    def greedy(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> tuple[Array, Array]:
        tokens, finite = np.empty(x.shape[0], np.int32), np.empty(x.shape[0], np.bool_)
        self._native.greedy(x, packed, scale, softcap or 0.0, tokens, finite)
        return tokens, finite

    # norms

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        y = np.empty(x.shape, _FLOAT32)
        self._native.norm(_rows(x), None, weight, None, eps, False, _rows(y))
        return y

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> Array:
        y = np.empty(x.shape, _FLOAT32)
        self._native.norm(x, residual, weight, None, eps, False, y)
        return y

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        y = np.empty(x.shape, _FLOAT32)
        self._native.norm(_rows(x), None, weight, bias, eps, True, _rows(y))
        return y

    # positions and attention

    def make_cache(self, shape: CacheShape) -> Opaque:
        return _native.make_cache(
            shape.num_layers, shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim, shape.dtype
        )

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Opaque,
        layer: int,
        batch: AttentionBatch,
        spec: AttentionSpec,
        rope: RopeTables | None = None,
    ) -> Array:
        tokens, heads, head_dim = q.shape
        out = np.empty((tokens, heads * head_dim), _FLOAT32)
        self._native.attention(
            q,
            k,
            v,
            cache,
            layer,
            batch.query_starts,
            batch.starts,
            batch.block_tables,
            spec.scale,
            NO_WINDOW if spec.window is None else spec.window,
            spec.softcap or 0.0,
            spec.sinks,
            None if rope is None else rope.cos,
            None if rope is None else rope.sin,
            out,
        )
        return out

    def block_bytes(self, cache: Opaque, block: int, layer: int) -> bytes:
        return bytes(cache.block_bytes(block, layer))

    def release_blocks(self, cache: Opaque, first: int, number: int) -> None:
        cache.release_blocks(first, number)

    # element by element

    def activation(self, x: Array, kind: Activation) -> Array:
        y = np.empty(x.shape, _FLOAT32)
        self._native.activation(_rows(x), ACTIVATION[kind], False, _rows(y))
        return y

    def activation_multiply(self, gate_up: Array, kind: Activation) -> Array:
        y = np.empty((gate_up.shape[0], gate_up.shape[1] // 2), _FLOAT32)
        self._native.activation(gate_up, ACTIVATION[kind], True, y)
        return y

    # choosing tokens

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        tokens = np.empty(logits.shape[0], np.int32)
        self._native.sample(
            logits,
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.min_p,
            batch.seeds,
            batch.positions,
            tokens,
        )
        return tokens

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> Logprobs:
        rows = logits.shape[0]
        result = Logprobs(
            chosen=np.empty(rows, _FLOAT32),
            rank=np.empty(rows, np.int32),
            top_ids=np.empty((rows, num_top), np.int32),
            top_logprobs=np.empty((rows, num_top), _FLOAT32),
        )
        self._native.logprobs(logits, token_ids, result.chosen, result.rank, result.top_ids, result.top_logprobs)
        return result

    def rows_finite(self, logits: Array) -> Array:
        finite = np.empty(logits.shape[0], np.bool_)
        self._native.rows_finite(logits, finite)
        return finite


def operation_counts() -> list[tuple[str, int, int, int, int, int, int]]:
    """What the threads of this process did: (operation, the most rows of the class or 0 for no bound, calls, rows in
    all, nanoseconds, bytes of the weight, multiplications and additions for a row). Numbers only grow."""
    return _native.operation_times()


def _rows(x: Array) -> Array:
    # A view [rows, size]: norms and activations of [tokens, heads, head_dim] work on the last dimension.
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _converted(weight: Array, dtype: Any) -> Array:
    # In steps: a whole copy in float32 would be the largest thing in memory while a model is loaded.
    out = np.empty(weight.shape, dtype)
    for first in range(0, len(weight), 256):
        out[first : first + 256] = weight[first : first + 256].astype(np.float32)
    return out
