"""Round to nearest: a weight as small numbers and scales. The definition; providers give the same bits.

With 8 bits a row (a group of it, with `int8_groups` and `fp8_groups`) has one scale, its largest magnitude over 127, or
over 448 with e4m3. `int8_min` is read from files and not made here.
With 4 bits each group of a row has one: the weight of largest magnitude becomes about -8 (there is no +8), for a few
divisors in turn; each gives integers and, by least squares, the scale that fits them best; the smallest error wins. On
normal weights that leaves 15 % less error than dividing by 7 does (docs/design/formats.md).
With `int4_min` a group has a minimum too: its range, and shares of it, in 15 steps in turn; each gives numbers and, by
least squares, the scale and the minimum that fit them best. The best of those are rounded to what the format stores,
and the numbers are chosen anew.
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
LANES = 16
ROWS_VALUES = 2**18
"""Of the rows that a thread takes at once."""


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


def quantize_by_rows(weight: Any, quant: QuantSpec) -> QuantizedWeight:
    """`quantize`, some rows at a time on all processors, so that it takes little memory beside the weight."""
    from concurrent.futures import ThreadPoolExecutor

    weight = np.asarray(weight)
    rows = max(1, ROWS_VALUES // max(1, weight.shape[1]))
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda at: quantize(weight[at : at + rows], quant), range(0, max(1, len(weight)), rows)))
    joined = [np.concatenate([getattr(one, name) for one in parts]) for name in ("values", "scales", "minima")]
    return QuantizedWeight(quant.format, joined[0], joined[1], parts[0].group_size, joined[2])


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
    groups = -(-inputs // size)
    missing = xp.zeros((out, groups * size - inputs), dtype=x.dtype, device=x.device)
    grouped = xp.reshape(xp.concat([x, missing], axis=1), (-1, size))
    minima = None
    if quant.format == "int4_min":
        values, scales, minima = _groups_with_minima(xp, grouped, xp.float16 if quant.half_scales else xp.float32)
        minima = xp.reshape(minima, (out, groups))
    elif FORMATS[quant.format].bits == 8:
        within, scales = _rows(xp, grouped, qmax)
        values = within if is_e4m3 else xp.round(within)
    else:
        values, scales = _groups(xp, grouped)
    return xp.reshape(values, (out, groups * size))[:, :inputs], xp.reshape(scales, (out, groups)), minima


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


def _groups_with_minima(xp: Any, x: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """`x [groups, size]` -> values of its shape, scales and minima `[groups]` of `dtype`."""
    size = x.shape[1]
    most, least = xp.max(x, axis=1), xp.min(x, axis=1)
    zero, one = xp.zeros_like(most), xp.ones_like(most)
    flat = most - least < SMALLEST
    total = _sum(xp, x)
    best_gain, best_scale, best_minimum = zero - xp.inf, zero, total / (one * size)
    for share in SHARES:
        span = (most - least) * share
        start = least + (most - least - span) * 0.5
        q = _nearest(xp, x, xp.where(flat, zero, span / (one * 15.0)), start)
        of_q, square, cross = _sum(xp, q), _sum(xp, q * q), _sum(xp, q * x)
        spread = square * size - of_q * of_q
        none = spread < 0.5
        scale = xp.where(none, zero, (cross * size - of_q * total) / xp.where(none, one, spread))
        minimum = (total - scale * of_q) / (one * size)
        gain = scale * cross + minimum * total
        better = gain > best_gain
        best_gain = xp.where(better, gain, best_gain)
        best_scale = xp.where(better, scale, best_scale)
        best_minimum = xp.where(better, minimum, best_minimum)
    largest = float(xp.finfo(dtype).max)
    if bool(xp.any(xp.maximum(xp.abs(best_scale), xp.abs(best_minimum)) > largest)):
        raise ValueError("a weight is larger than a scale or minimum of float16 can be")
    scales, minima = xp.astype(best_scale, dtype), xp.astype(best_minimum, dtype)
    return _nearest(xp, x, xp.astype(scales, xp.float32), xp.astype(minima, xp.float32)), scales, minima


def _nearest(xp: Any, x: Array, scales: Array, minima: Array) -> Array:
    """The numbers from 0 to 15 of `x [groups, size]`."""
    none = xp.abs(scales) < SMALLEST
    inverse = xp.where(none, xp.zeros_like(scales), 1.0 / xp.where(none, xp.ones_like(scales), scales))
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
