"""Weights in small integers: the definition here, the kernels against it."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import ACTIVATION_QMAX, E4M3_FORMATS, FORMATS, HALF_SCALES, QuantizedFormat, QuantizedWeight
from tests.ops.cases import normal, relative_error

REFERENCE = ReferenceOps(np)
KINDS = CpuOps.formats
INTEGERS = [kind for kind in KINDS if kind not in E4M3_FORMATS]


def random_weight(rng: np.random.Generator, kind: QuantizedFormat, out: int, size: int, group: int) -> QuantizedWeight:
    """All values of the range, scales of very different size; in float16 with groups of 64, where they may be."""
    stated = FORMATS[kind]
    group = group if stated.group_sizes else size
    values = rng.integers(stated.low, stated.high + 1, (out, size)).astype(np.int8)
    if kind in E4M3_FORMATS:
        values = np.where(values & 0x7F == 0x7F, 0x40, values).astype(np.int8).view(ml_dtypes.float8_e4m3fn)
    dtype, groups = np.float16 if kind in HALF_SCALES and group == 64 else np.float32, -(-size // group) if size else 0
    scales = np.exp(normal(rng, out, groups)).astype(dtype)
    minima = (scales.astype(np.float32) * normal(rng, out, groups) * 20).astype(dtype) if stated.has_minima else None
    return QuantizedWeight(kind, values, scales, group, minima)


def by_definition(x: Any, weight: QuantizedWeight) -> Any:
    """The formula of `QuantizedWeight`, group by group, in Python integers and float64."""
    out, size = weight.values.shape
    levels = ACTIVATION_QMAX[weight.format]
    y = np.zeros((x.shape[0], out))
    for t, row in enumerate(x):
        absmax = np.abs(row).max()
        q = np.rint(row * (np.float32(levels) / absmax)).astype(np.int64)
        for group, first in enumerate(range(0, size, weight.group_size)):
            inside = slice(first, first + weight.group_size)
            sums = weight.values[:, inside].astype(np.int64) @ q[inside]
            y[t] += weight.scales[:, group].astype(np.float64) * sums
            if weight.minima is not None:
                y[t] += weight.minima[:, group].astype(np.float64) * q[inside].sum()
        y[t] *= float(absmax) / levels
    return y


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_reference_computes_the_formula(kind: QuantizedFormat, group: int) -> None:
    rng = np.random.default_rng(1)
    weight, x = random_weight(rng, kind, 9, 200, group), normal(rng, 5, 200)
    packed = REFERENCE.pack_linear(weight, None, "bfloat16")
    assert relative_error(REFERENCE.linear(x, packed), by_definition(x, weight)) < 2e-6
    rows = REFERENCE.embed(np.array([3, 0]), REFERENCE.pack_embedding(weight, "bfloat16"), 2.0)
    first = weight.values[3, :32].astype(np.float32) * weight.scales[3, 0].astype(np.float32)
    first = (first if weight.minima is None else first + weight.minima[3, 0].astype(np.float32)) * np.float32(2)
    assert np.array_equal(rows[0, :32], first)


def test_rounded_inputs_are_as_near_as_stated() -> None:
    rng = np.random.default_rng(2)
    x = normal(rng, 4, 300) * np.float32(100)
    for levels in (127, 32639):
        q, step = REFERENCE.quantize_activations(x, levels)
        assert np.abs(q).max() == levels and np.array_equal(q, np.rint(q))
        assert np.abs(q * step - x).max() <= np.abs(x).max() / levels * 0.5001
    q, step = REFERENCE.quantize_activations(np.array([[0, 0], [1e-38, 0], [np.inf, 1], [np.nan, 1]], np.float32), 127)
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
        lambda: QuantizedWeight("int8_groups", values, scales, 96),
        lambda: QuantizedWeight("int8_groups", values, scales.astype(np.float64), 64),
        lambda: QuantizedWeight("int8_groups", values, scales, 64, scales),
        lambda: QuantizedWeight("int4", values, scales.astype(np.float16), 64),
        lambda: QuantizedWeight("int4_min", values, scales, 64),
        lambda: QuantizedWeight("int4_min", values, scales, 64, scales[:3]),
        lambda: QuantizedWeight("int4_min", values, scales, 64, scales.astype(np.float16)),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            wrong()


@pytest.mark.parametrize("kind", ["int4", "int8_groups", "int4_min", "int8_min"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_a_product_is_that_of_float64_with_the_weights_to_its_roundings(isa: str, kind: QuantizedFormat) -> None:
    """A group's two terms are rounded once each with what came before: `(2 groups + 3) 2^-24` of their magnitudes."""
    rng, ops = np.random.default_rng(11), CpuOps(2, isa)
    for group in FORMATS[kind].group_sizes:
        weight, x = random_weight(rng, kind, 37, 300, group), normal(rng, 9, 300)
        scales, minima = (
            np.zeros((37, 300)) if one is None else np.repeat(one, group, axis=1)[:, :300].astype(np.float64)
            for one in (weight.scales, weight.minima)
        )
        step = np.abs(x).max(axis=1, keepdims=True) / np.float32(32639)
        q = np.rint(x * (np.float32(32639) / np.abs(x).max(axis=1, keepdims=True))).astype(np.float64)
        expected = q @ (weight.values * scales + minima).T * step
        starts = range(0, 300, group)
        terms = sum(
            np.abs(q[:, i : i + group] @ part[:, i : i + group].T)
            for part in (weight.values * scales, minima)
            for i in starts
        )
        y = ops.linear(x, ops.pack_linear(weight, None, "float32"))
        assert (np.abs(y - expected) <= (2 * len(starts) + 3) * 2.0**-24 * terms * step).all(), group


SHAPES = [(1, 1, 32), (31, 15, 64), (33, 65, 32), (70, 200, 64), (64, 576, 64), (130, 600, 128), (70, 1231, 32)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_embed_and_logits_equal_the_reference(
    cpu: CpuOps, kind: QuantizedFormat, shape: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(3)
    weight, bias = random_weight(rng, kind, *shape), normal(rng, shape[0])
    packed, expected = cpu.pack_linear(weight, bias, "bfloat16"), REFERENCE.pack_linear(weight, bias, "bfloat16")
    x = normal(rng, 200, shape[1]) * np.exp(3 * normal(rng, 200, 1))
    defined = REFERENCE.linear(x, expected)
    for rows in (*range(41), 200):
        actual = cpu.linear(x[:rows], packed)
        assert relative_error(actual, defined[:rows]) < 2e-5, rows
    assert relative_error(cpu.linear(x[5:6], packed), defined[5:6]) < 2e-5
    largest = np.abs(defined).max()
    logits = cpu.logits(x, packed, 3 / largest, 2.0)
    assert relative_error(logits, REFERENCE.logits(x, expected, 3 / largest, 2.0)) < 4e-5
    ids = rng.integers(0, shape[0], 9).astype(np.int32)
    assert np.array_equal(cpu.embed(ids, packed, 1.5), REFERENCE.embed(ids, expected, 1.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(130, 600, 64), (33, 2900, 128), (70, 96, 32)])
def test_a_row_has_the_same_bits_in_any_company(
    cpu: CpuOps, kind: QuantizedFormat, shape: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(4)
    weight, bias, x = random_weight(rng, kind, *shape), normal(rng, shape[0]), normal(rng, 600, shape[1])
    packed = cpu.pack_linear(weight, bias, "bfloat16")
    whole = cpu.linear(x, packed)
    alone = np.concatenate([cpu.linear(x[row : row + 1], packed) for row in range(100)])
    assert np.array_equal(whole[:100], alone)
    for rows in (*range(2, 40), 64, 65, 192, 255, 256, 257, 511, 512, 513):
        assert np.array_equal(cpu.linear(x[:rows], packed), whole[:rows]), rows
    assert np.array_equal(cpu.linear(x[17:50], packed), whole[17:50])


@pytest.mark.parametrize("isa", instruction_sets())
def test_threads_do_not_change_bits(isa: str) -> None:
    rng = np.random.default_rng(5)
    weights, x = [random_weight(rng, kind, 520, 320, 32) for kind in KINDS], normal(rng, 70, 320)
    results: dict[tuple[str, int], list[Any]] = {}
    for threads in range(1, 9):
        ops = CpuOps(threads, isa)
        for weight in weights:
            packed = ops.pack_linear(weight, None, "bfloat16")
            for rows in (1, 3, 16, 33, 70):
                results.setdefault((weight.format, rows), []).append(ops.linear(x[:rows], packed))
    assert all(np.array_equal(result, same[0]) for same in results.values() for result in same)


def test_instruction_sets_agree_in_every_bit() -> None:
    """Sums of integers are exact, and what follows is the same everywhere but where a processor cannot fuse."""
    rng = np.random.default_rng(6)
    providers = [CpuOps(2, isa) for isa in instruction_sets()]
    x = normal(rng, 40, 700) * np.exp(2 * normal(rng, 40, 700))
    for kind in KINDS:
        weight = random_weight(rng, kind, 70, 700, 64)
        results = [ops.linear(x, ops.pack_linear(weight, None, "bfloat16")) for ops in providers]
        fused = results[1:] if FORMATS[kind].group_sizes else results
        assert all(np.array_equal(result, fused[0]) for result in fused)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_product_has_the_bits_of_its_parts(cpu: CpuOps, kind: QuantizedFormat) -> None:
    rng = np.random.default_rng(7)
    for width in (8, 96, 37):
        weight, bias = random_weight(rng, kind, 2 * width, 200, 64), normal(rng, 2 * width)
        gated, plain = cpu.pack_gated(weight, bias, "bfloat16"), cpu.pack_linear(weight, bias, "bfloat16")
        for rows in (1, 5, 40):
            x = normal(rng, rows, 200)
            parts = cpu.activation_multiply(cpu.linear(x, plain), "silu")
            assert np.array_equal(cpu.gated_linear(x, gated, "silu"), parts)


@pytest.mark.parametrize("kind", INTEGERS)
def test_broken_rows_are_nan_and_touch_no_other(cpu: CpuOps, kind: QuantizedFormat) -> None:
    rng = np.random.default_rng(8)
    packed, x = cpu.pack_linear(random_weight(rng, kind, 40, 70, 32), None, "bfloat16"), normal(rng, 40, 70)
    expected = cpu.linear(x, packed)
    for broken in (np.nan, np.inf, -np.inf):
        x[::2, 3] = broken
        for rows in (1, 3, 7, 40):
            y = cpu.linear(x[:rows], packed)
            assert np.isnan(y[::2]).all() and np.array_equal(y[1::2], expected[:rows][1::2])
    zeros = np.zeros((3, 70), np.float32)
    zeros[1] = 1e-38
    assert np.abs(cpu.linear(zeros, packed)).max() == 0


@pytest.mark.parametrize("kind", INTEGERS)
def test_the_largest_sums_are_exact(cpu: CpuOps, kind: QuantizedFormat) -> None:
    size, stated = 40000, FORMATS[kind]
    low, group = stated.low or stated.high, 128 if stated.group_sizes else size
    scales = np.ones((3, -(-size // group)), np.float32)
    minima = np.zeros_like(scales) if stated.has_minima else None
    weight = QuantizedWeight(kind, np.full((3, size), low, np.int8), scales, group, minima)
    x = np.ones((20, size), np.float32)
    levels = ACTIVATION_QMAX[kind]
    for rows in (1, 20):
        y = cpu.linear(x[:rows], cpu.pack_linear(weight, None, "bfloat16"))
        assert relative_error(y, np.full((rows, 3), float(low) * size * levels) / levels) < 1e-5


def test_the_kernels_refuse(cpu: CpuOps) -> None:
    values, scales = np.zeros((4, 96), np.int8), np.ones((4, 3), np.float32)
    values[2, 5] = 8
    with pytest.raises(ValueError, match="outside"):
        cpu.pack_linear(QuantizedWeight("int4", values, scales, 32), None, "bfloat16")
    wide = QuantizedWeight("int8", np.zeros((1, 2**17), np.int8), np.ones((1, 1), np.float32), 2**17)
    with pytest.raises(ValueError, match="inputs"):
        cpu.pack_linear(wide, None, "bfloat16")
    packed = cpu.pack_linear(QuantizedWeight("int8", values, scales[:, :1].copy(), 96), None, "bfloat16")
    for call in (
        lambda: cpu.linear(np.zeros((2, 95), np.float32), packed),
        lambda: cpu.embed(np.array([4], np.int32), packed),
        lambda: cpu.embed(np.array([-1], np.int32), packed),
        lambda: cpu.pack_linear(
            QuantizedWeight("int8", values, scales[:, :1].copy(), 96), np.zeros(3, np.float32), "bfloat16"
        ),
        lambda: cpu.gated_linear(np.zeros((2, 96), np.float32), packed, "silu"),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            call()


def test_no_rows_and_no_inputs(cpu: CpuOps) -> None:
    rng = np.random.default_rng(9)
    packed = cpu.pack_linear(random_weight(rng, "int4", 5, 40, 32), None, "bfloat16")
    assert cpu.linear(np.zeros((0, 40), np.float32), packed).shape == (0, 5)
    bias = normal(rng, 5)
    none = QuantizedWeight("int8", np.zeros((5, 0), np.int8), np.zeros((5, 0), np.float32), 0)
    packed = cpu.pack_linear(none, bias, "bfloat16")
    for rows in (1, 20):
        assert np.array_equal(cpu.linear(np.zeros((rows, 0), np.float32), packed), np.tile(bias, (rows, 1)))


def test_memory_next_to_the_result_is_not_written(cpu: CpuOps) -> None:
    rng = np.random.default_rng(10)
    for kind in KINDS:
        for out, rows in ((31, 1), (33, 17), (64, 40), (70, 16)):
            packed = cpu.pack_linear(random_weight(rng, kind, out, 40, 32), None, "bfloat16")
            memory = np.full((rows + 2, out), 7, np.float32)
            cpu._native.linear(normal(rng, rows, 40), packed, memory[1:-1], 1.0, 0.0, False)
            assert (memory[0] == 7).all() and (memory[-1] == 7).all()
