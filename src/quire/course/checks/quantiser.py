"""Checks of exercise 3.3: the bound of the error, what does not spread, and the loss beside Quire's own rounding."""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.course.checking import Check, Failed, shown
from quire.ops.quantize_reference import dequantized
from quire.ops.quantize_reference import quantize as ours
from quire.ops.types import QuantSpec

LARGEST = {8: (-127, 127), 4: (-8, 7)}
STEPS = {8: 127.0, 4: 7.0}
ROUNDING = 1e-5
"""What float32 may add to an error, relative to the largest magnitude."""


def _normal(rows: int = 16, inputs: int = 256) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.02, (rows, inputs)).astype(np.float32)


def _rounded(module: ModuleType, weight: NDArray[np.float32], bits: int, size: int) -> NDArray[np.float32]:
    """The weight there and back."""
    call = f"quantize(weight {list(weight.shape)}, {bits}, {size})"
    given = weight.copy()
    values, scales = module.quantize(given, bits, size)
    if not np.array_equal(given, weight):
        raise Failed(f"{call} changed the weight that it was given")
    shape = [weight.shape[0], weight.shape[1] // size]
    for name, found, wanted, dtype in (
        ("values", values, list(weight.shape), "int8"),
        ("scales", scales, shape, "float32"),
    ):
        if list(np.shape(found)) != wanted or str(np.asarray(found).dtype) != dtype:
            raise Failed(
                f"{call}: {name} are {np.asarray(found).dtype} {list(np.shape(found))}; expected {dtype} {wanted}"
            )
    least, most = LARGEST[bits]
    if values.min() < least or values.max() > most:
        raise Failed(f"{call}: integers from {values.min()} to {values.max()}; expected {least} to {most}")
    back: NDArray[np.float32] = np.asarray(module.dequantize(values, scales, size))
    if back.shape != weight.shape:
        raise Failed(f"dequantize gave {list(back.shape)}; expected {list(weight.shape)}")
    return back


def _weights() -> tuple[NDArray[np.float32], ...]:
    """Normal ones, tiny ones, of one magnitude, and all above zero."""
    return _normal(), _normal(1, 64) * np.float32(1e-4), np.sign(_normal(2, 128)), np.exp(_normal(4, 128) * 100)


def eight(module: ModuleType) -> str:
    """8 bits: no error above half a step of its group"""
    worst = 0.0
    for weight in _weights():
        for size in (32, 64):
            groups, back = weight.reshape(-1, size), _rounded(module, weight, 8, size).reshape(-1, size)
            most = np.abs(groups).max(axis=1, keepdims=True)
            errors = np.abs(back - groups)
            shares = errors / (most / STEPS[8] / 2)
            if not bool((errors <= most * (0.5 / STEPS[8] + ROUNDING)).all()):  # NaN is not within, either
                at = np.unravel_index(int(np.argmax(np.where(np.isnan(shares), np.inf, shares))), shares.shape)
                largest = most[at[0], 0]
                raise Failed(
                    f"8 bits, groups of {size}: {groups[at]:.6g} became {back[at]:.6g}, in a group to {largest:.6g}: "
                    f"an error of {errors[at]:.3g}; expected {largest / STEPS[8] / 2:.3g} at most"
                )
            worst = max(worst, float(shares.max()))
    return f"the largest error is {worst:.0%} of the bound"


def four(module: ModuleType) -> None:
    """4 bits: no group loses more than by the simple way"""
    for weight in _weights():
        for size in (32, 64):
            groups, back = weight.reshape(-1, size), _rounded(module, weight, 4, size).reshape(-1, size)
            for group, found, simple in zip(groups, back, _simple(groups, 4), strict=True):
                mine, theirs = _error(found, group), _error(simple, group)
                if not mine <= theirs + 10 * ROUNDING:
                    was, came = shown(group[:4].tolist()), shown(found[:4].tolist())
                    raise Failed(
                        f"4 bits: the group of {size} weights {was} and so on became {came}, an error of {mine:.2%} of "
                        f"its size; the simple way has {theirs:.2%}"
                    )


def zeros(module: ModuleType) -> None:
    """a group of zeros gives zeros"""
    for bits in (8, 4):
        weight = _normal(2, 64)
        weight[0, 32:] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            back = _rounded(module, weight, bits, 32)
        if not np.isfinite(back).all() or back[0, 32:].any():
            raise Failed(f"{bits} bits: a group of 32 zeros came back as {back[0, 32:36].tolist()}...; expected zeros")


def exact(module: ModuleType) -> None:
    """what lies on the grid comes back as it was"""
    for bits, most in ((8, 127), (4, 7)):
        whole = np.random.default_rng(1).integers(-most, most + 1, (4, 64))
        whole[:, ::32] = most
        weight = (whole * 0.125).astype(np.float32)
        back = _rounded(module, weight, bits, 32)
        if not np.allclose(back, weight, rtol=ROUNDING, atol=0):
            place = np.unravel_index(int(np.argmax(np.abs(back - weight))), weight.shape)
            raise Failed(
                f"{bits} bits: multiples of 0.125 up to {most / 8:g}: {weight[place]:g} became {back[place]:g}"
            )


def apart(module: ModuleType) -> None:
    """a large weight harms its own group alone"""
    weight = _normal(2, 128)
    before = _rounded(module, weight, 8, 32)
    changed = weight.copy()
    changed[1, 40] = 50.0
    after = _rounded(module, changed, 8, 32)
    same = before == after
    same[1, 32:64] = True
    if not same.all():
        row, column = (int(one[0]) for one in np.nonzero(~same))
        raise Failed(
            f"with weight[1, 40] = 50 and groups of 32, weight[{row}, {column}], of another group, became "
            f"{after[row, column]:.6g} and not {before[row, column]:.6g}"
        )


def loss(module: ModuleType) -> str:
    """the loss of normal weights, beside Quire's own rounding"""
    weight, lines = _normal(64, 512), [f"{'':18}{'yours':>9}{'Quire':>9}{'the simple way':>16}"]
    for bits, size in ((8, 64), (4, 64), (4, 32)):
        mine = _error(_rounded(module, weight, bits, size), weight)
        theirs = _error(dequantized(ours(weight, QuantSpec("int8_groups" if bits == 8 else "int4", size))), weight)
        simple = _error(_simple(weight.reshape(-1, size), bits).reshape(weight.shape), weight)
        name = f"{bits} bits, groups {size}"
        lines.append(f"{name:18}{mine:>9.2%}{theirs:>9.2%}{simple:>16.2%}")
        if not mine <= 1.01 * simple:
            raise Failed(f"{name}: an error of {mine:.2%} of the weights' size; the simple way has {simple:.2%}")
    table = "\n".join(lines)
    return f"error over the size of the weights (root of mean squares)\n{table}"


def _simple(groups: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Rounded to multiples of the largest magnitude over 127, or over 7; `groups [groups, size]`, none of zeros."""
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(STEPS[bits])
    rounded: NDArray[np.float32] = np.round(groups / scale) * scale
    return rounded


def _error(found: Any, weight: NDArray[np.float32]) -> float:
    exact = weight.astype(np.float64)
    return float(np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()))


CHECKS: tuple[Check, ...] = (eight, four, zeros, exact, apart, loss)
