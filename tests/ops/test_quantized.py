"""Weights in small integers: the definition here, the kernels against it."""

from typing import Any

import numpy as np
import pytest

from quire.ops.reference import ReferenceOps
from quire.ops.types import INPUT_LEVELS, QuantizedFormat, QuantizedWeight
from tests.ops.cases import normal, relative_error

REFERENCE = ReferenceOps(np)
FORMATS: list[QuantizedFormat] = ["int8", "int8_w8a8", "int4", "int4_w4a8"]


def random_weight(rng: np.random.Generator, kind: QuantizedFormat, out: int, size: int, group: int) -> QuantizedWeight:
    """All values of the range, scales of very different size."""
    bits8 = kind.startswith("int8")
    group = size if bits8 else group
    low, high = (-127, 128) if bits8 else (-8, 8)
    values = rng.integers(low, high, (out, size)).astype(np.int8)
    scales = np.exp(normal(rng, out, -(-size // group) if size else 0))
    return QuantizedWeight(kind, values, scales, group)


def by_definition(x: Any, weight: QuantizedWeight) -> Any:
    """The formula of `QuantizedWeight`, group by group, in Python integers and float64."""
    out, size = weight.values.shape
    levels = INPUT_LEVELS[weight.format]
    y = np.zeros((x.shape[0], out))
    for t, row in enumerate(x):
        absmax = np.abs(row).max()
        q = np.rint(row * (np.float32(levels) / absmax)).astype(np.int64)
        for group, first in enumerate(range(0, size, weight.group_size)):
            inside = slice(first, first + weight.group_size)
            sums = weight.values[:, inside].astype(np.int64) @ q[inside]
            y[t] += weight.scales[:, group].astype(np.float64) * sums
        y[t] *= float(absmax) / levels
    return y


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_reference_computes_the_formula(kind: QuantizedFormat, group: int) -> None:
    rng = np.random.default_rng(1)
    weight, x = random_weight(rng, kind, 9, 200, group), normal(rng, 5, 200)
    packed = REFERENCE.pack_linear(weight, None, "bfloat16")
    assert relative_error(REFERENCE.linear(x, packed), by_definition(x, weight)) < 2e-6
    rows = REFERENCE.embed(np.array([3, 0]), REFERENCE.pack_embedding(weight, "bfloat16"), 2.0)
    first = weight.values[3, :32].astype(np.float32) * weight.scales[3, 0] * np.float32(2)
    assert np.array_equal(rows[0, :32], first)


def test_rounded_inputs_are_as_near_as_stated() -> None:
    rng = np.random.default_rng(2)
    x = normal(rng, 4, 300) * np.float32(100)
    for levels in (127, 32639):
        q, step = REFERENCE.round_inputs(x, levels)
        assert np.abs(q).max() == levels and np.array_equal(q, np.rint(q))
        assert np.abs(q * step - x).max() <= np.abs(x).max() / levels * 0.5001
    q, step = REFERENCE.round_inputs(np.array([[0, 0], [1e-38, 0], [np.inf, 1], [np.nan, 1]], np.float32), 127)
    assert np.array_equal(q, np.zeros((4, 2))) and np.isfinite(step[:2]).all() and np.isnan(step[2:]).all()


def test_wrong_weights_are_refused() -> None:
    values, scales = np.zeros((4, 96), np.int8), np.zeros((4, 2), np.float32)
    QuantizedWeight("int4", values, scales, 64)
    for wrong in (
        lambda: QuantizedWeight("int3", values, scales, 64),  # type: ignore[arg-type]
        lambda: QuantizedWeight("int4", values, scales, 48),
        lambda: QuantizedWeight("int4", values, scales[:, :1], 64),
        lambda: QuantizedWeight("int4", values, scales.astype(np.float64), 64),
        lambda: QuantizedWeight("int4", values.astype(np.int16), scales, 64),
        lambda: QuantizedWeight("int4", values.astype(np.uint8), scales, 64),
        lambda: QuantizedWeight("int4", values[0], scales, 64),
        lambda: QuantizedWeight("int8", values, scales, 64),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            wrong()
