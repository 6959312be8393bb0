"""Weights of e4m3 on the CPU: every number of the format, against float64, in any company."""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import FORMATS, QuantizedWeight, QuantSpec
from tests.ops.cases import normal, relative_error
from tests.ops.test_quantized import random_weight

E4M3 = ml_dtypes.float8_e4m3fn
GROUPS = FORMATS["fp8_groups"].group_sizes


def in_float64(weight: QuantizedWeight) -> Any:
    """`[out, in]`: each number by its scale, exactly, by the rounding of ml_dtypes alone."""
    scales = np.repeat(weight.scales.astype(np.float64), weight.group_size, axis=1)
    return weight.values.astype(np.float64) * scales[:, : weight.values.shape[1]]


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_number_of_the_format_is_multiplied_as_it_is(isa: str) -> None:
    """254 numbers, subnormal ones and both zeros too, by a one: for one row, rows in registers and many rows."""
    numbers = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    values = np.concatenate([numbers, numbers[:2]]).reshape(2, 128).view(E4M3)
    scales = np.array([[1.7], [3e-5]], np.float32)
    ops, weight = CpuOps(1, isa), QuantizedWeight("fp8_groups", values, scales, 128)
    expected = (values.astype(np.float32) * scales).T
    packed, ones = ops.pack_linear(weight, None, "float32"), np.eye(128, dtype=np.float32)
    assert np.array_equal(ops.linear(ones, packed), expected)
    for rows in (1, 5):
        for first in range(0, 128 - rows, rows):
            found = ops.linear(ones[first : first + rows], packed)
            assert np.array_equal(found, expected[first : first + rows])
    table = ops.embed(np.array([1, 0], np.int32), ops.pack_embedding(weight, "float32"), 1.0)
    assert np.array_equal(table, (values.astype(np.float32) * scales)[[1, 0]])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("isa", instruction_sets())
def test_a_product_is_that_of_float64_with_the_weights_to_its_roundings(isa: str, group: int) -> None:
    """A rounding for each input of a group and two for each group, twice as many where a processor cannot fuse:
    `(2 group + 2 groups + 2) 2^-24` of the magnitudes of its terms."""
    rng, ops = np.random.default_rng(11), CpuOps(2, isa)
    for out, inputs in ((37, 300), (70, 1000), (1, 7)):
        weight, x = random_weight(rng, "fp8_groups", out, inputs, group), normal(rng, 40, inputs)
        exact = in_float64(weight)
        y, terms = ops.linear(x, ops.pack_linear(weight, None, "float32")), np.abs(x) @ np.abs(exact).T
        roundings = 2 * group + 2 * -(-inputs // group) + 2
        assert (np.abs(y - x.astype(np.float64) @ exact.T) <= roundings * 2.0**-24 * terms).all()


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_row_has_the_same_bits_however_many_there_are(isa: str) -> None:
    """Around each border of the kernel: 6 rows in registers, 128 in an item."""
    rng, ops = np.random.default_rng(4), CpuOps(3, isa)
    weight, bias, x = random_weight(rng, "fp8_groups", 130, 700, 128), normal(rng, 130), normal(rng, 300, 700)
    packed = ops.pack_linear(weight, bias, "float32")
    whole = ops.linear(x, packed)
    for rows in (*range(1, 15), 32, 33, 127, 128, 129, 257):
        assert np.array_equal(ops.linear(x[:rows], packed), whole[:rows]), rows
        assert np.array_equal(ops.linear(x[300 - rows :], packed), whole[300 - rows :]), rows


def test_a_broken_input_breaks_its_own_row_alone(cpu: CpuOps) -> None:
    rng = np.random.default_rng(8)
    weight = random_weight(rng, "fp8_groups", 40, 70, 32)
    weight.values.view(np.uint8)[weight.values.astype(np.float32) == 0] = 1
    packed, x = cpu.pack_linear(weight, None, "float32"), normal(rng, 40, 70)
    expected = cpu.linear(x, packed)
    for broken in (np.nan, np.inf, -np.inf):
        x[::2, 3] = broken
        for rows in (1, 3, 7, 40):
            y = cpu.linear(x[:rows], packed)
            assert not np.isfinite(y[::2]).any() and np.array_equal(y[1::2], expected[:rows][1::2])


def test_inputs_are_not_rounded(cpu: CpuOps) -> None:
    """Small inputs beside a large one: e4m3, or integers of the row's largest, would lose them."""
    rng = np.random.default_rng(3)
    x = normal(rng, 3, 256) * np.float32(1e-6)
    x[:, 0] = 1e6
    values = normal(rng, 64, 256).astype(E4M3)
    values[:, 0] = 0
    weight = QuantizedWeight("fp8_groups", values, np.ones((64, 2), np.float32), 128)
    exact = x.astype(np.float64) @ in_float64(weight).T
    assert relative_error(cpu.linear(x, cpu.pack_linear(weight, None, "float32")), exact) < 1e-6
    reference = ReferenceOps(np)
    assert relative_error(reference.linear(x, reference.pack_linear(weight, None, "float32")), exact) < 1e-6


def test_scales_of_any_size(cpu: CpuOps) -> None:
    """A weight of 1e-36 is a normal number of float32, and one of 1e38 a finite one."""
    values = np.full((3, 200), 448, E4M3)
    weight = QuantizedWeight("fp8_groups", values, np.array([[1e-38] * 2, [7e35] * 2, [0] * 2], np.float32), 128)
    x = np.zeros((9, 200), np.float32)
    x[:, [5, 150]] = 0.5
    y = cpu.linear(x, cpu.pack_linear(weight, None, "float32"))
    assert np.allclose(y, [448e-38, 448 * 7e35, 0], rtol=1e-5, atol=0)


def test_what_is_no_number_is_refused(cpu: CpuOps) -> None:
    for place, bits in itertools.product((0, 12799), (0x7F, 0xFF)):
        values = np.zeros((100, 128), np.uint8)
        values.flat[place] = bits
        weight = QuantizedWeight("fp8_groups", values.view(E4M3), np.ones((100, 1), np.float32), 128)
        for ops in (cpu, ReferenceOps(np)):
            with pytest.raises(ValueError, match=r"NaN|outside"):
                ops.pack_linear(weight, None, "float32")
    good = np.zeros((4, 64), E4M3)
    with pytest.raises(ValueError, match="not finite"):
        cpu.pack_linear(QuantizedWeight("fp8_groups", good, np.full((4, 1), np.inf, np.float32), 64), None, "float32")
    for wrong in (
        lambda: QuantizedWeight("fp8_groups", good.view(np.int8), np.ones((4, 1), np.float32), 64),
        lambda: QuantizedWeight("fp8_groups", good, np.ones((4, 1), np.float16), 64),
        lambda: QuantizedWeight("fp8_groups", good, np.ones((4, 1), np.float32), 48),
        lambda: QuantSpec("fp8_groups", None),
        lambda: QuantSpec("fp8_groups", 64, half_scales=True),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            wrong()


def test_the_native_side_refuses_e4m3_that_it_has_not(cpu: CpuOps) -> None:
    values, scales = np.zeros((4, 96), np.int8), np.ones((4, 3), np.float32)
    for stated in ((4, 32, 0, 4, False), (8, 96, 0, 4, False), (8, 32, 0, 2, False), (8, 32, 0, 4, True)):
        with pytest.raises(ValueError, match="no such weights of e4m3"):
            cpu._native.pack_integers(values, scales, None, None, stated, False)
