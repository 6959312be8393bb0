"""GPTQ (arXiv 2210.17323): inputs of a weight are rounded one after another, and those still to come make up for the
error, as far as the inputs of the calibration let them.

With H the Hessian `x^T x` of the inputs and `H = U U^T`, the error of a row is `||(w - q) U||^2`. Of its terms the
k-th is `U_kk (w_k - q_k) + sum_(i < k) U_ik (w_i - q_i)`: so each weight is rounded from where that term is zero.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.ops.quantize_reference import require_squares, stored
from quire.ops.types import FORMATS, QuantizedWeight, QuantSpec
from quire.quant.calibrate.cholesky import BLOCK, Gemm, upper_factor

DAMPING = 0.1
"""Of the Hessian's mean diagonal, added to it. 0.01, the paper's, fits 8,192 tokens of SmolLM2 better and others worse:
8 % more error on another text (docs/design/formats.md)."""
DIVISORS = (6.0, 6.5, 7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0)
"""Of a group's largest weight, tried in turn: as in `ops/quantize_reference.py`, and finer."""
SHARES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Of a group's range, where it has a minimum: those of `ops/quantize_reference.py`, and further."""
SMALLEST = 1e-30
LARGEST = {4: (-8.0, 7.0), 8: (-127.0, 127.0)}

Floats = NDArray[np.float32]


def gptq(weight: Any, hessian: NDArray[np.float64], quant: QuantSpec, gemm: Gemm) -> QuantizedWeight:
    """`weight [out, in]`, float32, in the numbers of `quant`. Deterministic, as `gemm` is.

    Args:
        hessian: `[in, in]`, of the inputs.

    Raises:
        ValueError: a weight or an input was not finite, or a weight larger than the format's scales can be.
    """
    out, inputs = weight.shape
    if not (np.isfinite(weight).all() and np.isfinite(hessian).all()):
        raise ValueError("a weight or an input of the calibration is not finite")
    if FORMATS[quant.format].has_minima and weight.size:
        require_squares(float(np.abs(weight).max()))
    size, stated = quant.group_size or inputs, FORMATS[quant.format]
    low, high = (stated.low, stated.high) if stated.has_minima else LARGEST[stated.bits]
    dtype = np.float16 if quant.half_scales else np.float32
    factor = upper_factor(damped(hessian), gemm)
    diagonal = np.diagonal(factor)
    ratios, importance = (factor / diagonal).astype(np.float32), np.square(diagonal).astype(np.float32)
    # Inputs first: a step works on one of them, for all outputs.
    columns = np.ascontiguousarray(weight.T, np.float32)
    values, scales = np.empty((inputs, out), np.int8), np.empty((-(-inputs // size), out), np.float32)
    minima = np.zeros_like(scales)
    if quant.group_size is None:
        scales[0] = row_scales(columns)
    carried = np.zeros((inputs, out), np.float32)
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        errors = np.empty((last - first, out), np.float32)
        for k in range(first, last):
            if quant.group_size is not None and k % size == 0:
                group = slice(k, min(k + size, inputs))
                now = columns[group] + carried[group]
                if stated.has_minima:
                    scales[k // size], minima[k // size] = group_ranges(now, importance[group], dtype)
                else:
                    scales[k // size] = row_scales(now) if stated.bits == 8 else group_scales(now, importance[group])
            scale, minimum = scales[k // size], minima[k // size]
            rounded = np.clip(np.rint((columns[k] + carried[k] - minimum) * _inverse(scale)), low, high)
            values[k] = rounded
            error = errors[k - first] = columns[k] - (rounded * scale + minimum)
            carried[k + 1 : last] += ratios[k, k + 1 : last, None] * error
        if last < inputs:
            carried[last:] += gemm(np.ascontiguousarray(ratios[first:last, last:].T), np.ascontiguousarray(errors.T))
    whole, *tables = (np.ascontiguousarray(one.T) for one in (values, scales.astype(dtype), minima.astype(dtype)))
    return QuantizedWeight(quant.format, whole, tables[0], size, tables[1] if stated.has_minima else None)


def damped(hessian: NDArray[np.float64]) -> NDArray[np.float64]:
    """With `DAMPING`; an input that was never there counts as one that hardly was."""
    mean = float(np.diagonal(hessian).mean())
    found: NDArray[np.float64] = hessian + np.eye(len(hessian)) * (DAMPING * mean if mean > 0 else 1.0)
    return found


def row_scales(columns: Floats) -> Floats:
    """`columns [size, out]` -> the scale of 8 bits of each output `[out]`: no number is cut off."""
    scales: Floats = np.abs(columns).max(axis=0) / np.float32(LARGEST[8][1])
    return scales


def group_scales(group: Floats, importance: Floats) -> Floats:
    """`group [size, out]` -> the scale of 4 bits of each output `[out]` with the least error, weighted by
    `importance [size]`."""
    most, least = group.max(axis=0), group.min(axis=0)
    extreme = np.where(most > -least, most, least)
    none = np.abs(extreme) < SMALLEST
    unit = group * _inverse(np.where(none, 0, extreme))
    weights = importance[:, None] / importance.max()
    best_gain, best = np.zeros_like(extreme), np.zeros_like(extreme)
    for divisor in DIVISORS:
        q = np.clip(np.rint(unit * np.float32(-divisor)), *LARGEST[4])
        weighted = weights * q
        cross, square = (weighted * unit).sum(axis=0), (weighted * q).sum(axis=0)
        ratio = cross * _inverse(square)
        better = cross * ratio > best_gain
        best_gain, best = np.where(better, cross * ratio, best_gain), np.where(better, ratio * extreme, best)
    return np.where(none, np.float32(0), best)


def group_ranges(group: Floats, importance: Floats, dtype: Any) -> tuple[Floats, Floats]:
    """`group [size, out]` -> the scale and the minimum of 4 bits of each output `[out]` with the least error, weighted
    by `importance [size]`, as `dtype` has them.

    Raises:
        ValueError: one is larger than `dtype` can be.
    """
    most, least = group.max(axis=0), group.min(axis=0)
    weights = importance[:, None] / importance.sum()
    mean = (weights * group).sum(axis=0)
    best_gain, best_q, minimum = np.zeros_like(most), np.zeros_like(group), mean
    for share in SHARES:
        span = (most - least) * np.float32(share)
        start = (most + least - span) * np.float32(0.5)
        q = np.clip(np.rint((group - start) * _inverse(span / np.float32(15))), 0, 15)
        weighted = weights * q
        of_q = weighted.sum(axis=0)
        cross, spread = (weighted * (group - mean)).sum(axis=0), (weighted * (q - of_q)).sum(axis=0)
        scale = cross * _inverse(spread)
        better = cross * scale > best_gain
        best_gain, best_q = np.where(better, cross * scale, best_gain), np.where(better, q, best_q)
        minimum = np.where(better, mean - scale * of_q, minimum)
    minimum = stored(np, minimum, dtype).astype(np.float32)
    weighted = weights * best_q  # the scale that fits the minimum as it is stored
    scale = (weighted * (group - minimum)).sum(axis=0) * _inverse((weighted * best_q).sum(axis=0))
    scale = stored(np, scale, dtype).astype(np.float32)
    return scale, np.where(scale == 0, stored(np, mean, dtype), minimum)


def _inverse(x: Floats) -> Floats:
    """`1 / x`; 0 of 0."""
    none = np.abs(x) < SMALLEST
    return np.where(none, np.float32(0), np.float32(1) / np.where(none, np.float32(1), x))
