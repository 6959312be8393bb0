"""One GGUF file, which may be hostile or truncated: its header, checked as a whole before any tensor is read.

::

    "GGUF", version              u32 each; 2 and 3 are read
    tensors, pairs               u64 each: how many of both follow
    pairs: key, type, value      a string is a u64 length and UTF-8; an array a type, a u64 count and its items
    tensors: name, dimensions    u32 how many, u64 each with the innermost first, u32 type, u64 offset
    padding to the alignment, then data

Every length and count is held against what is left of the file before it is used; sizes are Python integers, which do
not overflow. The header is read a piece at a time, so that memory grows with what is there, not with what is claimed.
Data are read, not mapped: a file that shrinks later gives an error here, not a bus error.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from quire.errors import ModelFileError
from quire.weights.formats.gguf_blocks import OTHERS, TYPES, BlockType
from quire.weights.formats.gguf_names import MAGIC
from quire.weights.json_file import open_regular, printable
from quire.weights.source import TensorInfo

MAX_HEADER_BYTES = 64 * 2**20
"""The largest headers in use, of vocabularies of 262,144 tokens, have some 16 MB."""
MAX_PAIRS = 2**16
MAX_TENSORS = 2**16
MAX_STRINGS = 2**21
"""Of one array: the largest in use are lists of merges, of some half a million."""
MAX_KEY_BYTES = 2**16 - 1
MAX_DIMENSIONS = 4
MAX_VALUES = 2**48
MAX_ALIGNMENT = 2**20
HEADER_ONLY = "quire.header_only"
"""The key of a file that names tensors whose data it does not hold."""
_PIECE = 2**20

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in _SCALARS.items()}


@dataclass(frozen=True)
class GgufArray:
    """An array of the header, made into a list when it is asked for."""

    key: str
    kind: int
    count: int
    raw: bytes

    @cached_property
    def items(self) -> list[Any]:
        """Its values. Raises ModelFileError for a string that is not UTF-8."""
        if self.kind != _STRING:
            return list(np.frombuffer(self.raw, np.dtype("<" + _SCALARS[self.kind]), self.count).tolist())
        found, at, raw = [], 0, self.raw
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(self.count):
                end = at + 8 + unpack(raw, at)[0]
                found.append(raw[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            raise ModelFileError(f"{printable(self.key)}: item {len(found)} is not UTF-8") from None
        return found


@dataclass(frozen=True, slots=True)
class GgufTensor(TensorInfo):
    """One tensor of a header; its shape has the outermost dimension first, as everywhere in Quire."""

    kind: BlockType
    start: int
    """Bytes from the beginning of the file."""
    end: int


class GgufFile:
    """An open file with a checked header. Use as a context manager, or `close()`."""

    values: Mapping[str, Any]
    """Numbers, strings, truth values and `GgufArray`s by key."""
    tensors: Mapping[str, GgufTensor]

    def __init__(self, path: Path, known: "GgufFile | None" = None) -> None:
        """
        Args:
            known: the file as it was read before, open or closed: its header is read again only if the file changed.

        Raises:
            ModelFileError: the file is missing, truncated or not GGUF; it names the file, and the key or tensor.
        """
        self.name = path.name
        self._file = open_regular(path)
        try:
            self._identity = _identity(self._file)
            if known is not None and known._identity == self._identity:
                self.values, self.tensors = known.values, known.tensors
            else:
                self.values, self.tensors = _header(_Reader(self._file, self.name))
        except BaseException:
            self._file.close()
            raise

    @property
    def has_data(self) -> bool:
        """False: only its header and small vectors, of an engine directory."""
        return self.values.get(HEADER_ONLY) is not True

    @property
    def descriptor(self) -> int:
        """The descriptor of the open file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Reader:
    """Takes bytes from the front of a file, and knows what is left."""

    def __init__(self, file: BufferedReader, name: str) -> None:
        self._file, self._name = file, name
        self.size = file.seek(0, 2)
        file.seek(0)
        self.buffer = bytearray()
        self.at = 0

    def need(self, count: int, what: str) -> None:
        """Have `count` bytes from here in the buffer. Raises ModelFileError where the file has fewer."""
        end = self.at + count
        if end > self.size:
            raise self.error(f"truncated: {what} needs {count:,} bytes, {self.size - self.at:,} are left")
        if end > MAX_HEADER_BYTES:
            raise self.error(f"{what} is beyond the {MAX_HEADER_BYTES:,} bytes that a header may have")
        while len(self.buffer) < end:
            piece = self._file.read(max(_PIECE, min(end - len(self.buffer), 16 * _PIECE)))
            if not piece:
                raise self.error(f"truncated while {what} was read")
            self.buffer += piece

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += size
        return value

    def text(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q", what)
        if length > max_bytes:
            raise self.error(f"{what} claims {length:,} bytes; at most {max_bytes:,} are read")
        self.need(length, what)
        self.at += length
        try:
            return self.buffer[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def count(self, value: int, least_bytes: int, most: int, what: str) -> int:
        """A claimed number of things that have some bytes each."""
        if value > most:
            raise self.error(f"{what} claims {value:,}; at most {most:,} are read")
        if value * least_bytes > self.size - self.at:
            left = self.size - self.at
            raise self.error(f"truncated: {what} claims {value:,} of at least {least_bytes} bytes, {left:,} are left")
        return value

    def array(self, key: str) -> GgufArray:
        what = printable(key)
        kind = self.number("I", what)
        if kind not in _SCALARS and kind != _STRING:
            raise self.error(f"{what} is an array of type {kind}, which is not one that Quire reads")
        count = self.number("Q", what)
        start = self.at
        if kind == _STRING:
            self._skip_strings(self.count(count, 8, MAX_STRINGS, what), what)
        else:
            size = self.count(count, _SIZES[kind], MAX_HEADER_BYTES, what) * _SIZES[kind]
            self.need(size, what)
            self.at += size
        return GgufArray(key, kind, count, bytes(self.buffer[start : self.at]))

    def _skip_strings(self, count: int, what: str) -> None:
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.at + 8 > len(self.buffer):
                self.need(8, what)
            length = unpack(self.buffer, self.at)[0]
            self.at += 8
            if self.at + length > len(self.buffer):
                self.need(length, what)
            self.at += length

    def error(self, text: str) -> ModelFileError:
        return ModelFileError(f"{self._name}: {text}")


def _identity(file: BufferedReader) -> tuple[int, ...]:
    """The same as long as nothing writes the file."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _header(reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    num_tensors, num_pairs = _counts(reader)
    values = _pairs(reader, num_pairs)
    return values, _tensors(reader, num_tensors, _alignment(reader, values), values.get(HEADER_ONLY) is not True)


def _counts(reader: _Reader) -> tuple[int, int]:
    """Tensors and pairs, once magic and version are right."""
    reader.need(8, "the beginning")
    if reader.buffer[:4] != MAGIC:
        raise reader.error("not a GGUF file: it does not begin with GGUF")
    reader.at = 4
    version = reader.number("I", "version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (1, 2, 3):
            raise reader.error(f"a big-endian GGUF file (version {swapped}), which Quire does not read")
        raise reader.error(f"GGUF version {version}; 2 and 3 are read")
    tensors, pairs = reader.number("Q", "the number of tensors"), reader.number("Q", "the number of keys")
    reader.count(tensors, 32, MAX_TENSORS, "the number of tensors")
    reader.count(pairs, 13, MAX_PAIRS, "the number of keys")
    return tensors, pairs


def _pairs(reader: _Reader, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for number in range(count):
        key = reader.text(f"key {number}", MAX_KEY_BYTES)
        if key in values:
            raise reader.error(f"the key {printable(key)} appears twice")
        values[key] = _value(reader, key)
    return values


def _value(reader: _Reader, key: str) -> Any:
    what = printable(key)
    kind = reader.number("I", what)
    if kind == _STRING:
        return reader.text(what)
    if kind == _ARRAY:
        return reader.array(key)
    if kind not in _SCALARS:
        raise reader.error(f"{what} has the unknown type {kind}")
    if _SCALARS[kind] == "?" and (flag := reader.number("B", what)) <= 1:
        return bool(flag)
    if _SCALARS[kind] == "?":
        raise reader.error(f"{what} must be true or false, got {flag}")
    return reader.number(_SCALARS[kind], what)


def _alignment(reader: _Reader, values: Mapping[str, Any]) -> int:
    value = values.get("general.alignment", 32)
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise reader.error(f"general.alignment must be a power of two up to {MAX_ALIGNMENT:,}, got {str(value)[:60]}")
    return value


def _tensors(reader: _Reader, count: int, alignment: int, has_data: bool) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for number in range(count):
        name = reader.text(f"the name of tensor {number}", MAX_KEY_BYTES)
        if name in found:
            raise reader.error(f"the tensor {printable(name)} appears twice")
        found[name] = _tensor(reader, printable(name), alignment)
    data_start = -(-reader.at // alignment) * alignment
    end, before = 0, ""
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        what = printable(name)
        if tensor.start < end:
            raise reader.error(f"{what} begins at {tensor.start:,} of the data, {before} ends at {end:,}")
        end, before = tensor.end, what
        if has_data and data_start + end > reader.size:
            text = f"truncated: {what} ends at {data_start + end:,}, the file at {reader.size:,}"
            raise reader.error(text)
    return {
        name: GgufTensor(tensor.shape, tensor.format, tensor.kind, data_start + tensor.start, data_start + tensor.end)
        for name, tensor in found.items()
    }


def _tensor(reader: _Reader, what: str, alignment: int) -> GgufTensor:
    """As the header says it, with offsets from the beginning of the data."""
    rank = reader.number("I", what)
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise reader.error(f"{what} has {rank} dimensions; 1 to {MAX_DIMENSIONS} are read")
    dimensions = [reader.number("Q", what) for _ in range(rank)]
    number = reader.number("I", what)
    kind = TYPES.get(number)
    if kind is None:
        known = ", ".join(known.name for known in TYPES.values())
        raise reader.error(f"{what} is of the type {number} ({OTHERS.get(number, 'unknown')}); Quire reads {known}")
    offset = reader.number("Q", what)
    if 0 in dimensions or math.prod(dimensions) > MAX_VALUES:
        raise reader.error(f"{what} has the shape {dimensions[::-1]}: 1 to {MAX_VALUES:,} values are read")
    if dimensions[0] % kind.values:
        raise reader.error(f"{what} has rows of {dimensions[0]} values; {kind.name} has blocks of {kind.values}")
    if offset % alignment:
        raise reader.error(f"{what} begins at {offset:,}, which is no multiple of the alignment {alignment}")
    end = offset + math.prod(dimensions) // kind.values * kind.bytes
    return GgufTensor(tuple(dimensions[::-1]), kind.name, kind, offset, end)
