"""The arithmetic of calibration against numpy's float64, textbook GPTQ and exhaustive search."""

import itertools
from typing import Any

import numpy as np
import pytest

from quire.errors import ConfigurationError
from quire.ops.quantize_reference import dequantized, quantize
from quire.ops.types import QuantizedWeight, QuantSpec
from quire.quant.calibrate.budget import Choice, format_bytes, within_budget
from quire.quant.calibrate.cholesky import upper_factor
from quire.quant.calibrate.gptq import damped, gptq
from quire.quant.calibrate.smooth import channel_scales
from quire.quant.types import quantized_bytes


def gemm(x: Any, weight: Any) -> Any:
    return x @ weight.T


def hessian(inputs: int, seed: int = 0) -> Any:
    """Of inputs that depend on one another."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4 * inputs, inputs)) @ generator.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    return x.T @ x / len(x)


@pytest.mark.parametrize("size", [1, 5, 64, 65, 200])
def test_the_factor_is_numpys(size: int) -> None:
    matrix = damped(hessian(size))
    found = upper_factor(matrix.copy(), gemm)
    expected = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max() and not np.tril(found, -1).any()


def test_no_factor_of_what_is_not_positive_definite() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        upper_factor(np.diag([1.0, -1.0, 1.0]), gemm)


def textbook(weight: Any, matrix: Any, scale: Any) -> Any:
    """Algorithm 1 of arXiv 2210.17323, of a row with one scale, in float64: by the inverse's Cholesky factor."""
    inverse = np.linalg.cholesky(np.linalg.inv(matrix)).T
    left, found = weight.astype(np.float64).copy(), np.empty(weight.shape)
    for k in range(weight.shape[1]):
        found[:, k] = np.clip(np.rint(left[:, k] / scale), -127, 127)
        error = (left[:, k] - found[:, k] * scale) / inverse[k, k]
        left[:, k:] -= error[:, None] * inverse[k, k:]
    return found


def test_numbers_are_those_of_the_papers_algorithm() -> None:
    matrix, weight = hessian(150), np.random.default_rng(1).normal(size=(24, 150)).astype(np.float32)
    found = gptq(weight, matrix, QuantSpec("int8", None), gemm)
    expected = textbook(weight, damped(matrix), found.scales[:, 0].astype(np.float64))
    # A number at a tie may fall otherwise in float32, and what follows with it, by one.
    assert np.mean(found.values == expected) > 0.99 and np.abs(found.values - expected).max() <= 1


@pytest.mark.parametrize("inputs", [64, 100, 256])
@pytest.mark.parametrize(
    "quant",
    [
        QuantSpec("int8", None),
        QuantSpec("int8_groups", 64),
        QuantSpec("int4", 32),
        QuantSpec("int4", 128),
        QuantSpec("int4_min", 64, half_scales=True),
    ],
    ids=str,
)
def test_outputs_lose_less_than_by_rounding_to_nearest(quant: QuantSpec, inputs: int) -> None:
    matrix, weight = hessian(inputs), np.random.default_rng(2).normal(size=(48, inputs)).astype(np.float32)

    def loss(one: QuantizedWeight) -> float:
        error = weight - dequantized(one)
        return float(((error @ matrix) * error).sum())

    found = gptq(weight, matrix, quant, gemm)
    found.require_range()
    assert loss(found) < 0.75 * loss(quantize(weight, quant))


def test_rows_and_inputs_that_are_zero() -> None:
    matrix, weight = hessian(64), np.random.default_rng(3).normal(size=(8, 64)).astype(np.float32)
    weight[2] = 0
    matrix[5], matrix[:, 5] = 0, 0
    for quant in (QuantSpec("int8", None), QuantSpec("int4", 64), QuantSpec("int4_min", 64, half_scales=True)):
        found = dequantized(gptq(weight, matrix, quant, gemm))
        assert not found[2].any() and np.isfinite(found).all() and np.abs(found[:, 5] - weight[:, 5]).max() < 1
        assert np.isfinite(dequantized(gptq(weight, matrix * 0, quant, gemm))).all()
    matrix[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, matrix, QuantSpec("int4", 64), gemm)


def test_scales_of_channels_are_powers_of_two_and_flatten_what_is_large() -> None:
    inputs, weights = np.ones(64, np.float32), np.ones(64, np.float32)
    inputs[7], inputs[9], weights[11] = 64.0, 0.0, 0.0
    found = dict(channel_scales(inputs, weights))
    assert list(found) == [0.25, 0.5, 0.75]
    for alpha, scales in found.items():
        assert np.array_equal(np.exp2(np.rint(np.log2(scales))), scales)
        assert scales[7] == np.exp2(np.rint(6 * alpha)) and (np.delete(scales, 7) == 1).all()
    assert not list(channel_scales(np.ones(8, np.float32), np.ones(8, np.float32)))
    assert not list(channel_scales(np.zeros(8, np.float32), np.ones(8, np.float32)))


def test_the_budget_is_shared_nearly_as_well_as_can_be() -> None:
    """What is left over is less than one step: no choice at all that is smaller by one has less loss."""
    generator = np.random.default_rng(4)
    for _ in range(20):
        choices = {
            str(name): [Choice(None, 100 * bits, float(weight * 4.0**-bits)) for bits in (4, 5, 8)]
            for name, weight in enumerate(generator.exponential(size=6))
        }
        bits = float(generator.uniform(4, 8))
        found = within_budget(choices, 6 * 100 * 8, bits)
        used, loss = sum(one.num_bytes for one in found.values()), sum(one.loss for one in found.values())
        limit = 6 * 100 * bits
        assert used <= limit
        every = itertools.product(*choices.values())
        better = [those for those in every if sum(one.num_bytes for one in those) <= limit - 300]
        assert all(sum(one.loss for one in those) >= loss - 1e-15 for those in better)


def test_a_budget_below_the_smallest_formats_is_refused() -> None:
    choices = {"a": [Choice(QuantSpec("int4", 128), format_bytes(QuantSpec("int4", 128), 64, 128), 1.0)]}
    assert within_budget(choices, 64 * 128, 4.25)["a"] is choices["a"][0]
    with pytest.raises(ConfigurationError, match=r"bits is 4.2; the smallest formats take 4.250 a weight") as caught:
        within_budget(choices, 64 * 128, 4.2)
    assert caught.value.field == "bits"
    with pytest.raises(ConfigurationError):
        within_budget(choices, 64 * 128, 4.25, kept_bytes=1)
    assert format_bytes(None, 3, 5) == 30 and format_bytes(QuantSpec("int8", None), 3, 5) == quantized_bytes(
        QuantSpec("int8", None), 3, 5
    )
