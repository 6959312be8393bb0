"""The contract of whatever holds a model's weights: safetensors, GGUF, quantised checkpoints, engine directories."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from quire.models.parameters import Concatenated, NameMap, Parameter
from quire.models.spec import DecoderSpec
from quire.ops.packed import PackedState
from quire.ops.types import (
    BLOCK_FORMATS,
    QuantizedFormat,
    QuantizedWeight,
    QuantSpec,
    StoredWeight,
    WeightDtype,
)
from quire.outputs import Decision

if TYPE_CHECKING:
    from quire.weights.formats.engine_dir import Manifest
    from quire.weights.formats.gguf_parts import GgufParts
    from quire.weights.formats.quantized.scheme import Quantization

StoredMatrix = NDArray[Any] | StoredWeight | QuantizedWeight
"""`[out, in]`: values in memory (float32, float16 or ml_dtypes.bfloat16), values still in their files, or values that
are quantised already. Good until the next matrix is read."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    format: str
    """As the source names it: `BF16`, `F32`, `Q4_K`."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What `config.json` or the header of a GGUF file says, before any weight is read."""

    spec: DecoderSpec
    names: NameMap
    dtype: WeightDtype | None
    """Of the weights, if the config states it; what a GGUF file's blocks are unpacked to."""
    dtype_reason: str = "the checkpoint's own"
    """Why it is taken where nothing else is asked for."""
    quantization: "Quantization | None" = None
    """How the checkpoint's weights are quantised, if they are."""
    rotated_heads: Mapping[str, int] = field(default_factory=dict)
    """Of a GGUF file, as `GgufWeights` takes it."""
    gguf: "GgufParts | None" = None
    """Of a GGUF file, or an engine built of one: its headers, closed, for those who read them again."""
    manifest: "Manifest | None" = None
    """Of an engine directory."""
    family: str = ""
    """The model's `model_type`, or its architecture as a GGUF header has it."""
    stored_as: str = ""
    """Most weights, in the words of their tools: `awq`, `Q4_K_M`; empty where nothing says it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the engine makes of a quantised checkpoint or of a GGUF file's blocks."""

    dtype: WeightDtype
    """That matrices are unpacked to."""
    formats: tuple[QuantizedFormat, ...]
    """That the provider multiplies."""
    unpack: str | None
    """Why every matrix is unpacked; None: those that a format holds exactly stay as they are."""
    tables: frozenset[str] = frozenset()
    """Names of embedding and head."""
    transposed: bool = False
    """The model names linear weights as `[in, out]`."""

    @property
    def has_blocks(self) -> bool:
        """Whether the provider has the formats of blocks: one without looks up rows of tables with one scale alone."""
        return not BLOCK_FORMATS.isdisjoint(self.formats)


class WeightSource(Protocol):
    """The tensors of one model. Names, shapes and formats are known at once; values are read by the
    methods that return them. Closed by its user."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name."""

    def size_bytes(self, parameter: Parameter) -> int:
        """Bytes of a parameter in the source."""

    def packed(self, name: str) -> PackedState | None:
        """The decoder's parameter `name`, where the source holds it as a provider packed it; None where it holds
        tensors."""

    def matrix(self, array: Concatenated) -> StoredMatrix:
        """Tensors as one matrix. Raises ModelFileError where a file is damaged, now or when a lazy one is read."""

    def vector(self, array: Concatenated) -> NDArray[Any]:
        """Tensors as one vector `[size]` of a floating-point type. Raises ModelFileError where a file is damaged."""

    def differ(self, one: str, other: str) -> bool:
        """Whether both tensors are there and have different values."""

    def close(self) -> None:
        """Release files and memory; what was read lazily and not packed is lost."""


class DecidedSource(WeightSource, Protocol):
    """A source that knows of each matrix what it is quantised to."""

    def quantized(self, parameter: Parameter) -> QuantSpec | None:
        """The format of the `QuantizedWeight` that a matrix was or will be; None where it is none, or not known yet."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Tensors that may be there and that nothing reads."""

    def decisions(self) -> list[Decision]:
        """What became of the matrices, and why, once all have been read."""
