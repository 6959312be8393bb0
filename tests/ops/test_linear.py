import ml_dtypes
import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from tests.ops.cases import normal, relative_error

REFERENCE = ReferenceOps(np)
STORAGES = ["bfloat16", "float16", "float32"]
# out, in: one element; not whole panels; whole panels; deeper than one piece of a blocked product
WEIGHTS = [(1, 1), (70, 33), (64, 576), (130, 600)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", WEIGHTS)
def test_linear_embed_and_logits_equal_the_reference(cpu: CpuOps, storage: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weight, bias = normal(rng, *shape), normal(rng, shape[0])
    packed, expected = cpu.pack_linear(weight, bias, storage), REFERENCE.pack_linear(weight, bias, storage)
    for rows in (0, 1, 2, 5, 6, 7, 12, 13, 31, 200):
        x = normal(rng, rows, shape[1])
        assert relative_error(cpu.linear(x, packed), REFERENCE.linear(x, expected)) < 2e-5
    logits = cpu.logits(x, packed, 0.5, 30.0)
    assert relative_error(logits, REFERENCE.logits(x, expected, 0.5, 30.0)) < 2e-5
    ids = rng.integers(0, shape[0], 9).astype(np.int32)
    assert np.array_equal(cpu.embed(ids, packed, 1.5), REFERENCE.embed(ids, expected, 1.5))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_has_the_same_bits_in_any_company(cpu: CpuOps, storage: str) -> None:
    rng = np.random.default_rng(2)
    packed = cpu.pack_linear(normal(rng, 130, 600), normal(rng, 130), storage)
    x = normal(rng, 400, 600)
    alone = np.concatenate([cpu.linear(x[row : row + 1], packed) for row in range(400)])
    for rows in (2, 3, 4, 5, 6, 7, 11, 12, 13, 17, 64, 192, 193, 400):
        assert np.array_equal(cpu.linear(x[:rows], packed), alone[:rows]), rows
    assert np.array_equal(cpu.linear(x[17:50], packed), alone[17:50])


@pytest.mark.parametrize("isa", instruction_sets())
def test_threads_do_not_change_bits(isa: str) -> None:
    rng = np.random.default_rng(3)
    weight, x = normal(rng, 520, 300), normal(rng, 33, 300)
    results = []
    for threads in (1, 2, 3, 8):
        ops = CpuOps(threads, isa)
        results.append(ops.linear(x, ops.pack_linear(weight, None, "bfloat16")))
    assert all(np.array_equal(result, results[0]) for result in results)


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
    assert relative_error(cpu.logits(x, cpu.pack_embedding(table, "float32")), x @ table.T) < 2e-5
