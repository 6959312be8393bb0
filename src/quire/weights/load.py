"""From a directory of Hugging Face files to a model whose weights are packed for one provider."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from quire.errors import ConfigurationError
from quire.models.decoder import Decoder
from quire.models.model import Model
from quire.models.registry import load_spec
from quire.models.spec import DecoderSpec
from quire.models.weights_map import NameMap, Parameter, decoder_parameters
from quire.ops.types import Provider, StoredWeight, WeightDtype
from quire.quant.types import Scheme
from quire.weights.checkpoint import STORAGE_BY_DTYPE, Checkpoint, check_tensors
from quire.weights.generation_config import GenerationDefaults, load_generation_defaults
from quire.weights.json_file import read_json_object

__all__ = [
    "GenerationDefaults",
    "ModelConfig",
    "load_generation_defaults",
    "load_model",
    "read_model_config",
    "read_spec",
]

MAX_CONFIG_BYTES = 4 * 2**20

Progress = Callable[[int, int], None]
"""`progress(bytes done, bytes in all)`, after each part."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What `config.json` says, before any weight is read."""

    spec: DecoderSpec
    names: NameMap
    storage: WeightDtype | None
    """The type that the config states, if it states one."""


def read_model_config(directory: Path) -> ModelConfig:
    """Read `config.json`.

    Raises:
        ModelFileError: it is missing or damaged.
        UnsupportedModelError: an architecture or a setting that Quire does not have, named.
    """
    config = read_json_object(directory / "config.json", MAX_CONFIG_BYTES)
    spec, names = load_spec(config)
    stated = config.get("dtype", config.get("torch_dtype"))
    known = isinstance(stated, str) and stated in get_args(WeightDtype)
    return ModelConfig(spec, names, cast(WeightDtype, stated) if known else None)


def read_spec(directory: Path) -> DecoderSpec:
    """The architecture alone; errors as `read_model_config`."""
    return read_model_config(directory).spec


def load_model(
    directory: Path,
    ops: Provider,
    dtype: str = "auto",
    max_model_len: int | None = None,
    progress: Progress | None = None,
    scheme: Scheme | None = None,
) -> Model:
    """Read, check and pack a model. Peak memory is what is packed and the largest tensor twice.

    Args:
        dtype: storage of weights and cache. `auto` is the type that the config states, else the one that the
            tensors have; a float32 checkpoint stays float32.
        max_model_len: positions that the model must be able to compute; None is all that it has.
        scheme: how weights are rounded; None is not at all.

    Raises:
        ModelFileError: a file is missing or damaged; a tensor is missing, left over or of a wrong shape.
        UnsupportedModelError: an architecture or a setting that Quire does not have.
        ConfigurationError: `max_model_len` exceeds the model's positions.
    """
    config = read_model_config(directory)
    spec = config.spec
    if max_model_len is not None and not 1 <= max_model_len <= spec.max_position_embeddings:
        raise ConfigurationError(
            f"max_model_len is {max_model_len}; the model has {spec.max_position_embeddings} positions",
            field="max_model_len",
        )
    with Checkpoint(directory) as checkpoint:
        names = _fit_prefix(config.names, checkpoint.shapes)
        embedding, head = f"{names.prefix}{names.embedding}.weight", f"{names.head}.weight"
        # A tied head is saved a second time by some tools; one that differs is no tied head, whatever the config says.
        if spec.tied_head and checkpoint.differ(embedding, head):
            spec = replace(spec, tied_head=False)
        parameters = decoder_parameters(spec, names)
        check_tensors(parameters, checkpoint.shapes, (*names.unused, head) if spec.tied_head else names.unused)
        storage = _storage(dtype, config.storage, checkpoint.dtype(embedding))
        source = _Parts(checkpoint, parameters, progress)
        model = Decoder(spec, names, ops, source, storage, max_model_len or spec.max_position_embeddings, scheme)
        source.finish()
        return model


class _Parts:
    """The parts of a checkpoint; reports progress as they are taken."""

    def __init__(self, checkpoint: Checkpoint, parameters: dict[str, Parameter], progress: Progress | None) -> None:
        self._checkpoint = checkpoint
        self._parameters = parameters
        self._progress = progress
        self._memory = _Memory()
        self._taken_bytes = 0
        self._total_bytes = sum(checkpoint.size_bytes(parameter) for parameter in parameters.values())

    def part(self, name: str) -> NDArray[Any] | StoredWeight:
        self._report(self._taken_bytes)  # who asks for the next part has packed the one before
        parameter = self._parameters[name]
        self._taken_bytes += self._checkpoint.size_bytes(parameter)
        read = partial(self._checkpoint.read, parameter, self._memory.take)
        return self._checkpoint.stored(parameter, read) or read()

    def finish(self) -> None:
        """Report that all is done."""
        self._report(self._total_bytes)

    def _report(self, done_bytes: int) -> None:
        if self._progress is not None and done_bytes:
            self._progress(done_bytes, self._total_bytes)


class _Memory:
    """Arrays for parts to be read into. Large ones share one piece of memory, so no new pages are asked for with each:
    the system has to clear those, which takes longer than reading into them."""

    SHARED_BYTES = 2**20

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A contiguous array with anything in it; a large one is good until the next large one is taken."""
        size = math.prod(shape) * dtype.itemsize
        if len(shape) < 2 or size < self.SHARED_BYTES:
            return np.empty(shape, dtype)
        if not size <= len(self._bytes) <= 4 * size:
            self._bytes = np.empty(0, np.uint8)  # given back before more is asked for
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


def _fit_prefix(names: NameMap, tensors: dict[str, Any]) -> NameMap:
    """The map with the prefix that this checkpoint uses."""
    for prefix in (names.prefix, *names.other_prefixes):
        if f"{prefix}{names.embedding}.weight" in tensors:
            return replace(names, prefix=prefix)
    return names


def _storage(dtype: str, stated: WeightDtype | None, embedding_dtype: str) -> WeightDtype:
    if dtype in get_args(WeightDtype):
        return cast(WeightDtype, dtype)
    if dtype != "auto":
        known = ", ".join(get_args(WeightDtype))
        raise ConfigurationError(f"dtype must be one of auto, {known}, got {dtype!r}", field="dtype")
    return stated or STORAGE_BY_DTYPE.get(embedding_dtype, "bfloat16")
