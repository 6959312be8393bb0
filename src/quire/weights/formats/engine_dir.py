"""An engine directory: what `quire build` made of a model, as one `WeightSource` whose weights are mapped, not copied.

::

    DIR/engine.json       the manifest: target, formats, where each weight lies, hashes, golden tokens; written last
        weights.quire     what the provider packed, each buffer at a multiple of 64 bytes
        config.json, tokenizer.json, ...   the model's own files, unchanged
        model.header  of a GGUF file in their place: its header
"""

import hashlib
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.models.parameters import Concatenated, Parameter
from quire.ops.packed import ALIGNMENT, PackedHeader, PackedState
from quire.weights.formats.engine_names import BUILDING, MANIFEST, WEIGHTS
from quire.weights.formats.gguf_names import HEADER
from quire.weights.json_file import open_regular, printable
from quire.weights.source import TensorInfo

SCHEMA = 1
MAX_MANIFEST_BYTES = 64 * 2**20
Span = tuple[int, int]
"""First byte in the weights' file, and number of bytes."""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file, as it was when it was read or written."""

    size: int
    sha256: str


class StoredParameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A parameter of the decoder as its provider packed it, or one vector of a norm (float32, by its tensor's name)."""

    buffers: list[Span]
    header: PackedHeader | None = None
    """None: a vector."""


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt and the tokens that greedy sampling gives on one instruction set."""

    instruction_set: str
    prompt_token_ids: list[int]
    token_ids: list[int]


class DecisionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was decided while the engine was built, and why."""

    name: str
    value: str
    reason: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that is known of an engine."""

    schema: int
    quire_version: str
    model: str
    """What it was built from, as it was named."""
    source: dict[str, FileRecord]
    """The files that it was built from."""
    provider: Literal["cpu", "reference"]
    instruction_set: str
    """That packed it; others with the same layouts run it too."""
    dtype: Literal["bfloat16", "float16", "float32"]
    quantization: str | None
    quantization_group_size: int | None
    tensors: dict[str, tuple[list[int], str]]
    """Of the source: shape and format of each tensor that went in."""
    parameters: dict[str, StoredParameter]
    files: dict[str, FileRecord]
    """Everything beside the manifest."""
    decisions: list[DecisionRecord]
    golden: list[Golden]
    digest: str = ""
    """SHA-256 of the manifest without this field."""


def digest_of(manifest: Manifest) -> str:
    """What `manifest.digest` must be."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, digest=""))).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest; the other files are only looked at: `quire verify` reads them.

    Raises:
        ModelFileError: there is none, it is of a newer schema, was edited, or a file is missing or has another size.
    """
    if (directory / BUILDING).exists():
        with open_regular(directory / BUILDING) as file:
            if file.read(32).strip() != str(os.getpid()).encode():
                raise ModelFileError(f"{directory.name} is an engine whose building never ended: build it again")
    with open_regular(directory / MANIFEST) as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ModelFileError(f"{MANIFEST}: larger than {MAX_MANIFEST_BYTES:,} bytes")
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != SCHEMA:
            raise ModelFileError(
                f"{MANIFEST}: schema is {schema}; this version of Quire reads {SCHEMA}: build it again"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{MANIFEST}: {str(error)[:200]}") from None
    if digest_of(manifest) != manifest.digest:
        raise ModelFileError(f"{MANIFEST}: digest is not that of its content: it was changed after it was built")
    for name, record in manifest.files.items():
        _check_file(directory, name, record)
    if WEIGHTS not in manifest.files:
        raise ModelFileError(f"{MANIFEST}: files has no {WEIGHTS}")
    for name in ("config.json", HEADER):  # what says which model it is
        if os.path.lexists(directory / name) and name not in manifest.files:
            raise ModelFileError(f"{MANIFEST}: files has no {name}, which lies in the directory")
    _check_spans(manifest)
    return manifest


class _Schema(msgspec.Struct):
    schema: int


def _check_file(directory: Path, name: str, record: FileRecord) -> None:
    path = directory / name
    if Path(name).name != name or path.is_symlink():
        raise ModelFileError(f"{MANIFEST}: {printable(name)} is not a file of the engine's own directory")
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size != record.size:
        raise ModelFileError(f"{printable(name)} has {size:,} bytes; the engine was built with {record.size:,}")


def _check_spans(manifest: Manifest) -> None:
    size = manifest.files[WEIGHTS].size
    for name, stored in manifest.parameters.items():
        for start, length in stored.buffers:
            if start < 0 or length < 0 or start % ALIGNMENT or start + length > size:
                raise ModelFileError(f"{MANIFEST}: {printable(name)}: buffer {start}, {length} lies outside {WEIGHTS}")


class EngineWeights:
    """The weights of an engine directory: a `WeightSource`. What is mapped stays, also once this is closed."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """
        Raises:
            ModelFileError: the weights' file cannot be mapped.
        """
        self._manifest = manifest
        if not manifest.files[WEIGHTS].size:
            raise ModelFileError(f"{WEIGHTS} is empty")
        with open_regular(directory / WEIGHTS) as file:
            self._memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(shape), format) for name, (shape, format) in manifest.tensors.items()
        }

    def size_bytes(self, parameter: Parameter) -> int:
        """Of vectors; what is packed is not read."""
        spans = [self._manifest.parameters.get(array.tensors[0][0]) for array in parameter.arrays]
        return sum(size for stored in spans if stored is not None for _, size in stored.buffers)

    def packed(self, name: str) -> PackedState | None:
        """`WeightSource.packed`; None for norms."""
        stored = self._manifest.parameters.get(name)
        if stored is None or stored.header is None:
            return None
        return PackedState(stored.header, tuple(map(self._view, stored.buffers)))

    def vector(self, array: Concatenated) -> NDArray[Any]:
        """`WeightSource.vector`: of a norm, float32.

        Raises:
            ModelFileError: the engine has no such vector.
        """
        name = array.tensors[0][0]
        stored = self._manifest.parameters.get(name)
        if stored is None or len(stored.buffers) != 1 or stored.buffers[0][1] != 4 * array.shape[0]:
            raise ModelFileError(f"{MANIFEST}: parameters has no vector {printable(name)} of {array.shape[0]} values")
        return np.frombuffer(self._view(stored.buffers[0]), np.float32)

    def matrix(self, array: Concatenated) -> NDArray[Any]:
        """`WeightSource.matrix`: there are none that are not packed.

        Raises:
            ModelFileError: always.
        """
        raise ModelFileError(f"{MANIFEST}: {printable(array.tensors[0][0])} is not packed")

    def differ(self, one: str, other: str) -> bool:
        """A head that is there is one that differed."""
        return one in self.tensors and other in self.tensors

    def close(self) -> None:
        """The file stays mapped while weights use it."""
        self._memory = memoryview(b"")

    def __enter__(self) -> "EngineWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _view(self, span: Span) -> memoryview:
        start, size = span
        return self._memory[start : start + size]
