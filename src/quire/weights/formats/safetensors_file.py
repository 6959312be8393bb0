"""One safetensors file, which may be hostile or truncated.

::

    8 bytes          header size n, little-endian
    n bytes          JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    the rest         data; the offsets of all tensors together cover it without gap or overlap

The header is read and checked as a whole before any tensor; sizes are Python integers, which do not overflow.
Data are read, not mapped: a file that shrinks later gives an error here, not a bus error.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.weights.json_file import open_regular, parse_json_object, printable
from quire.weights.source import TensorInfo

MAX_HEADER_BYTES = 16 * 2**20
"""The format allows 100 MB; the largest files in use have headers of some hundred kilobytes."""
MAX_DIMENSIONS = 8

BITS_BY_FORMAT = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""All of the format's types. A model may carry any of them; weights are read from `DTYPES`."""

DTYPES: dict[str, Any] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}

STORED: dict[str, Any] = DTYPES | {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""What the parts of a quantised weight may be, too."""


@dataclass(frozen=True, slots=True)
class FileTensor(TensorInfo):
    """One tensor of a header."""

    start: int
    """Bytes from the beginning of the file."""
    end: int


class SafetensorsFile:
    """An open file with a checked header. Use as a context manager, or `close()`."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ModelFileError: the file is missing, truncated or not safetensors; it names the file.
        """
        self.name = path.name
        self._file = open_regular(path)
        try:
            size = self._file.seek(0, 2)
            self._file.seek(0)
            prefix = self._file.read(8)
            header_size = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_size > size - 8:
                raise self._error(f"truncated: {size:,} bytes, the header alone needs {8 + header_size:,}")
            if header_size > MAX_HEADER_BYTES:
                raise self._error(f"a header of {header_size:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
            header = parse_json_object(self._file.read(header_size), self.name)
            self.tensors = self._check(header, 8 + header_size, size)
        except BaseException:
            self._file.close()
            raise

    def read(self, tensor: str) -> NDArray[Any]:
        """A tensor as a new contiguous array of the same shape, bfloat16, float16 or float32.

        Raises:
            ModelFileError: the file ends early.
        """
        info = self.tensors[tensor]
        out = np.empty(info.shape, self.dtype(tensor))
        self.read_into(tensor, out)
        return out

    @property
    def descriptor(self) -> int:
        """The descriptor of the open file, for `StoredWeight`."""
        return self._file.fileno()

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """The numpy type of a tensor.

        Raises:
            ModelFileError: a type that weights cannot have.
        """
        format = self.tensors[tensor].format
        if format not in DTYPES:
            raise self._error(f"{tensor} is {format}; weights are read as {', '.join(DTYPES)}")
        return DTYPES[format]  # type: ignore[no-any-return]

    def read_into(self, tensor: str, out: NDArray[Any]) -> None:
        """Read a tensor into a contiguous array of the same shape and type.

        Raises:
            ModelFileError: the file ends early.
        """
        self._fill(tensor, 0, out)

    def read_rows(self, tensor: str, first: int = 0, count: int | None = None) -> NDArray[Any]:
        """`count` rows of a tensor from `first` on, `[count, ...]`, in a type of `STORED`; all of one of no dimensions.

        Raises:
            ModelFileError: another type, or the file ends early.
        """
        info = self.tensors[tensor]
        if info.format not in STORED:
            raise self._error(f"{printable(tensor)} is {info.format}; parts of weights are read as {', '.join(STORED)}")
        dtype = STORED[info.format]
        rows, *rest = info.shape or (1,)
        out = np.empty((rows - first if count is None else count, *rest), dtype)
        self._fill(tensor, first * math.prod(rest) * dtype.itemsize, out)
        return out if info.shape else out.reshape(())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, header: dict[str, Any], data_start: int, size: int) -> dict[str, FileTensor]:
        header.pop("__metadata__", None)
        tensors = {name: self._info(name, entry, data_start, size) for name, entry in header.items()}
        end = data_start
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if info.start != end:
                raise self._error(f"{printable(name)} begins at {info.start:,}, the one before it ends at {end:,}")
            end = info.end
        if end != size:
            raise self._error(f"its tensors end at {end:,}, the file at {size:,}")
        return tensors

    def _info(self, name: str, entry: Any, data_start: int, size: int) -> FileTensor:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"{printable(name)} must have dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS_BY_FORMAT:
            raise self._error(f"{printable(name)} has the unknown dtype {printable(repr(dtype))}")
        if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._error(f"{printable(name)} has no valid shape")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise self._error(f"{printable(name)} has no valid data_offsets")
        start, end = offsets
        bits = math.prod(shape) * BITS_BY_FORMAT[dtype]
        if bits % 8 or end - start != bits // 8:
            raise self._error(f"{printable(name)}: its offsets span {end - start:,} bytes, its shape {bits // 8:,}")
        if data_start + end > size:
            raise self._error(f"truncated: {printable(name)} ends at {data_start + end:,} of {size:,} bytes")
        return FileTensor(tuple(shape), dtype, data_start + start, data_start + end)

    def _fill(self, tensor: str, skipped_bytes: int, out: NDArray[Any]) -> None:
        if out.nbytes == 0:
            return
        self._file.seek(self.tensors[tensor].start + skipped_bytes)
        if self._file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
            raise self._error(f"truncated while {printable(tensor)} was read")

    def _error(self, text: str) -> ModelFileError:
        return ModelFileError(f"{self.name}: {text}")


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
