"""Weights that are packed straight from their files give what the same weights in memory give, bit for bit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.quantize_reference import quantize
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import QuantSpec, StoredWeight, WeightDtype
from tests.ops.cases import normal

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
QUANTS = (QuantSpec("int8", None), QuantSpec("int8_w8a8", None), QuantSpec("int4", 32), QuantSpec("int4", 128))


@pytest.fixture(params=instruction_sets())
def cpu(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(2, request.param)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    files: list[Any] = []

    def make(weight: Any, borders: tuple[int, ...] = ()) -> StoredWeight:
        """In pieces of rows, each behind some other bytes, the last piece in a file of its own."""
        pieces = np.split(weight, borders)
        rows = []
        for i, piece in enumerate(pieces):
            if i in (0, len(pieces) - 1):
                files.append((tmp_path / str(len(files))).open("w+b"))
            files[-1].seek(0, 2)
            files[-1].write(b"?" * 3)
            rows.append((files[-1].fileno(), files[-1].tell(), len(piece)))
            files[-1].write(piece.tobytes())
            files[-1].flush()
        storage: WeightDtype = next(name for name in get_args(WeightDtype) if DTYPES[name] == weight.dtype)
        return StoredWeight(weight.shape, storage, tuple(rows), lambda: weight)

    yield make
    for file in files:
        file.close()


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize(
    ("out", "inputs", "borders"), [(1, 1, ()), (70, 45, (1, 33)), (200, 320, (64,)), (34, 6, (30,))]
)
def test_packed_from_files_is_packed_from_memory(
    storage: WeightDtype, out: int, inputs: int, borders: tuple[int, ...], cpu: CpuOps, store: Any
) -> None:
    rng = np.random.default_rng(out)
    weight = normal(rng, out, inputs).astype(DTYPES[storage])
    bias, x, stored = normal(rng, out), normal(rng, 5, inputs), store(weight, borders)
    for target in get_args(WeightDtype):
        expected = cpu.linear(x, cpu.pack_linear(weight, bias, target))
        assert np.array_equal(cpu.linear(x, cpu.pack_linear(stored, bias, target)), expected)
    for quant in QUANTS:
        expected = cpu.linear(x, cpu.pack_linear(quantize(weight, quant), bias, storage))
        assert np.array_equal(cpu.linear(x, cpu.pack_linear(cpu.quantize(stored, quant), bias, storage)), expected)
    if out % 2 == 0:
        expected = cpu.gated_linear(x, cpu.pack_gated(weight, bias, storage), "silu")
        assert np.array_equal(cpu.gated_linear(x, cpu.pack_gated(stored, bias, storage), "silu"), expected)


def test_many_items_of_work(store: Any) -> None:
    """More panels than one item of work takes, with each number of threads."""
    weight = normal(np.random.default_rng(0), 5000, 400).astype(ml_dtypes.bfloat16)
    stored, ids = store(weight, (2500,)), np.arange(5000, dtype=np.int32)
    for threads in (1, 3):
        ops = CpuOps(threads, instruction_sets()[-1])
        table = ops.embed(ids, ops.pack_embedding(stored, "bfloat16"))
        assert np.array_equal(table, weight.astype(np.float32))


def test_other_providers_read_the_array(store: Any) -> None:
    weight = normal(np.random.default_rng(0), 6, 4)
    packed = ReferenceOps(np).pack_linear(store(weight, (2,)), None, "float32")
    assert np.array_equal(packed.weight, weight)
    assert np.array_equal(
        ReferenceOps(np).quantize(store(weight), QUANTS[0]).values, quantize(weight, QUANTS[0]).values
    )


def test_a_file_that_ends_early_is_an_error(cpu: CpuOps, store: Any) -> None:
    stored = store(normal(np.random.default_rng(0), 300, 64))
    (descriptor, offset, rows), *_ = stored.files
    for files in (((descriptor, offset + 1, rows),), ((descriptor, 2**62, rows),), ((999_999, offset, rows),)):
        with pytest.raises(ValueError, match="its file ended or could not be read"):
            cpu.pack_linear(replace(stored, files=files), None, "float32")


def test_what_cannot_be_rounded_is_an_error(cpu: CpuOps, store: Any) -> None:
    weight = normal(np.random.default_rng(0), 300, 64)
    weight[299, 63] = np.inf
    for quant in QUANTS:
        with pytest.raises(ValueError, match="a weight is not finite"):
            cpu.pack_linear(cpu.quantize(store(weight), quant), None, "float32")


@pytest.mark.parametrize(
    "files", [((0, -1, 2),), ((0, 0, -1),), ((0, 2**63 - 8, 2),), ((0, 0, 2**40),), (("a", 0, 1),)]
)
def test_impossible_places_are_refused(files: Any, cpu: CpuOps) -> None:
    with pytest.raises(ValueError, match="pack:"):
        cpu.pack_linear(StoredWeight((2, 4), "float32", files, lambda: None), None, "float32")
