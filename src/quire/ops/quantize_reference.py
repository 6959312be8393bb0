"""Round to nearest: a weight as small numbers and scales. The definition; providers give the same bits.

With 8 bits a row (a group of it, with `int8_groups` and `fp8_groups`) has one scale, its largest magnitude over 127, or
over 448 with e4m3. `int8_min` is read from files and not made here.
With 4 bits each group of a row has one: the weight of largest magnitude becomes about -8 (there is no +8), for a few
divisors in turn; each gives integers and, by least squares, the scale that fits them best; the smallest error wins. On
normal weights that leaves 15 % less error than dividing by 7 does (docs/design/formats.md).
With `int4_min` a group has a minimum too: its range, and shares of it, in 15 steps in turn; each gives numbers and, by
least squares, the scale and the minimum that fit them best. The best minimum is rounded to what the format stores, the
scale fitted to it and rounded, and the numbers are chosen anew. Far from zero a minimum of float16 is coarse: 11 bits.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quire.ops.types import E4M3_FORMATS, FORMATS, Array, QuantizedWeight, QuantSpec

DIVISORS = (6.5, 7.0, 7.5, 8.0, 8.5)
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
SMALLEST = 1e-30
"""A row or group with no larger weight is taken for zero: its scale would have no reciprocal in float32."""
LARGEST = 1e17
TOO_LARGE = "a weight is larger than groups with minima can hold: a scale or minimum is beyond its type"
LANES = 16


def quantize(weight: Any, quant: QuantSpec) -> QuantizedWeight:
    """`weight [out, in]` (float32, float16 or bfloat16) in the numbers of `quant`. Deterministic: sums are float32,
    in sixteen lanes from the first input to the last, then folded in halves.

    Raises:
        ValueError: a weight is NaN or infinite, or larger than the format's scales can be; weights are not rounded to
            the format.
    """
    from array_api_compat import numpy as xp  # it imports all of numpy, f2py too: not at every start

    x = np.asarray(weight).astype(np.float32)
    values, scales, minima = rounded(xp, x, quant)
    whole = e4m3(values) if quant.format in E4M3_FORMATS else np.ascontiguousarray(values.astype(np.int8))
    return QuantizedWeight(quant.format, whole, scales, quant.group_size or x.shape[1], minima)


def require_rounding(quant: QuantSpec) -> None:
    """ValueError for a format to which weights are not rounded."""
    if quant.format != "int4_min" and (FORMATS[quant.format].has_minima or quant.half_scales):
        raise ValueError(f"weights are not rounded to {quant.format!r} with minima or scales of float16")


def dequantized(weight: QuantizedWeight) -> NDArray[Any]:
    """What it stands for, float32 `[out, in]`: its values times its scales, then plus its minima."""

    def of_inputs(table: Array) -> Array:
        return np.repeat(table.astype(np.float32), weight.group_size, axis=1)[:, : weight.values.shape[1]]

    rounded: NDArray[Any] = weight.values.astype(np.float32) * of_inputs(weight.scales)
    return rounded if weight.minima is None else rounded + of_inputs(weight.minima)


def e4m3(x: Array) -> NDArray[Any]:
    """`x [...]` as e4m3 (arXiv 2209.05433), to nearest, ties to even; 448, the largest, past it."""
    nearest: NDArray[Any] = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return nearest


def rounded(xp: Any, x: Array, quant: QuantSpec) -> tuple[Array, Array, Array | None]:
    """`x [out, in]` float32 of the namespace `xp` -> its values of small numbers, still in float32, their scales
    `[out, groups]`, and their minima where the format has them. With e4m3 the values are within its range, and the
    conversion is what rounds them. Rows do not depend on each other. ValueError as `quantize`."""
    require_rounding(quant)
    if not bool(xp.all(xp.isfinite(x))):
        raise ValueError("a weight is not finite")
    out, inputs = x.shape
    if inputs == 0:
        return x, x, x if FORMATS[quant.format].has_minima else None
    is_e4m3 = quant.format in E4M3_FORMATS
    qmax = 448.0 if is_e4m3 else 127.0
    if quant.group_size is None:
        within, scales = _rows(xp, x, qmax)
        return within if is_e4m3 else xp.round(within), scales, None
    size = quant.group_size
    if quant.format == "int4_min":
        return _groups_with_minima(xp, x, size, xp.float16 if quant.half_scales else xp.float32)
    groups = -(-inputs // size)
    missing = xp.zeros((out, groups * size - inputs), dtype=x.dtype, device=x.device)
    grouped = xp.reshape(xp.concat([x, missing], axis=1), (-1, size))
    if FORMATS[quant.format].bits == 8:
        within, scales = _rows(xp, grouped, qmax)
        values = within if is_e4m3 else xp.round(within)
    else:
        values, scales = _groups(xp, grouped)
    return xp.reshape(values, (out, groups * size))[:, :inputs], xp.reshape(scales, (out, groups)), None


def _rows(xp: Any, x: Array, qmax: float) -> tuple[Array, Array]:
    """`x` over its scales `[rows, 1]`, within `qmax`."""
    largest = xp.max(xp.abs(x), axis=1, keepdims=True)
    zero, one = xp.zeros_like(largest), xp.ones_like(largest)
    none = largest < SMALLEST
    # Divided by an array: by a number, torch on a GPU multiplies by its reciprocal.
    scales = xp.where(none, zero, largest / (one * qmax))
    inverse = xp.where(none, zero, one / xp.where(none, one, scales))
    return xp.clip(x * inverse, -qmax, qmax), scales


def _groups(xp: Any, x: Array) -> tuple[Array, Array]:
    """`x [groups, size]` -> values of its shape, scales `[groups]`."""
    most, least = xp.max(x, axis=1), xp.min(x, axis=1)
    extreme = xp.where(most > -least, most, least)
    zero, one = xp.zeros_like(extreme), xp.ones_like(extreme)
    none = xp.abs(extreme) < SMALLEST
    extreme = xp.where(none, one, extreme)
    unit = x * xp.where(none, zero, one / extreme)[:, None]
    best, best_gain, best_scale = xp.zeros_like(x), zero, zero
    for divisor in DIVISORS:
        q = xp.clip(xp.round(unit * -divisor), -8.0, 7.0)
        cross, square = _sum(xp, unit * q), xp.maximum(_sum(xp, q * q), one)
        gain = cross * cross / square
        better = gain > best_gain
        best_gain = xp.where(better, gain, best_gain)
        best_scale = xp.where(better, cross / square * extreme, best_scale)
        best = xp.where(better[:, None], q, best)
    return best, best_scale


def _groups_with_minima(xp: Any, x: Array, size: int, dtype: Any) -> tuple[Array, Array, Array]:
    """`x [out, in]` -> values of its shape, scales and minima `[out, groups]` of `dtype`. What fills up the last group
    counts in nothing."""
    out, inputs = x.shape
    groups = -(-inputs // size)
    last = xp.repeat(x[:, -1:], groups * size - inputs, axis=1)
    grouped = xp.reshape(xp.concat([x, last], axis=1), (out * groups, size))
    there = xp.reshape(xp.arange(groups * size, device=x.device) < inputs, (1, groups, size))
    there = xp.reshape(xp.broadcast_to(there, (out, groups, size)), (out * groups, size))
    values, scales, minima = _with_minima(xp, grouped, xp.astype(there, xp.float32), dtype)
    values = xp.reshape(values, (out, groups * size))[:, :inputs]
    return values, xp.reshape(scales, (out, groups)), xp.reshape(minima, (out, groups))


def _with_minima(xp: Any, x: Array, there: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """`x [groups, size]` where `there` is 1 -> values of its shape, scales and minima `[groups]` of `dtype`. Sums are
    over what a group has beyond its least weight: far from zero, those of the weights would cancel."""
    require_squares(float(xp.max(xp.abs(x))) if x.shape[0] else 0.0)
    least, span = xp.min(x, axis=1), xp.max(x, axis=1) - xp.min(x, axis=1)
    beyond, count = (x - least[:, None]) * there, _sum(xp, there)
    zero, one = xp.zeros_like(span), xp.ones_like(span)
    flat = span < SMALLEST
    total = _sum(xp, beyond)
    best_gain, best_minimum, best_cross, best_of_q, best_square = zero, total / count, zero, zero, one
    for share in SHARES:
        step = xp.where(flat, zero, span * share / (one * 15.0))
        q = _nearest(xp, beyond, step, (span - span * share) * 0.5) * there
        of_q, square, cross = _sum(xp, q), _sum(xp, q * q), _sum(xp, q * beyond)
        spread = square * count - of_q * of_q
        none = spread < 0.5
        scale = xp.where(none, zero, (cross * count - of_q * total) / xp.where(none, one, spread))
        gain = scale * (cross - of_q * total / count)
        better = gain > best_gain
        best_gain = xp.where(better, gain, best_gain)
        best_minimum = xp.where(better, (total - scale * of_q) / count, best_minimum)
        best_cross = xp.where(better, cross, best_cross)
        best_of_q = xp.where(better, of_q, best_of_q)
        best_square = xp.where(better, square, best_square)
    minima = stored(xp, least + best_minimum, dtype)
    found = xp.astype(minima, xp.float32)
    # The scale that fits the minimum as it is stored; without one the minimum is all there is.
    scales = stored(xp, (best_cross - (found - least) * best_of_q) / xp.maximum(best_square, one), dtype)
    minima = xp.where(scales == 0, stored(xp, least + total / count, dtype), minima)
    found = xp.astype(minima, xp.float32)
    return _nearest(xp, x, xp.astype(scales, xp.float32), found), scales, minima


def require_squares(largest: float) -> None:
    """ValueError for a weight whose squares, summed over a group, float32 cannot hold."""
    if largest > LARGEST:
        raise ValueError(TOO_LARGE)


def stored(xp: Any, x: Array, dtype: Any) -> Any:
    """Scales or minima of any shape `[...]` as `dtype` has them. ValueError where it has none so large."""
    if bool(xp.any(xp.abs(x) > float(xp.finfo(dtype).max))):
        raise ValueError(TOO_LARGE)
    return xp.asarray(x, dtype=dtype)


def _nearest(xp: Any, x: Array, scales: Array, minima: Array) -> Array:
    """The numbers from 0 to 15 of `x [groups, size]`."""
    none = xp.abs(scales) < SMALLEST
    one = xp.ones_like(scales)
    inverse = xp.where(none, xp.zeros_like(scales), one / xp.where(none, one, scales))
    return xp.clip(xp.round((x - minima[:, None]) * inverse[:, None]), 0.0, 15.0)


def _sum(xp: Any, x: Array) -> Array:
    """Over the last dimension, a multiple of sixteen, in the order that the definition states."""
    total = xp.zeros_like(x[:, :LANES])
    for first in range(0, x.shape[1], LANES):
        total = total + x[:, first : first + LANES]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]
