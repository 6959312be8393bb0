"""From a model's directory to an engine directory: packed parameter by parameter, written beside its place, moved there
whole.

Whatever stops a build leaves a folder `.NAME.building` that nothing takes for an engine; the next build clears it.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from quire.build.calibrate.treat import Treatment, treated_plan
from quire.errors import ConfigurationError, ModelFileError
from quire.models.parameters import Parameter
from quire.ops.packed import ALIGNMENT
from quire.ops.types import Provider
from quire.outputs import Decision
from quire.quant.types import Scheme
from quire.weights.formats.engine_dir import (
    BUILDING,
    MANIFEST,
    SCHEMA,
    WEIGHTS,
    DecisionRecord,
    FileRecord,
    Golden,
    Manifest,
    Span,
    StoredParameter,
    digest_of,
    is_engine,
)
from quire.weights.load import Progress, WeightPlan, open_source, plan_weights, read_model_config
from quire.weights.source import WeightSource

COPIED = ("*.json", "*.jinja")
"""Of the model's own files: configuration, tokenizer, chat template."""
NOT_COPIED = ("*.safetensors.index.json",)
READ_BYTES = 2**20
CALIBRATED = "calibrated"
"""A folder of the workplace, gone before the engine is one."""
MARGIN = 1.02
"""Of the estimate of the size: padding, manifest, tokenizer."""


@dataclass(frozen=True, slots=True)
class Target:
    """What an engine is built for."""

    ops: Provider
    instruction_set: str
    decisions: Sequence[Decision]
    """How it was chosen."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is built from what.

    Args of `quire build`; see `EngineArgs`.
    """

    model: str
    """As it was named."""
    directory: Path
    output: Path
    version: str
    """Of Quire."""
    dtype: str = "auto"
    quantization: str | None = None
    scheme: Scheme | None = None
    treatment: Treatment | None = None
    """What else is to be made of the matrices than the scheme says of all."""


def build_engine(
    recipe: Recipe, target: Target, golden: Callable[[Path], list[Golden]], progress: Progress | None = None
) -> Manifest:
    """Build an engine. Peak memory is the largest parameter three times: read, quantised, packed.

    Args:
        golden: runs the engine in a directory, as its users will, and says what it answered.
        progress: bytes of the source that are done, and all of them.

    Raises:
        ConfigurationError: the output is there already, another build writes it, or the disk is full.
        ModelFileError: a file of the model is missing or damaged.
    """
    if is_engine(recipe.directory):
        raise ConfigurationError("model is an engine already: build from the checkpoint it was made of", field="model")
    if os.path.lexists(recipe.output):
        raise ConfigurationError(f"output: {recipe.output.name} is there already: remove it, or name another place", field="output")
    with _workplace(recipe.output) as place:
        try:
            manifest = _written(recipe, target, place, progress)
            write_manifest(manifest, place)
            manifest = msgspec.structs.replace(manifest, golden=golden(place))
            write_manifest(manifest, place)
            (place / BUILDING).unlink()
            _sync(place)
            place.rename(recipe.output)
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise ConfigurationError(f"output: the engine cannot be written: {reason}", field="output") from error
    _sync(recipe.output.parent)
    return manifest


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that is this build's alone; gone at the end, if it is still there."""
    place = output.parent / f".{output.name}.building"
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ConfigurationError(f"output: {output.name} cannot be made: {reason}", field="output") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(f"output: another build is writing {output.name}", field="output") from error
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (place / BUILDING).write_text(str(os.getpid()))
        try:
            yield place
        finally:
            if place.exists() and os.path.samestat(os.fstat(lock), place.stat()):
                shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def _written(recipe: Recipe, target: Target, place: Path, progress: Progress | None) -> Manifest:
    if not recipe.directory.is_dir():
        raise ConfigurationError("model: GGUF files run as they are; an engine is built from a checkpoint of safetensors", field="model")
    config = read_model_config(recipe.directory)
    source_files = [*sorted(recipe.directory.glob("*.safetensors")), *_own_files(recipe.directory)]
    with open_source(recipe.directory, config) as opened:
        plan = plan_weights(config, opened, target.ops, recipe.dtype, recipe.scheme)
        if recipe.treatment is not None:
            plan = treated_plan(plan, target.ops, recipe.treatment, place / CALIBRATED)
        _check_disk(place, plan)
        with (place / WEIGHTS).open("wb") as file:
            writer = _Writer(file)
            parameters = _pack_all(plan, writer, progress)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(place / CALIBRATED, ignore_errors=True)
        used = {name for one in plan.parameters.values() for array in one.arrays for name, _ in array.tensors}
        tensors = {
            name: (list(info.shape), "F32" if name in parameters else info.format)
            for name, info in plan.source.tensors.items()
            if name in used
        }
    files = {WEIGHTS: FileRecord(writer.size, writer.sha256)}
    for path in _own_files(recipe.directory):
        shutil.copyfile(path, place / path.name)
        _sync(place / path.name)
        files[path.name] = record_of(place / path.name)
    return Manifest(
        schema=SCHEMA,
        quire_version=recipe.version,
        model=recipe.model,
        source={path.name: record_of(path) for path in source_files},
        provider="reference" if target.instruction_set == "reference" else "cpu",
        instruction_set=target.instruction_set,
        dtype=plan.packer.dtype,
        quantization=recipe.quantization,
        quantization_group_size=None if recipe.scheme is None else recipe.scheme.linear.group_size,
        tensors=tensors,
        parameters=parameters,
        files=files,
        decisions=[DecisionRecord(one.name, one.value, one.reason) for one in (*target.decisions, *plan.decisions)],
        golden=[],
    )


def _own_files(directory: Path) -> list[Path]:
    left_out = {path for pattern in NOT_COPIED for path in directory.glob(pattern)}
    return sorted({path for pattern in COPIED for path in directory.glob(pattern)} - left_out)


def _check_disk(place: Path, plan: WeightPlan) -> None:
    needed, free = int(plan.num_bytes * MARGIN), shutil.disk_usage(place).free
    if needed > free:
        text = f"output: the engine takes {needed / 2**20:,.0f} MiB; {free / 2**20:,.0f} MiB are free there"
        raise ConfigurationError(text, field="output")


class _Writer:
    """Appends buffers to a file, each at a multiple of `ALIGNMENT`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()

    def add(self, buffer: Any) -> Span:
        """Write; where it lies."""
        data = memoryview(buffer).cast("B")
        self._write(bytes(-self.size % ALIGNMENT))
        start = self.size
        self._write(data)
        return start, len(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)


def _pack_all(plan: WeightPlan, writer: _Writer, progress: Progress | None) -> dict[str, StoredParameter]:
    source = plan.source
    total_bytes = sum(map(source.size_bytes, plan.parameters.values()))
    found: dict[str, StoredParameter] = {}
    done_bytes = 0
    for name, parameter in plan.parameters.items():
        if parameter.kind in ("rms_norm", "layer_norm"):
            found.update(_vectors(parameter, source, writer))
        else:
            state = plan.packer.ops.packed_state(plan.packer.pack(parameter, source))
            found[name] = StoredParameter([writer.add(buffer) for buffer in state.buffers], state.header)
        done_bytes += source.size_bytes(parameter)
        if progress is not None:
            progress(done_bytes, total_bytes)
    return found


def _vectors(parameter: Parameter, source: WeightSource, writer: _Writer) -> Iterator[tuple[str, StoredParameter]]:
    for array in parameter.arrays:
        vector = np.ascontiguousarray(source.vector(array), np.float32)
        yield array.tensors[0][0], StoredParameter([writer.add(vector)])


def write_manifest(manifest: Manifest, place: Path) -> None:
    """Write the manifest, with the digest of its content."""
    data = msgspec.json.encode(msgspec.structs.replace(manifest, digest=digest_of(manifest)))
    (place / MANIFEST).write_bytes(msgspec.json.format(data, indent=1))
    _sync(place / MANIFEST)


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file.

    Raises:
        ModelFileError: it cannot be read.
    """
    found, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(READ_BYTES):
                found.update(data)
                size += len(data)
    except OSError as error:
        raise ModelFileError(f"{path.name}: {(error.strerror or 'cannot be read').lower()}") from error
    return FileRecord(size, found.hexdigest())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
