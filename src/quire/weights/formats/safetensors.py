"""The safetensors files of one model directory as one `WeightSource`."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.models.parameters import Concatenated, Parameter
from quire.ops.types import StoredWeight, WeightDtype
from quire.weights.formats.safetensors_file import FileTensor, SafetensorsFile
from quire.weights.json_file import printable, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 32 * 2**20
MAX_SHARDS = 1000
DTYPES_BY_FORMAT: dict[str, WeightDtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""`allocate(shape, dtype)`: a contiguous array with anything in it."""


class CheckpointWeights:
    """All tensors of a directory: a `WeightSource`. Use as a context manager, or `close()`."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ModelFileError: a file is missing or damaged, or the index and the files disagree.
        """
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, FileTensor] = {}
        self._home: dict[str, SafetensorsFile] = {}
        self._memory = ReadMemory()
        try:
            index = _read_index(directory)
            for name in sorted(set(index.values())) if index is not None else [SINGLE]:
                self._add(SafetensorsFile(directory / name))
            if index is not None:
                self._check_index(index)
        except BaseException:
            self.close()
            raise

    def size_bytes(self, parameter: Parameter) -> int:
        """Bytes of a parameter's tensors in their files."""
        tensors = [self.tensors[name] for array in parameter.arrays for name, _ in array.tensors]
        return sum(tensor.end - tensor.start for tensor in tensors)

    def packed(self, name: str) -> None:
        """A checkpoint holds tensors."""

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that a tensor is in."""
        return self._home[name]

    def vector(self, array: Concatenated) -> NDArray[Any]:
        """`WeightSource.vector`."""
        return self.read(array)

    def matrix(self, array: Concatenated) -> NDArray[Any] | StoredWeight:
        """`WeightSource.matrix`: in its files where it is rows of one type there, so that each thread reads what it
        packs."""
        read = partial(self.read, array, self._memory.take)
        return self._stored(array, read) or read()

    def read(self, array: Concatenated, allocate: Allocate = np.empty) -> NDArray[Any]:
        """The values, a matrix as `[out, in]`, contiguous, in memory of `allocate`. Tensors of one type are read
        straight into the array: no copy is made of them.

        Raises:
            ModelFileError: a file ends early, or a tensor has a type that weights cannot have.
        """
        dtypes = {self._home[name].dtype(name) for name, _ in array.tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        out = allocate(array.shape, dtype)
        first = 0
        for name, stated in array.tensors:
            shape = stated[::-1] if array.transposed else stated
            file, rows = self._home[name], out if shape == array.shape else out[first : first + shape[0]]
            if array.transposed or file.dtype(name) != dtype:
                tensor = file.read(name)
                rows[...] = tensor.T if array.transposed else tensor
            else:
                file.read_into(name, rows)
            first += shape[0] if shape else 0
        return out

    def differ(self, one: str, other: str) -> bool:
        """Whether both tensors are there and have different values."""
        if one not in self._home or other not in self._home:
            return False
        return not np.array_equal(self._home[one].read(one), self._home[other].read(other))

    def _stored(self, array: Concatenated, read: Callable[[], NDArray[Any]]) -> StoredWeight | None:
        """The matrix where it lies; None unless it is rows of one type that follow one another in its files."""
        tensors = [(self._home[name], self.tensors[name]) for name, _ in array.tensors]
        first = tensors[0][1]
        if array.transposed or first.format not in DTYPES_BY_FORMAT:
            return None
        if any(info.format != first.format for _, info in tensors):
            return None
        files = tuple((file.descriptor, info.start, info.shape[0]) for file, info in tensors)
        rows, inputs = array.shape
        return StoredWeight((rows, inputs), DTYPES_BY_FORMAT[first.format], files, read)

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> "CheckpointWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, file: SafetensorsFile) -> None:
        self.files.append(file)
        for tensor in file.tensors:
            if tensor in self._home:
                other = self._home[tensor].name
                raise ModelFileError(f"{file.name}: {printable(tensor)} is in {other} too")
            self._home[tensor] = file
        self.tensors.update(file.tensors)

    def _check_index(self, index: Mapping[str, str]) -> None:
        for tensor, name in index.items():
            if tensor not in self._home or self._home[tensor].name != name:
                raise ModelFileError(f"{INDEX}: {printable(tensor)} is not in {printable(name)}")


class ReadMemory:
    """Arrays for matrices to be read into. Large ones share one piece of memory, so that the system need not clear new
    pages for each, which takes longer than reading into them."""

    SHARED_BYTES = 2**20

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A contiguous array with anything in it; a large one is good until the next large one is taken."""
        size = math.prod(shape) * dtype.itemsize
        if size < self.SHARED_BYTES:
            return np.empty(shape, dtype)
        if not size <= len(self._bytes) <= 4 * size:
            self._bytes = np.empty(0, np.uint8)  # given back before more is allocated
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor -> file name; None if the model is one file."""
    if not (directory / INDEX).exists():
        if not (directory / SINGLE).exists():
            raise ModelFileError(f"no {SINGLE} and no {INDEX} in the model's directory: only safetensors are read")
        return None
    index = read_json_object(directory / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ModelFileError(f"{INDEX}: no weight_map")
    for name in index.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ModelFileError(f"{INDEX}: {printable(str(name))} is not the name of a safetensors file beside it")
    if len(set(index.values())) > MAX_SHARDS:
        raise ModelFileError(f"{INDEX}: more than {MAX_SHARDS} files")
    return index
