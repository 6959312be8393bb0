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
from quire.ops.cpu_layouts import BfloatLayout, relayout
from quire.ops.packed import ALIGNMENT, PackedState
from quire.ops.types import Provider
from quire.outputs import Decision
from quire.quant.types import Scheme
from quire.weights.formats.engine_dir import (
    SCHEMA,
    DecisionRecord,
    FileRecord,
    Golden,
    Manifest,
    Span,
    StoredParameter,
    digest_of,
)
from quire.weights.formats.engine_names import BUILDING, MANIFEST, WEIGHTS, is_engine
from quire.weights.formats.gguf_header import write_header
from quire.weights.formats.gguf_names import HEADER, part_paths
from quire.weights.formats.gguf_parts import GgufParts
from quire.weights.load import Progress, WeightPlan, open_source, plan_weights, read_model_config
from quire.weights.source import ModelConfig, WeightSource

COPIED = ("*.json", "*.jinja")
"""Of the model's own files: configuration, tokenizer, chat template; of a GGUF file its header."""
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
    """Of this machine, which packs."""
    instruction_set: str
    decisions: Sequence[Decision]
    """How it was chosen."""
    layout: BfloatLayout | None = None
    """That weights of bfloat16 get; None: the one that `ops` packs."""
    runs_here: bool = True
    """Whether this machine can ask the golden prompts."""


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
    repack: bool = False
    """The model is an engine: its weights as they are, in the target's layout."""
    treatment: Treatment | None = None
    """What else is to be made of the matrices than the scheme says of all."""


def build_engine(
    recipe: Recipe, target: Target, golden: Callable[[Path], list[Golden]], progress: Progress | None = None
) -> Manifest:
    """Build an engine. Peak memory is the largest parameter three times: read, quantised, packed.

    Args:
        golden: runs the engine in a directory, as its users will, and says what it answered; not called for a target
            that this machine does not run.
        progress: bytes of the source that are done, and all of them.

    Raises:
        ConfigurationError: the output is there already, another build writes it, or the disk is full.
        ModelFileError: a file of the model is missing or damaged.
    """
    if is_engine(recipe.directory) is not recipe.repack:
        raise ConfigurationError(_NO_ENGINE if recipe.repack else _ENGINE, field="repack" if recipe.repack else "model")
    if os.path.lexists(recipe.output):
        raise ConfigurationError(
            f"output: {recipe.output.name} is there already: remove it, or name another place", field="output"
        )
    try:
        with _workplace(recipe.output) as place:
            manifest = _written(recipe, target, place, progress)
            write_manifest(manifest, place)
            if target.runs_here:
                manifest = msgspec.structs.replace(manifest, golden=_merged(manifest.golden, golden(place)))
                write_manifest(manifest, place)
            (place / BUILDING).unlink()
            _sync(place)
            place.rename(recipe.output)
        _sync(recipe.output.parent)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ConfigurationError(f"output: the engine cannot be written: {reason}", field="output") from error
    return manifest


_ENGINE = (
    "model is an engine already: --repack packs it for another instruction set; for anything else build from what it "
    "was made of"
)
_NO_ENGINE = "repack is for an engine directory; this is none"


def _merged(before: list[Golden], now: list[Golden]) -> list[Golden]:
    """What other instruction sets answered stays true."""
    fresh = {one.instruction_set for one in now}
    return [*(one for one in before if one.instruction_set not in fresh), *now]


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that is this build's alone; gone at the end, if it is still there."""
    place = output.parent / f".{output.name}.building"
    place.mkdir(parents=True, exist_ok=True)
    lock = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _busy(output) from error
        if not _is_at(lock, place):  # it ended between the two, and the folder is an engine now, or gone
            raise _busy(output)
        try:
            for left in place.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            (place / BUILDING).write_text(str(os.getpid()))
            yield place
        finally:
            if _is_at(lock, place):
                shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def _busy(output: Path) -> ConfigurationError:
    return ConfigurationError(f"output: another build is writing {output.name}", field="output")


def _is_at(descriptor: int, place: Path) -> bool:
    """Whether the folder that was opened is the one there now."""
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except FileNotFoundError:
        return False


def _written(recipe: Recipe, target: Target, place: Path, progress: Progress | None) -> Manifest:
    config = read_model_config(recipe.directory)
    with open_source(recipe.directory, config) as opened:
        plan = plan_weights(config, opened, target.ops, _dtype(recipe, config), recipe.scheme)
        if recipe.treatment is not None:
            plan = treated_plan(plan, target.ops, recipe.treatment, place / CALIBRATED)
        _check_disk(place, plan)
        with (place / WEIGHTS).open("wb") as file:
            writer = _Writer(file)
            parameters = _pack_all(plan, target, writer, progress)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(place / CALIBRATED, ignore_errors=True)
        used = {name for one in plan.parameters.values() for array in one.arrays for name, _ in array.tensors}
        tensors = {
            name: (list(info.shape), "F32" if name in parameters else info.format)
            for name, info in plan.source.tensors.items()
            if name in used
        }
    files = {WEIGHTS: FileRecord(writer.size, writer.sha256), **_copied(recipe.directory, config, place)}
    if config.manifest is not None:
        return _repacked(config.manifest, target, parameters, files, recipe)
    return Manifest(
        schema=SCHEMA,
        quire_version=recipe.version,
        model=recipe.model,
        source={path.name: record_of(path) for path in _source_files(recipe.directory)},
        provider="reference" if target.instruction_set == "reference" else "cpu",
        instruction_set=target.instruction_set,
        dtype=plan.packer.dtype,
        quantization=recipe.quantization,
        quantization_group_size=None if recipe.scheme is None else recipe.scheme.linear.group_size,
        tensors=tensors,
        parameters=parameters,
        files=files,
        decisions=[_record(one) for one in (*target.decisions, _dtype_decision(recipe, config, plan), *plan.decisions)],
        golden=[],
    )


def _dtype(recipe: Recipe, config: ModelConfig) -> str:
    return recipe.dtype if config.manifest is None else config.manifest.dtype


def _dtype_decision(recipe: Recipe, config: ModelConfig, plan: WeightPlan) -> Decision:
    return Decision("dtype", plan.packer.dtype, config.dtype_reason if recipe.dtype == "auto" else "as asked")


def _record(decision: Decision) -> DecisionRecord:
    return DecisionRecord(decision.name, decision.value, decision.reason)


def _repacked(
    old: Manifest, target: Target, parameters: dict[str, StoredParameter], files: dict[str, FileRecord], recipe: Recipe
) -> Manifest:
    """The old manifest, with what is new; what was decided about the weights is as true as before."""
    before = f"{old.provider} {old.instruction_set}"
    moved = DecisionRecord("repacked", before, f"by quire {recipe.version} from an engine of quire {old.quire_version}")
    named = {one.name for one in target.decisions} | {moved.name}
    kept = [one for one in old.decisions if one.name not in named]
    return msgspec.structs.replace(
        old,
        quire_version=recipe.version,
        instruction_set=target.instruction_set,
        parameters=parameters,
        files=files,
        decisions=[*map(_record, target.decisions), moved, *kept],
    )


def _source_files(model: Path) -> list[Path]:
    if model.is_dir():
        return [*sorted(model.glob("*.safetensors")), *_own_files(model)]
    return list(part_paths(model))


def _copied(model: Path, config: ModelConfig, place: Path) -> dict[str, FileRecord]:
    """The model's own files in the engine. Of an engine those that its manifest names, so no stray ones."""
    if config.gguf is not None and not model.is_dir():
        with GgufParts(model, config.gguf) as parts:
            write_header(parts, place / HEADER)
        names = [HEADER]
    elif config.manifest is not None:
        names = sorted(name for name in config.manifest.files if name != WEIGHTS)
    else:
        names = [path.name for path in _own_files(model)]
    for name in names:
        if not (place / name).exists():
            shutil.copyfile(model / name, place / name)
        _sync(place / name)
    return {name: record_of(place / name) for name in names}


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


def _pack_all(
    plan: WeightPlan, target: Target, writer: _Writer, progress: Progress | None
) -> dict[str, StoredParameter]:
    source = plan.source
    total_bytes = sum(map(source.size_bytes, plan.parameters.values()))
    found: dict[str, StoredParameter] = {}
    done_bytes = 0
    for name, parameter in plan.parameters.items():
        if parameter.kind in ("rms_norm", "layer_norm"):
            found.update(_vectors(parameter, source, writer))
        else:
            state = source.packed(name) or plan.packer.ops.packed_state(plan.packer.pack(parameter, source))
            if target.layout is not None:
                state = _in_layout(name, state, target.layout)
            found[name] = StoredParameter([writer.add(buffer) for buffer in state.buffers], state.header)
        done_bytes += source.size_bytes(parameter)
        if progress is not None:
            progress(done_bytes, total_bytes)
    return found


def _in_layout(name: str, state: PackedState, layout: BfloatLayout) -> PackedState:
    try:
        return relayout(state, layout)
    except ValueError as error:
        raise ModelFileError(f"{name} cannot be packed for another instruction set: {error}") from error


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
