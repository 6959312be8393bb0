"""The header of a GGUF model without its data, as a file of an engine directory: configuration, tokenizer, template and
names are then read by the code that reads them from the model itself."""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quire.errors import ModelFileError
from quire.weights.formats.gguf_blocks import TYPES
from quire.weights.formats.gguf_file import HEADER_ONLY, GgufArray, GgufTensor
from quire.weights.formats.gguf_names import MAGIC
from quire.weights.formats.gguf_parts import GgufParts

_ALIGNMENT = 32
_LEFT_OUT = ("split.", "general.alignment")
"""Keys of a set of files, which this is no part of."""
_KEPT = "rope_"
"""How the vectors begin whose values belong to the configuration; they come first, and their data are there."""
_BOOL, _STRING, _ARRAY, _INT64, _UINT64, _FLOAT64 = 7, 8, 9, 11, 10, 12


def write_header(parts: GgufParts, path: Path) -> None:
    """Write the pairs of a model and what is known of the tensors of all its parts.

    Raises:
        ModelFileError: a file ended early.
        OSError: it cannot be written.
    """
    pairs = {key: value for key, value in parts.values.items() if not key.startswith(_LEFT_OUT)} | {HEADER_ONLY: True}
    tensors = dict(sorted(parts.tensors.items(), key=lambda item: not item[0].startswith(_KEPT)))
    found = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(pairs)))
    for key, value in pairs.items():
        found += _text(key) + _value(value)
    for piece in _infos(tensors):
        found += piece
    for name, tensor in tensors.items():
        if name.startswith(_KEPT):
            found += bytes(-len(found) % _ALIGNMENT) + _data(parts, name, tensor)
    path.write_bytes(found)


def _infos(tensors: Mapping[str, GgufTensor]) -> Iterator[bytes]:
    offset = 0
    for name, tensor in tensors.items():
        number = next(number for number, kind in TYPES.items() if kind is tensor.kind)
        shape = tensor.shape[::-1]
        yield _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
        offset += -(-(tensor.end - tensor.start) // _ALIGNMENT) * _ALIGNMENT


def _data(parts: GgufParts, name: str, tensor: GgufTensor) -> bytes:
    file, size = parts.home[name], tensor.end - tensor.start
    data = os.pread(file.descriptor, size, tensor.start)
    if len(data) != size:
        raise ModelFileError(f"{file.name}: truncated while {name} was read")
    return data


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A pair's type and value, such that the value read is the same; of numbers the widest type."""
    if isinstance(value, GgufArray):
        return struct.pack("<IIQ", _ARRAY, value.kind, value.count) + value.raw
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, float):
        return struct.pack("<Id", _FLOAT64, value)
    return struct.pack("<Iq", _INT64, value) if value < 2**63 else struct.pack("<IQ", _UINT64, value)
