"""The contract between models and devices: what a model is written over (`Ops`) and where it runs (`Device`).

An *array* is what the provider computes with: `numpy.ndarray` on the CPU, `torch.Tensor` on CUDA. On the CPU
activations are float32; weights and cache are bfloat16, float16, float32 or 8 bits inside packed objects that
only their provider looks into.

**Row independence.** The result for one token (or one row of logits) does not depend on which others are
computed with it, on the number of threads, on how a prompt is cut into chunks, or on `block_size`. Each
provider keeps reduction orders as fixed functions of the token's own position and the shapes of the weights.

A device that has no room for weights or cache raises MemoryError. A provider that checks its arguments raises
ValueError on a shape, dtype, layout or index that is not as stated, before it computes anything.

Two-dimensional and three-dimensional inputs may be views: the last dimension (the last two for
`[tokens, heads, head_dim]`) is contiguous, the first may be strided. Results are fresh contiguous arrays
unless the operation says that it works in place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from quire.ops.packed import PackedStore
from quire.outputs import Decision

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    # For type checkers, numpy's: torch's types are not read (`follow_imports` in pyproject.toml), and code above the
    # providers uses what the two have in common. ops/cuda names its tensors itself.
    Array: TypeAlias = NDArray[Any]
else:
    Array = Any
Opaque = Any
"""Something packed by a provider; only the same provider looks inside."""

WeightDtype = Literal["bfloat16", "float16", "float32"]
CacheDtype = Literal["bfloat16", "float16", "float32", "int8", "fp8"]
CACHE_QMAX: dict[CacheDtype, int] = {"int8": 127, "fp8": 448}
"""The largest number of a cache of 8 bits: its keys and values are numbers times scales (`ReferenceOps.attention`)."""
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QuantizedFormat = Literal[
    "int8", "int8_w8a8", "int4", "int4_w4a8", "fp8", "int8_groups", "int4_min", "int8_min", "fp8_groups"
]


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """What a `QuantizedFormat` is."""

    bits: int
    activation_qmax: int
    """The largest quantised activation: see `QuantizedWeight`. 32639 is 127 * 257, two signed bytes; 0: activations are
    not quantised."""
    low: int
    high: int
    """The least and the largest number of a weight."""
    group_sizes: tuple[int, ...] = ()
    """Inputs that may share a scale; none: a whole row does."""
    has_minima: bool = False


HALF_SCALES: frozenset[QuantizedFormat] = frozenset(("int8_groups", "int4_min", "int8_min"))
"""Formats whose scales may be float16."""
BLOCK_FORMATS = HALF_SCALES | {"fp8_groups"}
"""Formats with groups of 8 bits, or with minima: the CPU alone multiplies them."""
E4M3_FORMATS: frozenset[QuantizedFormat] = frozenset(("fp8", "fp8_groups"))
"""Formats whose values are e4m3 (arXiv 2209.05433)."""
_BLOCKS = (16, 32, 64, 128)
FORMATS: dict[QuantizedFormat, NumberFormat] = {
    "int8": NumberFormat(8, 32639, -127, 127),
    "int8_w8a8": NumberFormat(8, 127, -127, 127),
    "int4": NumberFormat(4, 32639, -8, 7, (32, 64, 128)),
    "int4_w4a8": NumberFormat(4, 127, -8, 7, (32, 64, 128)),
    "fp8": NumberFormat(8, 448, -448, 448),
    "int8_groups": NumberFormat(8, 32639, -128, 127, _BLOCKS),
    "int4_min": NumberFormat(4, 32639, 0, 15, _BLOCKS, has_minima=True),
    "int8_min": NumberFormat(8, 32639, -128, 127, _BLOCKS, has_minima=True),
    "fp8_groups": NumberFormat(8, 0, -448, 448, _BLOCKS),
}
ACTIVATION_QMAX: dict[QuantizedFormat, int] = {name: one.activation_qmax for name, one in FORMATS.items()}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in small numbers: `weight[o, i] = values[o, i] * scales[o, g] + minima[o, g]`, `g = i // group_size`;
    where the format has no minima they are 0.

    Activations are quantised dynamically, per token: a row becomes `q = rint(x * (qmax / absmax))`, ties to even,
    with its own largest magnitude `absmax` and the format's `qmax` (`ACTIVATION_QMAX`): 7 bits and a sign for
    `int8_w8a8` and `int4_w4a8`, 15 bits and a sign for the other integers (about as exact as bfloat16 for a row's small
    inputs, far more exact for its large ones). A group's integer dot product `d[o, g] = sum_(i in g) q[i] values[o, i]`
    and the sum of its inputs `s[g] = sum_(i in g) q[i]` are exact and become one float32 each; the result is
    `absmax / qmax * sum_g (scales[o, g] * float32(d[o, g]) + minima[o, g] * float32(s[g]))`.

    So a weight is multiplied before `values * scales + minima` is rounded to float32, which a table of embeddings does
    (the product, then the sum, as ggml does): the two differ by half a unit in the last place of the weight.

    With `fp8` values and activations are e4m3 (arXiv 2209.05433: 4 bits of exponent, 3 of mantissa, at most 448),
    rounded to nearest, ties to even; sums are float32, whose order is the provider's. With `fp8_groups` values
    are e4m3 and activations stay as they are: `sum_g scales[o, g] * d[o, g]`, each `d` a float32 sum over its group.

    Raises:
        ValueError: shapes or dtypes are not as stated. (Values outside their range are refused when packed.)
    """

    format: QuantizedFormat
    values: Array  # [out, in] int8 in the range of `FORMATS`, one a byte; `E4M3_FORMATS`: ml_dtypes.float8_e4m3fn
    scales: Array  # [out, ceil(in / group_size)] float32, or float16 where they are that in the provider's memory too
    group_size: int
    """Inputs that share a scale: one of `FORMATS`, or all of them (`in`)."""
    minima: Array | None = None
    """As `scales`, where the format has them."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        kind = "float8_e4m3fn" if self.format in E4M3_FORMATS else "int8"
        if self.values.ndim != 2 or str(self.values.dtype).removeprefix("torch.") != kind:
            raise ValueError(f"values are {self.values.dtype} {list(self.values.shape)}, not {kind} [out, in]")
        rows, inputs = self.values.shape
        stated = FORMATS[self.format]
        sizes = stated.group_sizes or (inputs,)
        if self.group_size not in sizes:
            raise ValueError(f"group_size of {self.format} is {self.group_size}, not one of {sizes}")
        groups = -(-inputs // self.group_size) if inputs else 0
        if (self.minima is not None) != stated.has_minima:
            raise ValueError(f"{self.format} {'has no' if self.minima is not None else 'has'} minima")
        kinds = ("float32", "float16") if self.format in HALF_SCALES else ("float32",)
        for name, array in (("scales", self.scales), ("minima", self.minima)):
            if array is None:
                continue
            dtype = str(array.dtype).removeprefix("torch.")
            if tuple(array.shape) != (rows, groups) or dtype not in kinds or array.dtype != self.scales.dtype:
                shape = list(array.shape)
                raise ValueError(f"{name} are {array.dtype} {shape}, not {' or '.join(kinds)} [{rows}, {groups}]")

    def require_range(self) -> None:
        """ValueError where a value (of numpy's) is outside the format's range, or a number is not finite: what packing
        begins with."""
        low, high = FORMATS[self.format].low, FORMATS[self.format].high
        if self.values.size and not (low <= self.values.min() and self.values.max() <= high):
            raise ValueError(f"a value of {self.format} is outside [{low}, {high}]")
        for array in (self.scales, self.minima):
            if array is not None and not (abs(array) < math.inf).all():
                raise ValueError("a scale or minimum is not finite")


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a weight is quantised to a `QuantizedWeight`: see `quantize_reference.py`. ValueError where it cannot be."""

    format: QuantizedFormat
    group_size: int | None
    """Inputs that share a scale; None: a whole row."""
    half_scales: bool = False
    """Scales and minima are float16: of weights that come so, and of formats in `HALF_SCALES`."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS or self.group_size not in (FORMATS[self.format].group_sizes or (None,)):
            raise ValueError(f"no quantisation {self.format!r} with group_size {self.group_size}")
        if self.half_scales and self.format not in HALF_SCALES:
            raise ValueError(f"scales of {self.format!r} are float32")


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight `[out, in]` that is still in its files, for a provider that reads it while it packs; to others it is
    the array that `np.asarray` makes of it. ValueError, when it is packed, where a file ends early."""

    shape: tuple[int, int]
    dtype: WeightDtype
    files: tuple[tuple[int, int, int], ...]
    """Consecutive rows: descriptor of an open file, offset in bytes, number of rows. Good until the file is closed."""
    read: Callable[[], Array]
    """A numpy array of the whole."""
    quant: QuantSpec | None = None
    """What it is to be quantised to when it is packed. ValueError then where it cannot be."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        weight = self.read()
        return weight if dtype is None else weight.astype(dtype)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The paged key-value cache of a model, all layers alike."""

    num_layers: int
    num_blocks: int
    block_size: int
    """Tokens in a block."""
    num_kv_heads: int
    head_dim: int
    dtype: CacheDtype

    @property
    def item_bytes(self) -> int:
        """Bytes of one number of a key or value."""
        return {"float32": 4, "int8": 1, "fp8": 1}.get(self.dtype, 2)

    @property
    def scale_bytes(self) -> int:
        """Of the scale that a key, or a value, of one head has with 8 bits (float32)."""
        return 4 if self.dtype in CACHE_QMAX else 0

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values together."""
        head_bytes = self.head_dim * self.item_bytes + self.scale_bytes
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * head_bytes


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is fixed about the attention of one layer."""

    scale: float
    """Multiplies the scores (usually `head_dim ** -0.5`)."""
    window: int | None = None
    """A query at position p sees keys in `(p - window, p]`; None sees all of `[0, p]`."""
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)` after scaling (Gemma 2)."""
    sinks: Array | None = None
    """`[heads]` float32: a logit for each head that takes part in the softmax and has no value (gpt-oss)."""


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Cosines and sines `[max_positions, rotary_dim / 2]` float32 by which `Ops.attention` rotates q and k
    (RoFormer, arXiv 2104.09864)."""

    cos: Array
    sin: Array


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Ragged rows over the paged cache. Tokens of a row are consecutive; the row's keys and values of
    positions `[0, starts[r])` are in the cache already, those of this step are written by `attention`. As many
    tokens as rows are one of each.

    ::

        tokens        | row 0: 3 new      | row 1: 1 | row 2: 2 new  |
        query_starts    0                   3          4               6
        block_tables  [[7, 2, -], [5, 9, 4], [1, -, -]]   position p of row r lives in block
                                                           block_tables[r, p // block_size], slot p % block_size
    """

    positions: Array  # [tokens] int32
    query_starts: Array  # [rows + 1] int32
    starts: Array  # [rows] int32: tokens in the cache before this step
    block_tables: Array  # [rows, max_blocks] int32; entries past a row's last block are not read
    outputs: Array | None = None
    """`[outputs]` int32 (numpy): the tokens whose hidden states a step gives, ascending, of each row its last ones;
    None: all."""


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Numbers of the rows that sample, each `[rows]`. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off."""

    temperature: Array  # float32
    top_k: Array  # int32
    top_p: Array  # float32
    min_p: Array  # float32
    seeds: Array  # uint64
    positions: Array  # int64: index of the token to be sampled in its sequence; the counter of the noise


@dataclass(frozen=True, slots=True)
class PenaltyBatch:
    """Tokens that have occurred, each `[entries]`; a pair of row and token is there once."""

    rows: Array  # int64
    token_ids: Array  # int64
    counts: Array  # float32: how often the token was generated
    repetition: Array  # float32, as the two that follow: the row's
    frequency: Array
    presence: Array


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of raw logits: `chosen` and `rank` are `[rows]`, `top_*` are `[rows, num_top]`, best first
    (ties: the lower token id first). `rank` counts tokens with a logit strictly above the chosen one's, plus one."""

    chosen: Array  # float32
    rank: Array  # int32
    top_ids: Array  # int32
    top_logprobs: Array  # float32


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device that is not the host's, in bytes."""

    total: int
    free: int
    """What this process can still have, `allocator_cached` included."""
    allocated: int
    """Of this process's arrays."""
    allocator_cached: int = 0
    """Of `free`, what its allocator holds back."""


Step = Callable[[Array, AttentionBatch, Opaque], Array]
"""`step(token_ids, batch, cache)` -> hidden states of the batch's outputs `[outputs, hidden]`"""
Forward = Callable[["Ops", Array, AttentionBatch, Opaque], Array]
"""The same of all tokens, computed with the operations that it is handed."""


class Device(PackedStore, Protocol):
    """Where a model runs: its memory, its copies, and what it has decided."""

    name: str

    def memory(self) -> DeviceMemory | None:
        """That of the device; None where it is the host's."""

    def decisions(self) -> list[Decision]:
        """What has come about since the provider was made, for people to know."""

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Do `work`: the most that its arrays took at one time, in bytes of the device; 0 in the host's memory."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture a CUDA graph of `work`, where the device has them: the result does `work` once more each time it is
        called, on the same arrays, whose values may have changed.

        Args:
            work: has been done once; it may be done or only be written down while it is captured, and makes the same
                launches each time. Arrays that it makes stay where they are for as long as they are held.
        """

    def array(self, values: Any, dtype: str) -> Array:
        """An array of the device ("int32", "int64", "uint64", "float32", "bool"), of the same shape as `values`, which
        are numpy's or a nested sequence."""

    def to_numpy(self, x: Array) -> Any:
        """A numpy array of the same shape and values. Waits for the device."""

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Any]]:
        """Start copying to the host; the result waits for that, and for nothing later, and gives
        numpy arrays of the same shape."""

    def make_cache(self, shape: CacheShape) -> Opaque:
        """An empty paged cache; memory is touched only as blocks are written. MemoryError where there is no room."""

    def block_bytes(self, cache: Opaque, block: int, layer: int) -> bytes:
        """The keys and values of a block in one layer: blocks with the same ones have the same bytes. For debugging."""

    def release_blocks(self, cache: Opaque, first: int, number: int) -> None:
        """Give the memory of blocks back to the system; they may be written again. A device keeps what it has."""


class Ops(Protocol):
    """What a model is written over. Formulas, tolerances and sources: `reference.py`.

    Activations are float32 unless a provider says otherwise. Every method is used by a model or by sampling: one that
    nothing calls does not exist (`tests/law/test_nothing_dead.py`).
    """

    name: str
    formats: tuple[QuantizedFormat, ...]
    """Quantised weights that it multiplies."""
    cache_dtypes: tuple[CacheDtype, ...]
    """Of the caches that `attention` writes and reads."""

    def compile(self, forward: Forward) -> Step:
        """`forward` with this provider, to the last bit. A provider may run it once over symbols, which have shapes
        and no values (`ops/graph`), and put in its place a program that does the same in one call.

        Raises:
            ValueError: shapes that do not fit.
        """

    def quantize(self, weight: Any, quant: QuantSpec) -> QuantizedWeight | StoredWeight:
        """`weight [out, in]` (as for `pack_linear`) rounded to nearest, or a `StoredWeight` that will be when it is
        packed.

        Raises:
            ValueError: a weight is not finite, or larger than the format's scales can be; weights are not rounded to
                the format.
        """

    def pack_linear(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> Opaque:
        """A weight as `linear` and `logits` take it.

        Args:
            weight: `[out, in]` of numpy's float32, float16 or ml_dtypes.bfloat16; a `StoredWeight`; or a
                `QuantizedWeight` of numpy arrays, which is packed as it is.
            bias: `[out]`; kept in float32.
            dtype: what a weight of floating point is rounded to.

        Raises:
            ValueError: a shape does not fit, a value is outside its format, a file ends early.
        """

    def linear(self, x: Array, packed: Opaque) -> Array:
        """`x [tokens, in] @ weight.T + bias -> [tokens, out]`. With 16-bit weights `x` may be rounded to their dtype
        first (docs/design/amx.md); with float32 weights it never is; with a `QuantizedWeight` it is quantised."""

    def pack_gated(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> Opaque:
        """Pack `weight [2 n, in]` and `bias [2 n]` for `gated_linear`: the first n outputs are gate, the others up.
        ValueError as `pack_linear`."""

    def gated_linear(self, x: Array, packed: Opaque, kind: Activation) -> Array:
        """`kind(gate) * up -> [tokens, n]`, gate and up side by side in `linear(x)` (GLU, arXiv 2002.05202)."""

    def pack_embedding(self, table: Any, dtype: WeightDtype) -> Opaque:
        """Pack `table [vocabulary, hidden]`, or a `QuantizedWeight`, for `embed`. The result is also one of
        `pack_linear`'s: a tied head gives it to `logits`, and nothing is stored twice. ValueError as there."""

    def embed(self, token_ids: Array, packed: Opaque, scale: float = 1.0) -> Array:
        """`table[token_ids] * scale -> [tokens, hidden]`; ids are `[tokens]` int32."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension of `x [*, size]`; `weight [size]` float32."""

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> Array:
        """`residual += x` in place, then `rms_norm(residual)`: one pass over `[tokens, size]`."""

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension of `x [*, size]`."""

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Opaque,
        layer: int,
        batch: AttentionBatch,
        spec: AttentionSpec,
        rope: RopeTables | None = None,
    ) -> Array:
        """Write `k, v [tokens, kv_heads, head_dim]` into the cache, then attend causally with
        `q [tokens, heads, head_dim]` -> `[tokens, heads * head_dim]` (PagedAttention, arXiv 2309.06180).

        Writes first: all keys and values of the step are in the cache before a row reads what another row of the step
        wrote. Rows do share such blocks: the prefix cache finds a block as soon as its step is scheduled. What a row
        writes is therefore not private, and the order of the rows in the batch means nothing.

        With `rope`, q and k are rotated on the way by their positions in their rows; the arrays stay as they are."""

    def activation(self, x: Array, kind: Activation) -> Array:
        """`kind(x)`, element by element of `x [*, size]`."""

    def logits(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> Array:
        """`linear(x) * scale`, then soft-capped, float32 `[rows, vocabulary]`."""

    def penalize(self, logits: Array, batch: PenaltyBatch) -> None:
        """Repetition, frequency and presence penalties, in place, for `logits [rows, vocabulary]`."""

    def greedy(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> tuple[Array, Array]:
        """What temperature 0 samples from `logits(x, packed, scale, softcap)`, int32 `[rows]`, and bool `[rows]`, its
        `rows_finite`; 0 where that is false. The logits need not be written out."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        """Sample one token for each row of `logits [rows, vocabulary]` -> int32 `[rows]`; never one whose logit is
        -inf."""

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> Logprobs:
        """Log-softmax of each row of `logits [rows, vocabulary]` at `token_ids [rows]` int32, its rank, and the
        `num_top` best."""

    def rows_finite(self, logits: Array) -> Array:
        """bool `[rows]` of `logits [rows, vocabulary]`: no NaN, no +inf, and not all -inf."""

    def zero_nonfinite_rows(self, logits: Array) -> Array:
        """`rows_finite(logits)`; rows where that is false become 0, in place."""


class Provider(Ops, Device, Protocol):
    """A device with its operations: what `select_ops` gives, and what loads a model and runs it."""
