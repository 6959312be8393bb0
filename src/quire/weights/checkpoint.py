"""The safetensors files of one model directory as one set of tensors."""

import fnmatch
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.models.weights_map import Parameter
from quire.ops.types import StoredWeight, WeightDtype
from quire.weights.json_file import read_json_object
from quire.weights.safetensors_file import SafetensorsFile, printable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 32 * 2**20
MAX_SHARDS = 1000
STORAGE_BY_DTYPE: dict[str, WeightDtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""`allocate(shape, dtype)`: a contiguous array with anything in it."""


class Checkpoint:
    """All tensors of a directory. Use as a context manager, or `close()`."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ModelFileError: a file is missing or damaged, or the index and the files disagree.
        """
        self.files: list[SafetensorsFile] = []
        self._home: dict[str, SafetensorsFile] = {}
        try:
            index = _read_index(directory)
            for name in sorted(set(index.values())) if index is not None else [SINGLE]:
                self._add(SafetensorsFile(directory / name))
            if index is not None:
                self._check_index(index)
        except BaseException:
            self.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: file.tensors[name].shape for name, file in self._home.items()}

    def dtype(self, tensor: str) -> str:
        """The format's name of a tensor's type (`BF16`)."""
        return self._home[tensor].tensors[tensor].dtype

    def size_bytes(self, parameter: Parameter) -> int:
        """Bytes of a parameter's tensors in their files."""
        tensors = [self._home[name].tensors[name] for name, _ in parameter.tensors]
        return sum(tensor.end - tensor.start for tensor in tensors)

    def read(self, parameter: Parameter, allocate: Allocate = np.empty) -> NDArray[Any]:
        """The joined tensors of a parameter, a linear weight as `[out, in]`, contiguous, in memory of `allocate`.

        Tensors of one type are read straight into the joined array: no copy is made of them.
        """
        dtypes = {self._home[name].dtype(name) for name, _ in parameter.tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        shapes = [shape[::-1] if parameter.transposed else shape for _, shape in parameter.tensors]
        whole = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        out = allocate(whole, dtype)
        first = 0
        for (name, _), shape in zip(parameter.tensors, shapes, strict=True):
            file, rows = self._home[name], out if shape == whole else out[first : first + shape[0]]
            if parameter.transposed or file.dtype(name) != dtype:
                tensor = file.read(name)
                rows[...] = tensor.T if parameter.transposed else tensor
            else:
                file.read_into(name, rows)
            first += shape[0] if shape else 0
        return out

    def differ(self, one: str, other: str) -> bool:
        """Whether both tensors are there and have different values."""
        if one not in self._home or other not in self._home:
            return False
        return not np.array_equal(self._home[one].read(one), self._home[other].read(other))

    def stored(self, parameter: Parameter, read: Callable[[], NDArray[Any]]) -> StoredWeight | None:
        """A parameter where it lies; None unless it is rows of one type that follow one another in its files."""
        tensors = [(self._home[name], self._home[name].tensors[name]) for name, _ in parameter.tensors]
        first = tensors[0][1]
        if parameter.transposed or len(first.shape) != 2 or first.dtype not in STORAGE_BY_DTYPE:
            return None
        if any(info.dtype != first.dtype for _, info in tensors):
            return None
        files = tuple((file.descriptor, info.start, info.shape[0]) for file, info in tensors)
        rows = sum(count for _, _, count in files)
        return StoredWeight((rows, first.shape[1]), STORAGE_BY_DTYPE[first.dtype], files, read)

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> "Checkpoint":
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

    def _check_index(self, index: Mapping[str, str]) -> None:
        for tensor, name in index.items():
            if tensor not in self._home or self._home[tensor].name != name:
                raise ModelFileError(f"{INDEX}: {printable(tensor)} is not in {printable(name)}")


def check_tensors(
    parameters: Mapping[str, Parameter], shapes: Mapping[str, tuple[int, ...]], unused: tuple[str, ...]
) -> None:
    """Every tensor of the parameters must be there with its shape, and nothing else but `unused` patterns.

    Raises:
        ModelFileError: names the first tensors that are missing, wrongly shaped or left over.
    """
    wanted = {name: shape for parameter in parameters.values() for name, shape in parameter.tensors}
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise ModelFileError(f"the checkpoint lacks {_first_of(missing)}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ModelFileError(f"{name} has the shape {list(shapes[name])}; the config asks for {list(shape)}")
    extra = [name for name in shapes if name not in wanted]
    extra = [name for name in extra if not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)]
    if extra:
        raise ModelFileError(f"the checkpoint has tensors that the model does not: {_first_of(extra)}")


def _first_of(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


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
