"""Rounding weights to nearest: every provider gives the bits of the definition, and the error is what it should be."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.quantize_reference import dequantized, e4m3, quantize
from quire.ops.select import instruction_sets
from quire.ops.types import QuantSpec
from tests.ops.cases import normal

QUANTS = [QuantSpec("int8", None), QuantSpec("int4", 32), QuantSpec("int4", 64), QuantSpec("int4", 128)]
QUANTS += [QuantSpec("int8_groups", size) for size in (16, 32, 128)]
QUANTS += [QuantSpec("fp8_groups", size) for size in (16, 128)]
WITH_MINIMA = [QuantSpec("int4_min", size, half_scales=True) for size in (16, 32, 64, 128)]
WITH_MINIMA += [QuantSpec("int4_min", size) for size in (32, 128)]
SHAPES = [(1, 1), (3, 16), (5, 31), (17, 96), (33, 200), (40, 576), (0, 64), (4, 0)]


def restored(weight: Any) -> Any:
    """What the numbers stand for."""
    return dequantized(weight) if weight.values.size else weight.values.astype(np.float32)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("quant", QUANTS + WITH_MINIMA, ids=lambda one: f"{one.format}-{one.group_size}")
def test_every_instruction_set_gives_the_bits_of_the_definition(quant: QuantSpec, isa: str) -> None:
    rng, ops = np.random.default_rng(3), CpuOps(3, isa)
    for shape in SHAPES:
        weight = normal(rng, *shape) * np.float32(0.05)
        weight[::3] *= rng.standard_normal((len(weight[::3]), 1), dtype=np.float32) ** 9
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            stored = weight.astype(dtype)
            ours, expected = ops.quantize(stored, quant), quantize(stored, quant)
            assert ours.values.dtype == expected.values.dtype and ours.values.tobytes() == expected.values.tobytes()
            assert np.array_equal(ours.scales, expected.scales)
            assert (ours.minima is None) == (expected.minima is None) == (quant.format != "int4_min")
            assert ours.minima is None or np.array_equal(ours.minima, expected.minima)
            assert (ours.format, ours.group_size) == (expected.format, expected.group_size)


@pytest.mark.parametrize("quant", QUANTS, ids=lambda one: f"{one.format}-{one.group_size}")
@pytest.mark.parametrize("large", [0.0, 1e-38, 1e-31, 1e-20, 1.0, 1e30, 3e38])
def test_weights_of_any_size(quant: QuantSpec, large: float) -> None:
    weight = normal(np.random.default_rng(1), 8, 256)
    weight = weight / np.abs(weight).max() * np.float32(large)
    weight[2], weight[3, :128], weight[4, 7] = 0.0, 0.0, large
    ops = CpuOps(1, instruction_sets()[-1])
    ours, expected = ops.quantize(weight, quant), quantize(weight, quant)
    assert ours.values.tobytes() == expected.values.tobytes() and np.array_equal(ours.scales, expected.scales)
    assert np.isfinite(ours.scales).all()
    # The end without a +8 may be clipped; a number of e4m3 near the largest is off by half of 32 of 448.
    bound = {"int4": 1.6 / 8.5, "fp8_groups": 16.01 / 448}.get(quant.format, 0.5001 / 127)
    assert (np.abs(restored(ours) - weight) <= bound * np.abs(weight).max(axis=1, keepdims=True) + 1e-30).all()


def test_the_error_is_that_of_the_format() -> None:
    """Root mean square error over that of the weights, normal ones: stated in the documentation."""
    weight = normal(np.random.default_rng(0), 256, 512)
    errors = {}
    for quant in QUANTS + WITH_MINIMA:
        difference = restored(quantize(weight, quant)) - weight
        errors[quant.format, quant.group_size] = float(np.sqrt((difference**2).sum() / (weight**2).sum()))
    assert errors["int8", None] < 0.0078
    assert errors["int8_groups", 128] < 0.0065 and errors["int8_groups", 32] < 0.0055
    assert errors["fp8_groups", 128] < 0.027 and errors["fp8_groups", 16] < 0.027
    assert errors["int4", 32] < 0.082
    assert errors["int4", 64] < 0.092
    assert errors["int4", 128] < 0.099
    assert errors["int4_min", 32] < 0.0735 and errors["int4_min", 64] < 0.085 and errors["int4_min", 128] < 0.094
    plain = np.abs(weight.reshape(-1, 64)).max(axis=1, keepdims=True) / 7
    difference = np.rint(weight.reshape(-1, 64) / plain) * plain - weight.reshape(-1, 64)
    assert errors["int4", 64] < 0.86 * float(np.sqrt((difference**2).sum() / (weight**2).sum()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", QUANTS[:2], ids=lambda one: one.format)
def test_weights_that_are_not_finite_are_refused(quant: QuantSpec, value: float) -> None:
    weight = np.ones((20, 70), np.float32)
    weight[13, 69] = value
    for round_it in (quantize, CpuOps(2, instruction_sets()[-1]).quantize):
        with pytest.raises(ValueError, match="not finite"):
            round_it(weight, quant)


def test_fp8_uses_the_whole_range_of_e4m3() -> None:
    """The largest of a row becomes 448; of three bits of mantissa, the error is at most half of the last."""
    weight = normal(np.random.default_rng(4), 50, 300) * np.float32(0.05)
    rounded = quantize(weight, QuantSpec("fp8", None))
    values = rounded.values.astype(np.float32)
    assert np.array_equal(np.abs(values).max(axis=1), np.full(50, 448.0))
    assert np.array_equal(rounded.scales, np.abs(weight).max(axis=1, keepdims=True) / np.float32(448))
    nearest = (weight / rounded.scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert (np.abs(values * rounded.scales - weight) <= np.abs(weight) / 16 + rounded.scales * 2.0**-10).all()
    assert (values == nearest).mean() > 0.999  # a product with the reciprocal may fall on the other side of a tie
    assert np.array_equal(e4m3(np.float32([500.0, -1e9, 448.0])).astype(np.float32), [448, -448, 448])


def test_quantisations_that_do_not_exist() -> None:
    for arguments in (("int8", 64), ("int4", None), ("int4", 48), ("int3", 32), ("int8_groups", None)):
        with pytest.raises(ValueError, match="no quantisation"):
            QuantSpec(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scales of 'int4' are float32"):
        QuantSpec("int4", 32, half_scales=True)
    for unmade in (QuantSpec("int8_min", 32), QuantSpec("int8_groups", 32, half_scales=True)):
        for round_it in (quantize, CpuOps(1, instruction_sets()[-1]).quantize):
            with pytest.raises(ValueError, match="weights are not rounded to"):
                round_it(np.ones((2, 64), np.float32), unmade)


@pytest.mark.parametrize("quant", WITH_MINIMA, ids=lambda one: f"{one.group_size}")
def test_minima_keep_what_lies_on_a_grid_and_far_from_zero(quant: QuantSpec) -> None:
    """Groups that use both ends of 16 even steps from a minimum lose nothing but the rounding to float16; one that is
    all alike loses nothing else either."""
    rng, size = np.random.default_rng(4), quant.group_size or 0
    numbers = rng.integers(0, 16, (6, 3, size))
    numbers[..., 0], numbers[..., -1] = 0, 15
    scales, minima = (rng.uniform(*span, (6, 3, 1)).astype(np.float16) for span in ((0.01, 0.02), (0.5, 1.0)))
    weight = (numbers * scales.astype(np.float32) + minima.astype(np.float32)).reshape(6, -1).astype(np.float32)
    weight[5] = 0.75
    found = quantize(weight, quant)
    assert np.abs(dequantized(found) - weight).max() < 1e-3
    assert np.array_equal(found.values[:5].reshape(5, 3, -1), numbers[:5])
    assert np.array_equal(dequantized(quantize(weight, QuantSpec("int4_min", size)))[5], weight[5])


@pytest.mark.parametrize("inputs", [33, 40, 63])
@pytest.mark.parametrize("middle", [0.0, 0.75, -1000.0])
def test_what_fills_up_a_last_group_is_no_part_of_it(inputs: int, middle: float) -> None:
    """Few weights in a group are fitted the better; far from zero sums do not cancel."""
    weight = np.float32(middle) + normal(np.random.default_rng(6), 64, inputs) * np.float32(0.01)
    difference = dequantized(quantize(weight, QuantSpec("int4_min", 32))) - weight
    whole, rest = (float(np.sqrt((part**2).mean())) / 0.01 for part in (difference[:, :32], difference[:, 32:]))
    assert rest < 1.1 * whole and whole < 0.08 + 1e-6 * abs(middle) / 0.01


def test_minima_that_float16_cannot_be_are_refused() -> None:
    weight = np.full((2, 64), 1e5, np.float32)
    for round_it in (quantize, CpuOps(1, instruction_sets()[-1]).quantize):
        with pytest.raises(ValueError, match="larger than groups with minima can hold"):
            round_it(weight, WITH_MINIMA[1])
    assert dequantized(quantize(weight, QuantSpec("int4_min", 64))).min() == np.float32(1e5)


@pytest.mark.filterwarnings("error")
def test_weights_too_small_and_too_large_for_float16() -> None:
    """Where a scale would be zero the group is its mean, which is no worse than zeros; and no sum overflows."""
    weight = normal(np.random.default_rng(7), 16, 256) * np.float32(1e-7)
    for quant in WITH_MINIMA:
        difference = dequantized(quantize(weight, quant)) - weight
        assert (difference**2).sum() < (weight**2).sum()
        native = CpuOps(1, instruction_sets()[-1]).quantize
        assert np.array_equal(native(weight, quant).minima, quantize(weight, quant).minima)
        for round_it in (quantize, native):
            with pytest.raises(ValueError, match="larger than groups with minima can hold"):
                round_it(weight * np.float32(1e30), quant)
