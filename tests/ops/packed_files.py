"""Packed weights in a file, as an engine directory would have them, and what they compute.

Run as a program it maps such a file in a process of its own: `python -m tests.ops.packed_files PROVIDER DIRECTORY`.
"""

import mmap
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from quire.ops.packed import ALIGNMENT, PackedHeader, PackedState
from quire.ops.types import BLOCK_FORMATS, FORMATS, QuantizedFormat, QuantizedWeight, QuantSpec, WeightDtype

DTYPES: dict[WeightDtype, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
QUANTIZED: list[tuple[QuantizedFormat, int | None]] = [
    ("int8", None),
    ("int8_w8a8", None),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
    ("int4_w4a8", 64),
    ("fp8", None),
    ("int8_groups", 64),
    ("int4_min", 32),
    ("int8_min", 16),
    ("fp8_groups", 64),
]
OUT, INPUTS = 70, 173  # neither is a whole number of panels, of groups or of pairs of them


def make_ops(provider: str) -> Any:
    """`reference`, `cuda` (interpreted) or the name of an instruction set."""
    if provider == "reference":
        from quire.ops.reference import ReferenceOps

        return ReferenceOps(np)
    if provider == "cuda":
        from quire.ops.cuda.provider import CudaOps

        return CudaOps("cpu")
    from quire.ops.cpu import CpuOps

    return CpuOps(2, provider)


def packed_weights(ops: Any) -> Iterator[tuple[str, Any]]:
    """A weight of every format for every operation, with its name."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((OUT, INPUTS)) * 0.1).astype(np.float32)
    bias = rng.standard_normal(OUT).astype(np.float32)
    for dtype, kind in DTYPES.items():
        if ops.name.startswith("cuda") and dtype == "bfloat16":
            continue  # the interpreter has no such type
        yield f"{dtype} linear", ops.pack_linear(weight.astype(kind), bias, dtype)
        yield f"{dtype} gated", ops.pack_gated(weight.astype(kind), bias, dtype)
        yield f"{dtype} embedding", ops.pack_embedding(weight.astype(kind), dtype)
    for name, size in QUANTIZED:
        if name not in ops.formats:
            continue
        quantized = ops.quantize(weight, QuantSpec(name, size)) if size is None else grouped(ops, weight, name, size)
        yield f"{name} {size} linear", ops.pack_linear(quantized, bias, "float32")
        yield f"{name} {size} gated", ops.pack_gated(quantized, bias, "float32")
        if size is None or name in BLOCK_FORMATS:
            yield f"{name} {size} embedding", ops.pack_embedding(quantized, "float32")


def grouped(ops: Any, weight: Any, name: QuantizedFormat, size: int) -> QuantizedWeight:
    """`weight` in groups, or numbers with minima that have nothing to do with it."""
    if not FORMATS[name].has_minima:
        rounded: QuantizedWeight = ops.quantize(weight, QuantSpec(name, size))
        return rounded
    rng, shape = np.random.default_rng(2), (OUT, -(-INPUTS // size))
    values = rng.integers(FORMATS[name].low, FORMATS[name].high + 1, (OUT, INPUTS)).astype(np.int8)
    scales, minima = (rng.standard_normal(shape).astype(np.float16 if size == 32 else np.float32) for _ in range(2))
    return QuantizedWeight(name, values, scales, size, minima)


def results(ops: Any, name: str, packed: Any) -> bytes:
    """The bits of what a weight computes: GEMMs of one row and of many, or rows of a table and logits."""
    many = 3 if ops.name.startswith("cuda") else 40  # the interpreter is slow
    x = np.random.default_rng(1).standard_normal((many, INPUTS)).astype(np.float32)
    inputs = [ops.array(rows, "float32") for rows in (x[:1], x)]
    if name.endswith("gated"):
        found = [ops.gated_linear(rows, packed, "silu") for rows in inputs]
    else:
        found = [ops.linear(rows, packed) for rows in inputs]
    if name.endswith("embedding"):
        found.append(ops.embed(ops.array(np.arange(OUT), "int32"), packed))
    return b"".join(np.ascontiguousarray(ops.to_numpy(y)).tobytes() for y in found)


def host_bytes(buffer: Any) -> bytes:
    """The bytes of a buffer, wherever it lies."""
    return bytes(buffer.cpu().numpy() if hasattr(buffer, "cpu") else buffer)


def aligned_copy(buffer: Any, beside: int = 0) -> Any:
    """A copy of a buffer that begins `beside` bytes past a multiple of 64."""
    data = np.frombuffer(host_bytes(buffer), np.uint8)
    memory = np.empty(len(data) + 2 * ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT + beside
    memory[start : start + len(data)] = data
    return memory[start : start + len(data)]


def write(directory: Path, states: dict[str, PackedState]) -> None:
    """The buffers one after another, aligned, and an index of headers, offsets and sizes."""
    index: dict[str, Any] = {}
    with (directory / "weights.bin").open("wb") as file:
        for name, state in states.items():
            places = []
            for data in map(host_bytes, state.buffers):
                file.write(b"\xff" * (-file.tell() % ALIGNMENT))
                places.append((file.tell(), len(data)))
                file.write(data)
            index[name] = {"header": asdict(state.header), "places": places}
    (directory / "index.json").write_bytes(msgspec.json.encode(index))


def read(directory: Path) -> dict[str, PackedState]:
    """What `write` wrote, over a mapping that may only be read."""
    with (directory / "weights.bin").open("rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    index = msgspec.json.decode((directory / "index.json").read_bytes())
    return {
        name: PackedState(
            msgspec.convert(entry["header"], PackedHeader),
            tuple(memory[start : start + size] for start, size in entry["places"]),
        )
        for name, entry in index.items()
    }


def main(provider: str, directory: Path) -> None:
    """Write the results of each mapped weight to a file of its name."""
    ops = make_ops(provider)
    for name, state in read(directory).items():
        (directory / name).write_bytes(results(ops, name, ops.map_packed(state.header, state.buffers)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
