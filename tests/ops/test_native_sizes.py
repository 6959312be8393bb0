"""Sizes that the native code cannot have are refused before they are used: numbers near the ends of their types, arrays
that are large without memory (of stride 0), results that do not lie in one piece."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import float8_e4m3fn

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, Ops, QuantizedWeight, RopeTables, StoredWeight

LARGE = 2**31 - 1


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def repeated(rows: int, row: Any) -> Any:
    """So many rows in the memory of one."""
    return np.lib.stride_tricks.as_strided(row, (rows, len(row)), (0, row.itemsize))


@pytest.mark.parametrize("start", [LARGE - 4, LARGE - 1, LARGE])
def test_positions_at_the_end_of_their_type(cpu: CpuOps, start: int) -> None:
    block_size = 2**20
    cache = cpu.make_cache(CacheShape(1, 1, block_size, 1, 8, "bfloat16"))
    batch = AttentionBatch(None, ints(0, 3), ints(start), np.zeros((1, 2**12), np.int32))
    rope = RopeTables(zeros(16, 4), zeros(16, 4))
    heads = zeros(3, 1, 8)
    with pytest.raises(ValueError, match="position"):
        cpu.attention(heads, heads, heads, cache, 0, batch, AttentionSpec(1.0), rope)
    if start > LARGE - 3:
        with pytest.raises(ValueError, match="position"):
            cpu.attention(heads, heads, heads, cache, 0, batch, AttentionSpec(1.0))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2**58, 2), (2**30, 2), (2**59, 0)], ids=str)
@pytest.mark.parametrize("quant", [None, (4, 32, 127, 4, False)], ids=str)
def test_weights_of_impossible_size(cpu: CpuOps, storage: str, shape: tuple[int, int], quant: Any) -> None:
    """Tiles of 2^58 rows of two would take 2^64 bytes, and that is 0."""
    weight = repeated(shape[0], np.zeros(shape[1], np.float32 if storage == "float32" else np.uint16))
    for gated in (False, True):
        with pytest.raises(ValueError, match="too large"):
            cpu._native.pack(weight, None, storage, gated, quant)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_weight_whose_bytes_cannot_be_counted(cpu: CpuOps, tmp_path: Path, quant: Any) -> None:
    """Each of its sizes is possible, and so are its bytes in the file; those of its panels are 2^63."""
    (tmp_path / "weight").write_bytes(b"")
    descriptor = os.open(tmp_path / "weight", os.O_RDONLY)
    size = LARGE - 1
    stored = StoredWeight((size, size), "bfloat16", ((descriptor, 0, size),), lambda: None)
    try:
        with pytest.raises(MemoryError):
            cpu.pack_linear(stored, None, "bfloat16")
    finally:
        os.close(descriptor)


def test_integers_of_impossible_size(cpu: CpuOps) -> None:
    values, scales = repeated(2**57, np.zeros(32, np.int8)), repeated(2**57, zeros(1))
    for bits in (4, 8):
        with pytest.raises(ValueError, match="too large"):
            cpu._native.pack_integers(values, scales, None, None, (bits, 32, 127, 4, False), False)
    weight = repeated(2**55, zeros(32))
    with pytest.raises(ValueError, match="too large"):
        cpu._native.quantize(weight, "float32", "int8", 32, repeated(2**55, np.zeros(32, np.int8)), scales)


def test_rows_of_impossible_number(cpu: CpuOps) -> None:
    """Of no outputs, so that the result takes no memory either."""
    x, none = repeated(2**55, zeros(32)), np.empty((2**55, 0), np.float32)
    packed = [cpu.pack_linear(zeros(0, 32), None, "bfloat16")]
    for bits in (4, 8):
        integers = np.zeros((0, 32), np.int8), zeros(0, 1)
        packed.append(cpu._native.pack_integers(*integers, None, None, (bits, 32, 32639, 4, False), False))
    for weight in packed:
        with pytest.raises(ValueError, match="too large"):
            cpu._native.linear(x, weight, none, 1.0, 0.0, False)


def test_a_rounding_that_is_none_is_refused(cpu: CpuOps) -> None:
    with pytest.raises(ValueError, match="rounding is not one of int8, int4, int4_min, int4_min_half, fp8"):
        cpu._native.quantize(zeros(1, 32), "float32", "int2", 32, np.zeros((1, 32), np.int8), zeros(1, 1))


@pytest.mark.parametrize(
    ("rounding", "size"),
    [("int4", 16), ("int4", 48), ("int4_min", 48), ("int4_min_half", 48), ("int4_min", 0), ("int8", 24)],
)
def test_groups_of_another_size_are_refused(cpu: CpuOps, rounding: str, size: int) -> None:
    """All inputs too, but where a row may have one scale."""
    scales = zeros(1, 2 if "min" in rounding else 1)
    with pytest.raises(ValueError, match="group_size is not one of"):
        cpu._native.quantize(zeros(1, 48), "float32", rounding, size, np.zeros((1, 48), np.int8), scales)


@pytest.mark.parametrize("rounding", ["int8", "int4", "int4_min", "int4_min_half", "fp8"])
def test_rows_without_inputs_have_no_scales(cpu: CpuOps, rounding: str) -> None:
    memory = np.full(6, 7, np.float32)
    scales = memory[2:2].reshape(3, 0)
    assert cpu._native.quantize(zeros(3, 0), "float32", rounding, 32, np.zeros((3, 0), np.int8), scales)
    assert (memory == 7).all()


def test_buffers_of_impossible_size(cpu: CpuOps) -> None:
    with pytest.raises(ValueError, match="arena"):
        cpu._native.program([(0, 4, False, False)], -1, 0, 0)
    with pytest.raises(ValueError, match="arena"):
        cpu._native.program([(0, 4, False, False)], 0, -1, 0)


@pytest.mark.parametrize("sizes", [(2**62, 4), (0, 2**62), (2**61, 2**61), (2**59, 4)], ids=str)
def test_a_program_whose_arena_cannot_be_counted(cpu: CpuOps, sizes: tuple[int, int]) -> None:
    program = cpu._native.program([(0, 4, False, False), (0, 4, False, True)], *sizes, 0)
    table = cpu.pack_embedding(zeros(3, 4), "float32")
    program.embed(False, table, 1.0, (0, 0, 1, 4))
    cache = cpu.make_cache(CacheShape(1, 1, 16, 1, 4, "float32"))
    with pytest.raises(MemoryError):
        program.run(ints(0), ints(0), ints(0, 1), ints(0), np.zeros((1, 1), np.int32), None, cache, zeros(1, 4))


def backwards(*shape: int) -> Any:
    """A view of whole rows, the last one first."""
    return zeros(*shape)[::-1]


def test_results_lie_in_one_piece(cpu: CpuOps) -> None:
    native, packed = cpu._native, cpu.pack_linear(zeros(8, 4), None, "float32")
    x = zeros(3, 4)
    cache = cpu.make_cache(CacheShape(1, 1, 16, 1, 8, "float32"))
    heads, rows = zeros(3, 1, 8), (ints(0, 3), ints(0), np.zeros((1, 1), np.int32))
    infinite = 2**63 - 1
    program = native.program([(0, 4, False, False)], 0, 0, 0)
    program.embed(False, packed, 1.0, (0, 0, 1, 4))
    step = ints(0, 1, 2), ints(0, 1, 2), *rows, None, cache
    for call in (
        lambda y: native.linear(x, packed, y(3, 8), 1.0, 0.0, False),
        lambda y: native.norm(x, None, zeros(4), None, 1e-5, False, y(3, 4)),
        lambda y: native.activation(x, 0, False, y(3, 4)),
        lambda y: native.embed(ints(0, 1, 2), packed, 1.0, y(3, 4)),
        lambda y: native.attention(
            heads, heads, heads, cache, 0, *rows, 1.0, infinite, 0.0, None, None, None, y(3, 8)
        ),
        lambda y: native.logprobs(x, ints(0, 0, 0), zeros(3), ints(0, 0, 0), np.zeros((3, 2), np.int32), y(3, 2)),
        lambda y: native.logprobs(
            x, ints(0, 0, 0), zeros(3), ints(0, 0, 0), y(3, 2).view(np.int32), zeros(3, 2)
        ),
        lambda y: program.run(*step, y(3, 4)),
    ):  # fmt: skip
        call(zeros)
        with pytest.raises(ValueError, match="not contiguous"):
            call(backwards)


def out_of_range(kind: str, value: Any) -> QuantizedWeight:
    values = np.zeros((3, 64), float8_e4m3fn if kind == "fp8" else np.int8)
    values[1, 33] = value
    groups = 2 if kind.startswith("int4") else 1
    return QuantizedWeight(kind, values, np.ones((3, groups), np.float32), 64 // groups)  # type: ignore[arg-type]


def out_of_blocks(kind: str, **changes: Any) -> QuantizedWeight:
    """A weight of a format with groups, with something in it that is no number of it."""
    minima = np.zeros((3, 4), np.float16) if kind.endswith("_min") else None
    parts = {"values": np.zeros((3, 64), np.int8), "scales": np.ones((3, 4), np.float16), "minima": minima}
    for name, value in changes.items():
        parts[name][1, 3] = value  # type: ignore[index]
    return QuantizedWeight(kind, parts["values"], parts["scales"], 16, parts["minima"])  # type: ignore[arg-type]


@pytest.mark.parametrize("provider", ["reference", "cpu"])
def test_blocks_with_what_is_no_number_are_refused(provider: str, cpu: CpuOps) -> None:
    ops: Any = cpu if provider == "cpu" else ReferenceOps(np)
    for kind in ("int8_groups", "int4_min", "int8_min"):
        for wrong in ({"scales": np.nan}, {"scales": np.inf}, {"minima": np.nan}, {"minima": -np.inf}):
            if "minima" in wrong and kind == "int8_groups":
                continue
            with pytest.raises(ValueError, match="not finite"):
                ops.pack_linear(out_of_blocks(kind, **wrong), None, "float32")
        ops.pack_linear(out_of_blocks(kind), None, "float32")
    for value in (-1, 16):
        with pytest.raises(ValueError, match=r"outside \[0, 15\]"):
            ops.pack_linear(out_of_blocks("int4_min", values=value), None, "float32")
    ops.pack_linear(out_of_blocks("int8_groups", values=-128), None, "float32")
    for infinite in (np.float32(np.inf), np.float32(np.nan)):
        weight = QuantizedWeight("int4", np.zeros((3, 64), np.int8), np.ones((3, 2), np.float32), 32)
        weight.scales[2, 1] = infinite
        with pytest.raises(ValueError, match="not finite"):
            ops.pack_linear(weight, None, "float32")


WRONG = [(kind, -128) for kind in ("int8", "int8_w8a8")] + [
    (kind, value) for kind in ("int4", "int4_w4a8") for value in (-9, 8, -128, 127)
]


def refuses_what_is_out_of_range(ops: Ops, kind: str, value: Any, nearest: Any) -> None:
    with pytest.raises(ValueError, match="outside"):
        ops.pack_linear(out_of_range(kind, value), None, "float32")
    ops.pack_linear(out_of_range(kind, nearest), None, "float32")


@pytest.mark.parametrize(("kind", "value"), WRONG)
def test_small_integers_out_of_their_range(cpu: CpuOps, kind: str, value: int) -> None:
    low, high = (-127, 127) if kind.startswith("int8") else (-8, 7)
    refuses_what_is_out_of_range(cpu, kind, value, np.clip(value, low, high))


@pytest.mark.parametrize(("kind", "value"), [*WRONG, ("fp8", np.nan)])
@pytest.mark.parametrize("provider", ["reference", "cuda"])
def test_other_providers_refuse_them_too(provider: str, kind: str, value: Any) -> None:
    nearest = 448.0 if kind == "fp8" else np.clip(value, *((-127, 127) if kind.startswith("int8") else (-8, 7)))
    refuses_what_is_out_of_range(PROVIDERS[provider](), kind, value, nearest)


def cuda_on_the_host() -> Ops:
    pytest.importorskip("triton")
    from quire.ops.cuda.provider import CudaOps

    return CudaOps("cpu")


PROVIDERS: dict[str, Any] = {"reference": lambda: ReferenceOps(np), "cuda": cuda_on_the_host}
