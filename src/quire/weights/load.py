"""From a model's files, Hugging Face's or GGUF, to a model whose weights are packed for one provider."""

import fnmatch
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from quire.errors import ConfigurationError, ModelFileError
from quire.models.decoder import Decoder, Weights
from quire.models.model import Model
from quire.models.parameters import NameMap, Parameter, decoder_parameters
from quire.models.registry import load_spec
from quire.models.spec import DecoderSpec
from quire.ops.types import FORMATS, CacheDtype, Provider, QuantSpec, WeightDtype
from quire.outputs import Decision
from quire.quant.types import Scheme
from quire.weights.formats.engine_dir import EngineWeights, read_manifest
from quire.weights.formats.engine_names import is_engine
from quire.weights.formats.gguf_names import header_path, is_gguf
from quire.weights.formats.quantized import KEYS, states_quantization
from quire.weights.formats.safetensors import DTYPES_BY_FORMAT, CheckpointWeights
from quire.weights.json_file import printable, read_json_object
from quire.weights.pack import WeightPacker
from quire.weights.source import DecidedSource, ModelConfig, Target, TensorInfo, WeightSource

if TYPE_CHECKING:
    from quire.weights.formats.gguf import GgufWeights

MAX_CONFIG_BYTES = 4 * 2**20

Report = Callable[[list[Decision]], None]
Progress = Callable[[int, int], None]
"""`progress(bytes done, bytes in all)`, after each parameter."""


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What of a source becomes which parameter of the decoder, and how it is packed."""

    spec: DecoderSpec
    parameters: Mapping[str, Parameter]
    packer: WeightPacker
    source: WeightSource
    """What the parameters are read from: the one that was opened, or what unpacks it."""
    quantized: DecidedSource | None = None
    """The same, where each matrix has a format of its own: of a quantised checkpoint, a GGUF file, or a calibration."""

    @property
    def num_bytes(self) -> int:
        """Of all parameters once packed. Matrices of a quantised checkpoint count as unpacked until they are read, a
        GGUF file's do not."""
        return sum(self._num_bytes(name, one) for name, one in self.parameters.items())

    @property
    def decisions(self) -> list[Decision]:
        """What has been decided about the matrices of `quantized`, once they have been read."""
        return [] if self.quantized is None else self.quantized.decisions()

    @property
    def given(self) -> Mapping[str, QuantSpec | None]:
        """By parameter, what the source holds it as, as far as it says before it is read; None: values."""
        return {name: self._given(name, one) for name, one in self.parameters.items()}

    def _num_bytes(self, name: str, parameter: Parameter) -> int:
        state = self.source.packed(name)
        is_kept = state is not None and state.header.format in get_args(WeightDtype)
        packer = replace(self.packer, scheme=None) if is_kept else self.packer
        return packer.num_bytes(parameter, self._given(name, parameter))

    def _given(self, name: str, parameter: Parameter) -> QuantSpec | None:
        """What the source has quantised a matrix to, or its engine was packed with."""
        if self.quantized is not None:
            return self.quantized.quantized(parameter)
        state = self.source.packed(name)
        if state is None or not state.header.group_size:
            return None
        header = state.header
        kind = next((kind for kind in FORMATS if kind == header.format), None)
        if kind is None:
            return None
        return QuantSpec(
            kind, header.group_size if FORMATS[kind].group_sizes else None, header.scale_dtype == "float16"
        )


def read_model_config(path: Path) -> ModelConfig:
    """Read `config.json` of a directory, or the header of a GGUF file; of an engine directory the manifest first.

    Raises:
        ModelFileError: it is missing or damaged.
        UnsupportedModelError: an architecture or a setting that Quire does not have, named.
    """
    manifest = read_manifest(path) if is_engine(path) else None
    if header := header_path(path):
        from quire.weights.formats.gguf_config import read_gguf_config  # not above: few models are GGUF files

        return replace(read_gguf_config(header), manifest=manifest)
    config = read_json_object(path / "config.json", MAX_CONFIG_BYTES)
    spec, names = load_spec({key: value for key, value in config.items() if key not in KEYS})
    stated = config.get("dtype", config.get("torch_dtype"))
    known = isinstance(stated, str) and stated in get_args(WeightDtype)
    quantization = None
    if states_quantization(path, config):
        from quire.weights.formats.quantized.config import read_quantization

        quantization = read_quantization(path, config)
    dtype = cast(WeightDtype, stated) if known else None
    family, stored_as = str(config.get("model_type", "")), "" if quantization is None else quantization.method
    return ModelConfig(
        spec, names, dtype, quantization=quantization, manifest=manifest, family=family, stored_as=stored_as
    )


def load_model(
    path: Path,
    ops: Provider,
    dtype: str = "auto",
    max_model_len: int | None = None,
    progress: Progress | None = None,
    scheme: Scheme | None = None,
    report: Report | None = None,
    config: ModelConfig | None = None,
    cache_dtype: CacheDtype | None = None,
) -> Model:
    """Read, check and pack a model. Peak memory is what is packed and the largest tensor twice.

    Args:
        path: a directory, or a GGUF file.
        dtype: of weights. `auto` is the type that the config states, else the one that the tensors have; a
            float32 checkpoint stays float32.
        max_model_len: positions that the model must be able to compute; None is all that it has.
        scheme: how weights are quantised; None is not at all, or as the checkpoint's are.
        report: takes what has been decided about a quantised checkpoint or a GGUF file.
        config: what `read_model_config` says, if it was read: the header of a large vocabulary takes a while.
        cache_dtype: of keys and values; None is the type of the weights.

    Raises:
        ModelFileError: a file is missing or damaged; a tensor is missing, left over or of a wrong shape.
        UnsupportedModelError: an architecture or a setting that Quire does not have.
        ConfigurationError: `max_model_len` exceeds the model's positions.
    """
    config = config or read_model_config(path)
    spec = config.spec
    if max_model_len is not None and not 1 <= max_model_len <= spec.max_position_embeddings:
        raise ConfigurationError(
            f"max_model_len is {max_model_len}; the model has {spec.max_position_embeddings} positions",
            field="max_model_len",
        )
    with open_source(path, config) as source:
        plan = plan_weights(config, source, ops, dtype, scheme)
        weights = load_weights(plan.parameters, plan.source, plan.packer, progress)
        if report is not None:
            report(plan.decisions)
        longest = max_model_len or spec.max_position_embeddings
        return Decoder(plan.spec, weights, ops, plan.packer.dtype, longest, plan.num_bytes, cache_dtype)


def open_source(path: Path, config: ModelConfig) -> "CheckpointWeights | EngineWeights | GgufWeights":
    """The weights of a directory or a GGUF file, whatever they are stored as.

    Raises:
        ModelFileError: a file is missing or damaged.
    """
    if config.manifest is not None:
        return EngineWeights(path, config.manifest)
    if is_gguf(path):
        from quire.weights.formats.gguf import GgufWeights

        return GgufWeights(path, config.rotated_heads, config.gguf)
    return CheckpointWeights(path)


def plan_weights(
    config: ModelConfig, source: WeightSource, ops: Provider, dtype: str = "auto", scheme: Scheme | None = None
) -> WeightPlan:
    """Which tensors become which parameters; every tensor has its place. Arguments as for `load_model`.

    Raises:
        ModelFileError: a tensor is missing, left over or of a wrong shape.
    """
    spec, names = config.spec, _fit_prefix(config.names, source.tensors)
    embedding, head = f"{names.prefix}{names.embedding}.weight", f"{names.head}.weight"
    weight_dtype = _weight_dtype(dtype, config.dtype, source.tensors.get(embedding))
    unpack = "dtype is float32" if dtype == "float32" else None if scheme is None else f"quantization {scheme.name}"
    target = Target(weight_dtype, ops.formats, unpack, frozenset({embedding, head}), names.transposed)
    quantized = _quantized(source, config, target)
    source = source if quantized is None else quantized
    # A tied head is saved a second time by some tools; one that differs is no tied head, whatever the config says.
    if spec.tied_head and source.differ(embedding, head):
        spec = replace(spec, tied_head=False)
    parameters = decoder_parameters(spec, names)
    unused = *names.unused, *(() if quantized is None else quantized.unused)
    check_tensors(parameters, source.tensors, (*unused, head) if spec.tied_head else unused)
    packer = WeightPacker(ops, weight_dtype, scheme, spec.norm.weight_offset)
    return WeightPlan(spec, parameters, packer, source, quantized)


def _quantized(source: WeightSource, config: ModelConfig, target: Target) -> DecidedSource | None:
    """What keeps or unpacks the numbers of a source; None where it holds values, or packed weights."""
    if config.quantization is not None and isinstance(source, CheckpointWeights):
        from quire.weights.formats.quantized.source import QuantizedWeights

        return QuantizedWeights(source, config.quantization, target)
    if config.gguf is None:
        return None
    from quire.weights.formats.gguf import GgufWeights
    from quire.weights.formats.gguf_packed import GgufBlocks

    return GgufBlocks(source, target) if isinstance(source, GgufWeights) else None


def load_weights(
    parameters: Mapping[str, Parameter],
    source: WeightSource,
    packer: WeightPacker,
    progress: Progress | None = None,
) -> Weights:
    """Read and pack every parameter, one after another: what `Decoder` is made of. At any time what is packed and one
    parameter are in memory.

    Raises:
        ModelFileError: a file is damaged, or a tensor cannot be packed; it names the tensors.
    """
    total_bytes = sum(source.size_bytes(parameter) for parameter in parameters.values())
    weights, done_bytes = {}, 0
    for name, parameter in parameters.items():
        state = source.packed(name)
        weights[name] = packer.pack(parameter, source) if state is None else packer.map(parameter, state)
        done_bytes += source.size_bytes(parameter)
        if progress is not None:
            progress(done_bytes, total_bytes)
    return weights


def check_tensors(
    parameters: Mapping[str, Parameter], tensors: Mapping[str, TensorInfo], unused: tuple[str, ...]
) -> None:
    """Every tensor of the parameters must be there with its shape, and nothing else but `unused` patterns.

    Raises:
        ModelFileError: names the first tensors that are missing, wrongly shaped or left over.
    """
    wanted = {
        name: shape for parameter in parameters.values() for array in parameter.arrays for name, shape in array.tensors
    }
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ModelFileError(f"the checkpoint lacks {_first_of(missing)}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ModelFileError(f"{name} has the shape {list(tensors[name].shape)}; the config asks for {list(shape)}")
    extra = [name for name in tensors if name not in wanted]
    extra = [name for name in extra if not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)]
    if extra:
        raise ModelFileError(f"the checkpoint has tensors that the model does not: {_first_of(extra)}")


def _first_of(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _fit_prefix(names: NameMap, tensors: Container[str]) -> NameMap:
    """The map with the prefix that this checkpoint uses."""
    for prefix in (names.prefix, *names.other_prefixes):
        if f"{prefix}{names.embedding}.weight" in tensors:
            return replace(names, prefix=prefix)
    return names


def _weight_dtype(dtype: str, stated: WeightDtype | None, embedding: TensorInfo | None) -> WeightDtype:
    if dtype in get_args(WeightDtype):
        return cast(WeightDtype, dtype)
    if dtype != "auto":
        known = ", ".join(get_args(WeightDtype))
        raise ConfigurationError(f"dtype must be one of auto, {known}, got {dtype!r}", field="dtype")
    return stated or DTYPES_BY_FORMAT.get(embedding.format if embedding else "", "bfloat16")
