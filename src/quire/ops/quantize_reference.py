"""Round to nearest: a weight as small numbers and scales. The definition; providers give the same bits.

With 8 bits a row has one scale, its largest magnitude over 127, or over 448 with `fp8` (e4m3).
With 4 bits each group of a row has one: the weight of largest magnitude becomes about -8 (there is no +8), for a few
divisors in turn; each gives integers and, by least squares, the scale that fits them best; the smallest error wins. On
normal weights that leaves 15 % less error than dividing by 7 does (benchmarks/quantization.md).
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quire.ops.types import QuantizedWeight, Rounding

DIVISORS = (6.5, 7.0, 7.5, 8.0, 8.5)
SMALLEST = 1e-30
"""A row or group with no larger weight is taken for zero: its scale would have no reciprocal in float32."""
LANES = 16

Floats = NDArray[np.float32]


def quantize(weight: Any, rounding: Rounding) -> QuantizedWeight:
    """`weight [out, in]` (float32, float16 or bfloat16) in the numbers of `rounding`. Deterministic: sums are float32,
    in sixteen lanes from the first input to the last, then folded in halves.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    x = np.asarray(weight).astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError("a weight is not finite")
    out, inputs = x.shape
    if rounding.group_size is None:
        within, scales = _rows(x, 448.0 if rounding.format == "fp8" else 127.0)
        rounded = e4m3(within) if rounding.format == "fp8" else np.rint(within).astype(np.int8)
        return QuantizedWeight(rounding.format, rounded, scales, inputs)
    size = rounding.group_size
    groups = -(-inputs // size)
    padded = np.zeros((out, groups * size), np.float32)
    padded[:, :inputs] = x
    values, scales = _groups(padded.reshape(-1, size))
    values = np.ascontiguousarray(values.reshape(padded.shape)[:, :inputs])
    return QuantizedWeight(rounding.format, values, scales.reshape(out, groups), size)


def e4m3(x: Floats) -> NDArray[Any]:
    """To nearest, ties to even; past the largest, 448, that."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def _rows(x: Floats, levels: float) -> tuple[Floats, Floats]:
    """`x` over its scales `[rows, 1]`, within `levels`."""
    largest = np.abs(x).max(axis=1, keepdims=True, initial=0.0)
    none = largest < SMALLEST
    scales = np.where(none, np.float32(0), largest / np.float32(levels))
    inverse = np.where(none, np.float32(0), np.float32(1) / np.where(none, np.float32(1), scales))
    return np.clip(x * inverse, -levels, levels), scales if x.shape[1] else scales[:, :0]


def _groups(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """`x [groups, size]` -> values of its shape, scales `[groups]`."""
    most, least = x.max(axis=1), x.min(axis=1)
    extreme = np.where(most > -least, most, least)
    none = np.abs(extreme) < SMALLEST
    extreme = np.where(none, np.float32(1), extreme)
    unit = x * np.where(none, np.float32(0), np.float32(1) / extreme)[:, None]
    best = np.zeros_like(x)
    best_gain = best_scale = np.zeros(len(x), np.float32)
    for divisor in DIVISORS:
        q = np.clip(np.rint(unit * np.float32(-divisor)), -8, 7).astype(np.float32)
        cross, square = _sum(unit * q), np.maximum(_sum(q * q), np.float32(1))
        gain = cross * cross / square
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_scale = np.where(better, cross / square * extreme, best_scale)
        best = np.where(better[:, None], q, best)
    return best.astype(np.int8), best_scale


def _sum(x: Floats) -> Floats:
    """Over the last dimension, a multiple of sixteen, in the order that the definition states."""
    total = np.zeros((x.shape[0], LANES), np.float32)
    for first in range(0, x.shape[1], LANES):
        total = total + x[:, first : first + LANES]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]
