from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from tests.ops.cases import normal, relative_error

REFERENCE = ReferenceOps(np)
STORAGES = ["bfloat16", "float16", "float32"]
# out, in: one element; one less and one more than a tile; not whole panels; whole panels; deeper than one piece of a
# blocked product
WEIGHTS = [(1, 1), (31, 15), (33, 65), (70, 33), (64, 576), (130, 600), (70, 1231)]


def in_tiles(name: str) -> bool:
    """Whether an instruction set, or its provider, multiplies pairs of bfloat16, with weights of bfloat16 in tiles."""
    return "amx" in name or "avx512_bf16" in name


def inputs_of_gemms(cpu: CpuOps, storage: str, x: Any) -> Any:
    """`x` as GEMMs of pairs see it: the definition of `linear` allows that rounding, and no other error."""
    rounds = in_tiles(cpu.name) and storage == "bfloat16"
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if rounds else x


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", WEIGHTS)
def test_linear_embed_and_logits_equal_the_reference(cpu: CpuOps, storage: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weight, bias = normal(rng, *shape), normal(rng, shape[0])
    packed, expected = cpu.pack_linear(weight, bias, storage), REFERENCE.pack_linear(weight, bias, storage)
    x = normal(rng, 200, shape[1])
    seen = inputs_of_gemms(cpu, storage, x)
    defined = REFERENCE.linear(seen, expected)
    for rows in (*range(41), 200):
        assert relative_error(cpu.linear(x[:rows], packed), defined[:rows]) < 2e-5, rows
    logits = cpu.logits(x, packed, 0.5, 30.0)
    assert relative_error(logits, REFERENCE.logits(seen, expected, 0.5, 30.0)) < 2e-5
    ids = rng.integers(0, shape[0], 9).astype(np.int32)
    assert np.array_equal(cpu.embed(ids, packed, 1.5), REFERENCE.embed(ids, expected, 1.5))


@pytest.mark.parametrize("storage", STORAGES)
def test_rounded_inputs_stay_within_the_bound_of_the_definition(cpu: CpuOps, storage: str) -> None:
    rng = np.random.default_rng(7)
    weight, x = normal(rng, 40, 900), normal(rng, 20, 900) * np.exp(3 * normal(rng, 20, 900))
    expected = REFERENCE.pack_linear(weight, None, storage)
    exact = x.astype(np.float64) @ expected.weight.T
    bound = 2.0**-8 * (np.abs(x) @ np.abs(expected.weight).T) + 2e-5 * np.abs(exact).max()
    assert (np.abs(cpu.linear(x, cpu.pack_linear(weight, None, storage)) - exact) <= bound).all()


def test_rounding_keeps_ties_infinities_and_nan(cpu: CpuOps) -> None:
    one = np.float32(1)
    ties = one + np.array([2.0**-8, 3 * 2.0**-8, 2.0**-8 + 2.0**-20], np.float32)
    x = np.array([*ties, -ties[0], np.inf, -np.inf, np.nan, -0.0, 3.0e38], np.float32)[:, None]
    y = cpu.linear(x, cpu.pack_linear(np.ones((1, 1), np.float32), None, "bfloat16"))
    assert np.array_equal(y, inputs_of_gemms(cpu, "bfloat16", x), equal_nan=True)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(130, 600), (33, 1500)])
def test_a_row_has_the_same_bits_in_any_company(cpu: CpuOps, storage: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    weight, bias, x = normal(rng, *shape), normal(rng, shape[0]), normal(rng, 600, shape[1])
    for packed in (cpu.pack_linear(weight, None, storage), cpu.pack_linear(weight, bias, storage)):
        alone = np.concatenate([cpu.linear(x[row : row + 1], packed) for row in range(100)])
        whole = cpu.linear(x, packed)
        assert np.array_equal(whole[:100], alone)
        for rows in (*range(2, 71), 192, 193, 511, 512, 513):
            assert np.array_equal(cpu.linear(x[:rows], packed), whole[:rows]), rows
        assert np.array_equal(cpu.linear(x[17:50], packed), whole[17:50])


@pytest.mark.parametrize("shape", [(40, 4200), (576, 2600)])
def test_a_row_has_the_same_bits_where_inputs_do_not_fit_the_cache(cpu: CpuOps, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(10)
    packed, x = cpu.pack_linear(normal(rng, *shape), None, "bfloat16"), normal(rng, 300, shape[1])
    whole = cpu.linear(x, packed)
    for first, last in ((0, 1), (31, 64), (50, 151), (299, 300)):
        assert np.array_equal(cpu.linear(x[first:last], packed), whole[first:last])


def test_a_row_is_not_touched_by_broken_companions(cpu: CpuOps) -> None:
    rng = np.random.default_rng(8)
    packed = cpu.pack_linear(normal(rng, 70, 40), None, "bfloat16")
    x = normal(rng, 40, 40)
    expected = cpu.linear(x, packed)
    for broken in (np.nan, np.inf):
        x[::2] = broken
        assert np.array_equal(cpu.linear(x, packed)[1::2], expected[1::2])


@pytest.mark.parametrize("isa", instruction_sets())
def test_threads_do_not_change_bits(isa: str) -> None:
    rng = np.random.default_rng(3)
    weight, x = normal(rng, 520, 300), normal(rng, 70, 300)
    results: dict[tuple[str, int], list[Any]] = {}
    for threads in (1, 2, 3, 8):
        ops = CpuOps(threads, isa)
        for storage in STORAGES:
            packed = ops.pack_linear(weight, None, storage)
            for rows in (1, 16, 33, 70):
                results.setdefault((storage, rows), []).append(ops.linear(x[:rows], packed))
    assert all(np.array_equal(result, same[0]) for same in results.values() for result in same)


def test_a_weight_packed_for_another_instruction_set_is_refused() -> None:
    providers = [CpuOps(1, isa) for isa in instruction_sets()]
    weight, x = np.ones((40, 40), np.float32), np.ones((2, 40), np.float32)
    for packer in providers:
        for user in providers:
            packed = packer.pack_linear(weight, None, "bfloat16")
            if in_tiles(packer.name) == in_tiles(user.name):
                assert (user.linear(x, packed) == 40).all()
            else:
                for call in (lambda: user.linear(x, packed), lambda: user.embed(np.zeros(1, np.int32), packed)):  # noqa: B023
                    with pytest.raises(ValueError, match="another instruction set"):
                        call()


def test_memory_next_to_the_result_is_not_written(cpu: CpuOps) -> None:
    rng = np.random.default_rng(9)
    for out, rows in ((31, 1), (33, 17), (64, 40), (70, 16)):
        packed = cpu.pack_linear(normal(rng, out, 40), None, "bfloat16")
        memory = np.full((rows + 2, out), 7, np.float32)
        cpu._native.linear(normal(rng, rows, 40), packed, memory[1:-1], 1.0, 0.0, False)
        assert (memory[0] == 7).all() and (memory[-1] == 7).all()


def test_weights_of_any_type_round_like_the_reference(cpu: CpuOps) -> None:
    rng = np.random.default_rng(4)
    special = np.array([[np.inf, -np.inf, 1e-7, 6e-8, 65504.0, 70000.0, -0.0, 1e-40]], np.float32)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        weight = normal(rng, 9, 8).astype(dtype)
        with np.errstate(over="ignore"):
            weight[:1] = special.astype(dtype)
            for storage in STORAGES:
                rows = np.arange(9, dtype=np.int32)
                actual = cpu.embed(rows, cpu.pack_embedding(weight, storage))
                expected = REFERENCE.embed(rows, REFERENCE.pack_embedding(weight, storage))
                assert np.array_equal(actual, expected)


def test_weights_of_many_rows_are_converted_to_the_last(cpu: CpuOps) -> None:
    weight, rows = normal(np.random.default_rng(11), 700, 4), np.arange(700, dtype=np.int32)
    for storage, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        assert np.array_equal(
            cpu.embed(rows, cpu.pack_embedding(weight, storage)), weight.astype(dtype).astype(np.float32)
        )


def test_a_strided_weight_and_input_are_read_as_they_lie(cpu: CpuOps) -> None:
    rng = np.random.default_rng(5)
    wide = normal(rng, 50, 90)
    weight, x = wide[:, 10:40], normal(rng, 7, 100)[:, 20:50]
    packed = cpu.pack_linear(weight, None, "float32")
    assert relative_error(cpu.linear(x, packed), x @ weight.T) < 2e-5
    transposed = cpu.pack_linear(np.ascontiguousarray(weight.T).T, None, "float32")
    assert np.array_equal(cpu.linear(x, transposed), cpu.linear(x, packed))


def test_an_embedding_serves_as_a_tied_head(cpu: CpuOps) -> None:
    rng = np.random.default_rng(6)
    table, x = normal(rng, 77, 24), normal(rng, 3, 24)
    for storage in STORAGES:
        packed = cpu.pack_embedding(table, storage)
        rounded = cpu.embed(np.arange(77, dtype=np.int32), packed)
        expected = inputs_of_gemms(cpu, storage, x) @ rounded.T
        assert relative_error(cpu.logits(x, packed), expected) < 2e-5
