"""The contract between models and devices: about sixteen operations over arrays.

An *array* is what the provider computes with: `numpy.ndarray` on the CPU, `torch.Tensor` on CUDA. On the CPU
activations are float32; weights and cache are bfloat16, float16 or float32 inside packed objects that
only their provider looks into.

**Row independence.** The result for one token (or one row of logits) does not depend on which others are
computed with it, on the number of threads, on how a prompt is cut into chunks, or on `block_size`. Each
provider keeps reduction orders as fixed functions of the token's own position and the shapes of the weights.

A device that has no room for weights or cache raises MemoryError.

Two-dimensional and three-dimensional inputs may be views: the last dimension (the last two for
`[tokens, heads, head_dim]`) is contiguous, the first may be strided. Results are fresh contiguous arrays
unless the operation says that it works in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from quire.outputs import Decision

Array = Any
"""`numpy.ndarray` or `torch.Tensor`."""
Opaque = Any
"""Something packed by a provider; only the same provider looks inside."""

StorageType = Literal["bfloat16", "float16", "float32"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QuantizedFormat = Literal["int8", "int8_w8a8", "int4", "int4_w4a8", "fp8"]
INPUT_LEVELS: dict[QuantizedFormat, int] = {
    "int8": 32639,
    "int8_w8a8": 127,
    "int4": 32639,
    "int4_w4a8": 127,
    "fp8": 448,
}
"""The largest number of an input: see `QuantizedWeight`. 32639 is 127 * 257, two signed bytes."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in small numbers: `weight[o, i] = values[o, i] * scales[o, i // group_size]`.

    What multiplies it are integers too. A row of inputs is rounded to `q = rint(x * (levels / absmax))`, ties to even,
    with its own largest magnitude `absmax` and the format's `INPUT_LEVELS`: 15 bits and a sign for `int8` and `int4`
    (about as exact as bfloat16 for a row's small inputs, far more exact for its large ones), 7 bits and a sign for
    `int8_w8a8` and `int4_w4a8`. A group's sum of products of integers is exact and becomes one float32; the result is
    `absmax / levels * sum_g scales[o, g] * float32(sum_(i in g) q[i] values[o, i])`.

    With `fp8` values and inputs are e4m3 (arXiv 2209.05433: 4 bits of exponent, 3 of mantissa, at most 448), rounded to
    nearest, ties to even; sums are float32, whose order is the provider's.

    ValueError where shapes or types are not as stated. Values outside their range are refused when packed.
    """

    format: QuantizedFormat
    values: Array  # [out, in] int8: [-127, 127], or [-8, 7] with 4 bits, one a byte; fp8: ml_dtypes.float8_e4m3fn
    scales: Array  # [out, ceil(in / group_size)] float32
    group_size: int
    """Inputs that share a scale: 32, 64 or 128 with 4 bits, all of them (`in`) with 8."""

    def __post_init__(self) -> None:
        if self.format not in INPUT_LEVELS:
            raise ValueError(f"format {self.format!r} is not one of {', '.join(INPUT_LEVELS)}")
        kind = "float8_e4m3fn" if self.format == "fp8" else "int8"
        if self.values.ndim != 2 or str(self.values.dtype).removeprefix("torch.") != kind:
            raise ValueError(f"values are {self.values.dtype} {list(self.values.shape)}, not {kind} [out, in]")
        rows, inputs = self.values.shape
        sizes = (32, 64, 128) if self.format.startswith("int4") else (inputs,)
        if self.group_size not in sizes:
            raise ValueError(f"group_size of {self.format} is {self.group_size}, not one of {sizes}")
        groups = -(-inputs // self.group_size) if inputs else 0
        if tuple(self.scales.shape) != (rows, groups) or str(self.scales.dtype).removeprefix("torch.") != "float32":
            shape = list(self.scales.shape)
            raise ValueError(f"scales are {self.scales.dtype} {shape}, not float32 [{rows}, {groups}]")

    def require_range(self) -> None:
        """ValueError where a value (of numpy's) is outside the format's range, or NaN: what packing begins with."""
        low, high = {"int8": (-127, 127), "int4": (-8, 7)}.get(self.format[:4], (-448, 448))
        if self.values.size and not (low <= self.values.min() and self.values.max() <= high):
            raise ValueError(f"a value of {self.format} is outside [{low}, {high}]")


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a weight is rounded to a `QuantizedWeight`: see `quantize_reference.py`. ValueError where it cannot be."""

    format: QuantizedFormat
    group_size: int | None
    """Inputs that share a scale with 4 bits; None with 8: a whole row."""

    def __post_init__(self) -> None:
        sizes = (32, 64, 128) if self.format.startswith("int4") else (None,)
        if self.format not in INPUT_LEVELS or self.group_size not in sizes:
            raise ValueError(f"no rounding {self.format!r} with group_size {self.group_size}")


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight `[out, in]` that is still in its files, for a provider that reads it while it packs; to others it is
    the array that `np.asarray` makes of it. ValueError, when it is packed, where a file ends early."""

    shape: tuple[int, int]
    storage: StorageType
    files: tuple[tuple[int, int, int], ...]
    """Consecutive rows: descriptor of an open file, offset in bytes, number of rows. Good until the file is closed."""
    read: Callable[[], Array]
    """A numpy array of the whole."""
    rounding: Rounding | None = None
    """What it is to be rounded to when it is packed. ValueError then where it cannot be."""

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
    storage: StorageType

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values together."""
        item = 4 if self.storage == "float32" else 2
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * item


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
    """Cosines and sines `[max_positions, rotary_dim / 2]` by which `Ops.attention` rotates as `Ops.rope` does."""

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
    """What this process can still have, what its allocator holds back included."""
    held: int
    """Of this process's arrays."""
    kept: int = 0
    """Of `free`, what its allocator holds back."""


Step = Callable[[Array, AttentionBatch, Opaque], Array]
"""`step(token_ids, batch, cache)` -> hidden states of the batch's outputs `[outputs, hidden]`"""
Forward = Callable[["Ops", Array, AttentionBatch, Opaque], Array]
"""The same of all tokens, computed with the operations that it is handed."""


class Ops(Protocol):
    """A provider of the operations. Formulas, tolerances and sources: `reference.py`."""

    name: str
    formats: tuple[QuantizedFormat, ...]
    """Quantised weights that it multiplies."""

    def memory(self) -> DeviceMemory | None:
        """That of the device; None where it is the host's."""

    def decisions(self) -> list[Decision]:
        """What has come about since the provider was made, for people to know."""

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Do `work`: the most that its arrays took at one time, in bytes of the device; 0 in the host's memory."""

    def compile(self, forward: Forward) -> Step:
        """`forward` with this provider, to the last bit. A provider may run it once over symbols, which have shapes
        and no values (`ops/program.py`), and put in its place a program that does the same in one call."""

    def array(self, values: Any, dtype: str) -> Array:
        """A device array ("int32", "int64", "uint64", "float32", "bool") from a numpy array or nested sequence."""

    def to_numpy(self, x: Array) -> Any:
        """A numpy array of the same values."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does `work` once more each time it is called, on the same arrays, whose values may have changed. `work`
        has been done once; it may be done or only be written down while it is recorded, and makes the same launches
        each time. Arrays that it makes stay where they are for as long as somebody holds them."""

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Any]]:
        """Start copying to the host; the result waits for that, and for nothing later, and gives numpy arrays."""

    def quantize(self, weight: Any, rounding: Rounding) -> QuantizedWeight | StoredWeight:
        """`weight [out, in]` (as for `pack_linear`) rounded to nearest, or a `StoredWeight` that will be when it is
        packed. ValueError where one is not finite."""

    def pack_linear(self, weight: Any, bias: Any | None, storage: StorageType) -> Opaque:
        """Pack `weight [out, in]` (numpy: float32, float16 or ml_dtypes.bfloat16; or a `StoredWeight`) and `bias
        [out]`. A `QuantizedWeight` (of numpy arrays) is packed as it is; `storage` is that of weights of floating
        point."""

    def linear(self, x: Array, packed: Opaque) -> Array:
        """`x [tokens, in] @ weight.T + bias -> [tokens, out]`. With 16-bit weights `x` may be rounded to their type
        first (docs/design/amx.md); with float32 weights it never is; with a `QuantizedWeight` to integers."""

    def pack_gated(self, weight: Any, bias: Any | None, storage: StorageType) -> Opaque:
        """Pack `weight [2 n, in]` and `bias [2 n]` for `gated_linear`: the first n outputs are gate, the others up."""

    def gated_linear(self, x: Array, packed: Opaque, kind: Activation) -> Array:
        """`kind(gate) * up -> [tokens, n]`, with the bits of `activation_multiply(linear(x))`."""

    def pack_embedding(self, table: Any, storage: StorageType) -> Opaque:
        """Pack `table [vocabulary, hidden]`, or a `QuantizedWeight`, for `embed`. The result is also one of
        `pack_linear`'s: a tied head gives it to `logits`, and nothing is stored twice."""

    def embed(self, token_ids: Array, packed: Opaque, scale: float = 1.0) -> Array:
        """`table[token_ids] * scale -> [tokens, hidden]`."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> Array:
        """`residual += x` in place, then `rms_norm(residual)`: one pass."""

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension."""

    def rope(self, x: Array, positions: Array, cos: Array, sin: Array) -> None:
        """Rotate, in place, the first `2 * cos.shape[1]` dimensions of each head of `x [tokens, heads, head_dim]`
        by halves, with `cos`, `sin [max_positions, rotary_dim / 2]` (RoFormer, arXiv 2104.09864)."""

    def make_cache(self, shape: CacheShape) -> Opaque:
        """An empty cache; memory is touched only as blocks are written."""

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

        With `rope`, q and k are rotated on the way by their positions in their rows, to the bits of `rope` before; the
        arrays stay as they are."""

    def activation(self, x: Array, kind: Activation) -> Array:
        """`kind(x)`, element by element."""

    def activation_multiply(self, gate_up: Array, kind: Activation) -> Array:
        """`kind(gate_up[:, :n]) * gate_up[:, n:] -> [tokens, n]`."""

    def logits(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> Array:
        """`linear(x) * scale`, then soft-capped, float32 `[rows, vocabulary]`."""

    def penalize(self, logits: Array, batch: PenaltyBatch) -> None:
        """In place, for `logits [rows, vocabulary]`: see `sampling/features/penalties.py`."""

    def greedy(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> tuple[Array, Array]:
        """What temperature 0 samples from `logits(x, packed, scale, softcap)`, int32 `[rows]`, and bool `[rows]`, its
        `rows_finite`; 0 where that is false. The logits need not be written out."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        """Sample one token for each row of `logits [rows, vocabulary]` -> int32 `[rows]`; -inf is never sampled."""

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> Logprobs:
        """Log-softmax of each row at `token_ids [rows]`, its rank, and the `num_top` best."""

    def rows_finite(self, logits: Array) -> Array:
        """bool `[rows]`: no NaN, no +inf, and not all -inf."""

    def clear_broken(self, logits: Array) -> Array:
        """`rows_finite(logits)`; rows where that is false become 0, in place."""

    def copy_blocks(self, cache: Opaque, source_ids: Array, target_ids: Array) -> None:
        """Copy whole blocks, all layers."""

    def block_bytes(self, cache: Opaque, block: int, layer: int) -> bytes:
        """The keys and values of a block in one layer: blocks with the same ones have the same bytes. For debugging."""

    def moe(self, x: Array, router: Opaque, experts: Opaque, num_active: int, normalize: bool) -> Array:
        """Mixture of experts: softmax routing, the best `num_active` experts' gated MLPs, weighted sum."""

    def lora(self, x: Array, y: Array, adapters: Opaque, adapter_ids: Array) -> None:
        """`y += x A^T B^T * scale` in place for each token's adapter; id 0 is none (arXiv 2106.09685)."""

    def pool(self, x: Array, query_starts: Array, kind: Literal["last", "mean", "first"]) -> Array:
        """One vector for each row of `x [tokens, hidden]` -> `[rows, hidden]`."""
