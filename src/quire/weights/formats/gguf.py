"""The tensors of one GGUF model as a `WeightSource`: blocks are unpacked to float32 while they are read.
`gguf_packed.py` keeps them instead."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.models.parameters import Concatenated, Parameter
from quire.ops.types import StoredWeight
from quire.weights.formats.gguf_blocks import BlockType, unpack
from quire.weights.formats.gguf_file import GgufFile, GgufTensor
from quire.weights.formats.gguf_parts import GgufParts
from quire.weights.formats.safetensors import DTYPES_BY_FORMAT, Allocate, ReadMemory

TakeRows = Callable[[BlockType, int, NDArray[np.uint8]], None]
"""The type of a tensor, the first of some of its rows, and their bytes `[rows, bytes of one]`."""
CHUNK_VALUES = 2**18
"""Unpacked at a time by each thread: a megabyte, so that it stays in the processor's cache."""


class GgufWeights:
    """All tensors of a model, under GGUF's names: a `WeightSource`. Use as a context manager, or `close()`."""

    def __init__(self, path: Path, rotated_heads: Mapping[str, int], known: GgufParts | None = None) -> None:
        """
        Args:
            path: the model, or any part of it.
            rotated_heads: by the last part of a module's name (`attn_q`), how many heads its rows have, where GGUF has
                the two halves of each head's rows in turns (llama's rotation of neighbours), which is undone here.
            known: the model's headers, if they were read.

        Raises:
            ModelFileError: a file is missing or damaged, or holds no data.
        """
        self._parts = GgufParts(path, known)
        if not all(file.has_data for file in self._parts.files):
            self._parts.close()
            raise ModelFileError(f"{self._parts.name}: the header of an engine, without its data")
        self.tensors: Mapping[str, GgufTensor] = self._parts.tensors
        self._rotated_heads = rotated_heads
        self._memory = ReadMemory()
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="unpack")

    def size_bytes(self, parameter: Parameter) -> int:
        """Bytes of a parameter's tensors in their files."""
        tensors = [self.tensors[name] for array in parameter.arrays for name, _ in array.tensors]
        return sum(tensor.end - tensor.start for tensor in tensors)

    def packed(self, name: str) -> None:
        """The blocks are ggml's, not a provider's."""

    def vector(self, array: Concatenated) -> NDArray[Any]:
        """`WeightSource.vector`, float32."""
        return self.read(array)

    def matrix(self, array: Concatenated) -> NDArray[Any] | StoredWeight:
        """`WeightSource.matrix`: float32, or in its files where it is plain rows of one type."""
        read = partial(self.read, array, self._memory.take)
        return self._stored(array, read) or read()

    def read(self, array: Concatenated, allocate: Allocate = np.empty) -> NDArray[np.float32]:
        """The values in float32, a matrix as `[out, in]`, in memory of `allocate`.

        Raises:
            ModelFileError: a file ends early.
        """
        out = allocate(array.shape, np.dtype(np.float32))
        first, tasks = 0, []
        for name, shape in array.tensors:
            rows = out if shape == array.shape else out[first : first + shape[0]]
            rows = rows if rows.ndim == 2 else rows[:, None] if self._heads(name) else rows[None]
            tasks += self._tasks(name, rows.shape, partial(_unpack_rows, rows))
            first += shape[0]
        self._do(tasks)
        return out

    def read_raw(self, name: str, take: TakeRows) -> None:
        """The rows of a matrix as they lie, heads in order, some at a time in any order: `take(kind, first row, raw)`.

        Raises:
            ModelFileError: a file ends early.
        """
        rows, inputs = self.tensors[name].shape
        self._do(self._tasks(name, (rows, inputs), take))

    def _do(self, tasks: list[Callable[[], None]]) -> None:
        for done in [self._pool.submit(task) for task in tasks]:
            done.result()

    def differ(self, one: str, other: str) -> bool:
        """Whether both tensors are there and have different values."""
        if one not in self.tensors or other not in self.tensors:
            return False
        first, second = (self.read(Concatenated(((name, self.tensors[name].shape),))) for name in (one, other))
        return not np.array_equal(first, second)

    def close(self) -> None:
        """Close all files, end the threads."""
        self._pool.shutdown()
        self._parts.close()

    def __enter__(self) -> "GgufWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heads(self, name: str) -> int:
        """How many heads a tensor's rows are to be put in order for; 0 is none."""
        return self._rotated_heads.get(name.rpartition(".")[0].rpartition(".")[2], 0)

    def _stored(self, array: Concatenated, read: Callable[[], NDArray[Any]]) -> StoredWeight | None:
        """The matrix where it lies; None unless it is rows of one plain type that need no other order."""
        tensors = [(self._parts.home[name], self.tensors[name]) for name, _ in array.tensors]
        format = tensors[0][1].format
        if format not in DTYPES_BY_FORMAT or any(info.format != format for _, info in tensors):
            return None
        if any(self._heads(name) for name, _ in array.tensors):
            return None
        files = tuple((file.descriptor, info.start, info.shape[0]) for file, info in tensors)
        rows, inputs = array.shape
        return StoredWeight((rows, inputs), DTYPES_BY_FORMAT[format], files, read)

    def _tasks(self, name: str, shape: tuple[int, ...], take: TakeRows) -> list[Callable[[], None]]:
        """Read a tensor as rows `[rows, inputs]`, some at a time; of heads that are to be put in order, whole heads."""
        file, tensor, heads, rows = self._parts.home[name], self.tensors[name], self._heads(name), shape[0]
        at_once = max(1, CHUNK_VALUES // shape[1])
        head_rows = 0
        if heads:
            head_rows = rows // heads
            if head_rows * heads != rows or head_rows % 2:
                raise ModelFileError(f"{file.name}: {name} has {rows} rows, which are not those of {heads} heads")
            at_once = max(1, at_once // head_rows) * head_rows
        row_bytes = (tensor.end - tensor.start) // rows
        return [
            partial(_read_rows, file, name, first, min(at_once, rows - first), row_bytes, head_rows, take)
            for first in range(0, rows, at_once)
        ]


def _read_rows(
    file: GgufFile, name: str, first: int, count: int, row_bytes: int, head_rows: int, take: TakeRows
) -> None:
    tensor, size = file.tensors[name], count * row_bytes
    data = os.pread(file.descriptor, size, tensor.start + first * row_bytes)
    if len(data) != size:
        raise ModelFileError(f"{file.name}: truncated while {name} was read")
    raw = np.frombuffer(data, np.uint8).reshape(count, -1)
    if head_rows:
        turns = raw.reshape(-1, head_rows // 2, 2, raw.shape[1])
        raw = turns.swapaxes(1, 2).reshape(raw.shape)
    take(tensor.kind, first, raw)


def _unpack_rows(out: NDArray[np.float32], kind: BlockType, first: int, raw: NDArray[np.uint8]) -> None:
    out[first : first + len(raw)] = unpack(kind, raw)
