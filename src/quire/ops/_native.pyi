"""The native module (`native/binding/module.cpp`). Arrays are numpy's; every function raises ValueError on a wrong
shape, type, layout or index before it computes anything."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

class PackedLinear:
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_width(self) -> int:
        """The width of a GEMM's result: half of `out_features` for a gated weight."""
    @property
    def reads_amx_bf16(self) -> bool:
        """Whether its inputs may have the layout `amx_bf16`: bfloat16 in the order of AMX tiles."""
    @property
    def bytes(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def dtype(self) -> str: ...
    @property
    def layout(self) -> str:
        """`panels`, `amx_bf16` or `integers`."""
    @property
    def integers(self) -> tuple[int, int, int, int, bool]:
        """Bits (0: the weight is of floating point), inputs in a group, the largest integer of an input, bytes of a
        scale, whether groups have minima."""
    @property
    def weights(self) -> PackedBytes: ...
    @property
    def bias(self) -> PackedBytes | None: ...

class PackedBytes:
    """Read-only memory of a packed weight, which it keeps alive: `memoryview(bytes)`."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Cache:
    @property
    def bytes(self) -> int: ...
    def block_bytes(self, block: int, layer: int, /) -> Any:
        """A copy of the bytes of one block in one layer."""

class Program:
    """Instructions are appended, by the operation's name, in the order in which they will run. What each takes are the
    fields of its class in `quire.ops.graph.operations`, in their order (`quire.ops.cpu_program.native_arguments`)."""

    token_tile: ClassVar[tuple[int, int, int]]
    """The least and the most tokens that a thread takes through a segment, and the most bytes of its weights."""

    def __getattr__(self, operation: str, /) -> Callable[..., None]: ...
    def run(
        self,
        token_ids: Any,
        positions: Any,
        query_starts: Any,
        starts: Any,
        block_tables: Any,
        outputs: Any | None,
        cache: Cache,
        out: Any,
        /,
    ) -> None:
        """`outputs`: ascending numbers of tokens, of each row its last ones, or None for all; `out [outputs, width of
        the result]`."""

class Runtime:
    def __init__(self, threads: int, isa: str, affinity: Sequence[Sequence[int]], /) -> None:
        """`affinity`: the processors that each thread keeps to, the caller first (which stays free); empty for none."""
    @property
    def threads(self) -> int: ...
    def pack(
        self,
        weight: Any,
        bias: Any | None,
        dtype: str,
        gated: bool,
        quant: tuple[int, int, int, int, bool] | None,
        /,
    ) -> PackedLinear:
        """`weight [out, in]`: uint16 bits of bfloat16 or float16, or float32; or `(in, [(descriptor, offset in bytes,
        rows), ...])` of files. `quant`: the integers of `pack_integers`, to which it is rounded first.
        ValueError also where a file ends early, and with `quant` where a weight is not finite."""
    def map_packed(
        self,
        weights: Any,
        bias: Any | None,
        out: int,
        inputs: int,
        dtype: str,
        layout: str,
        gated: bool,
        integers: tuple[int, int, int, int, bool] | None,
        /,
    ) -> PackedLinear:
        """A weight over the bytes of another one's `weights` and `bias`, which are not copied and kept alive;
        `integers` as `quant` of `pack`. ValueError, which names the field, where they are not of such a weight."""
    def probe(self, kind: str, data: Any, /) -> int:
        """`kind` is read (of `data`), float32, bfloat16 or int8: bytes, or operations; 0 where there are no such
        instructions."""
    def quantize(
        self,
        weight: Any,
        dtype: str,
        rounding: str,
        group_size: int,
        values: Any,
        scales: Any,
        /,
    ) -> bool:
        """`rounding` is int8, int4, int4_min, int4_min_half (scales that float16 has) or fp8; with minima `scales`
        holds those of a row, then its minima, infinite where a weight is too large. False where a weight is not
        finite."""
    def pack_integers(
        self,
        values: Any,
        scales: Any,
        minima: Any | None,
        bias: Any | None,
        integers: tuple[int, int, int, int, bool],
        gated: bool,
        /,
    ) -> PackedLinear:
        """`values [out, in]` int8, `scales` and `minima [out, ceil(in / group)]` float32 or the bits of float16;
        `integers` as `PackedLinear.integers`. See `QuantizedWeight`."""
    def linear(self, x: Any, packed: PackedLinear, y: Any, scale: float, softcap: float, add: bool, /) -> None:
        """`softcap` 0 is none; `add` adds to what y holds."""
    def greedy(
        self, x: Any, packed: PackedLinear, scale: float, softcap: float, tokens: Any, finite: Any, /
    ) -> None: ...
    def gated_linear(self, x: Any, packed: PackedLinear, kind: int, y: Any, /) -> None:
        """x and y as for `linear`, `kind` as for `activation`."""
    def embed(self, token_ids: Any, packed: PackedLinear, scale: float, y: Any, /) -> None: ...
    def norm(
        self, x: Any, residual: Any | None, weight: Any, bias: Any | None, eps: float, centre: bool, y: Any, /
    ) -> None:
        """`x` is added to `residual` first, where given; `centre` subtracts the mean (layer_norm)."""
    def activation(self, x: Any, kind: int, multiply: bool, y: Any, /) -> None:
        """`kind` counts silu, gelu, gelu_tanh, relu from 0."""
    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        cache: Cache,
        layer: int,
        query_starts: Any,
        starts: Any,
        block_tables: Any,
        scale: float,
        window: int,
        softcap: float,
        sinks: Any | None,
        cos: Any | None,
        sin: Any | None,
        out: Any,
        /,
    ) -> None:
        """`softcap` 0 is none; `window` 2**63 - 1 is none; `cos` and `sin` are both given or both None."""
    def sample(
        self,
        logits: Any,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        min_p: Any,
        seeds: Any,
        positions: Any,
        tokens: Any,
        /,
    ) -> None: ...
    def logprobs(
        self, logits: Any, token_ids: Any, chosen: Any, rank: Any, top_ids: Any, top_logprobs: Any, /
    ) -> None: ...
    def rows_finite(self, logits: Any, finite: Any, /) -> None: ...
    def program(
        self, buffers: list[tuple[int, int, bool, bool]], persistent: int, local: int, result: int, /
    ) -> Program:
        """An empty program. Of each buffer: where it begins, in floats for each token, its width, whether its layout is
        amx_bf16, and whether it is local (`quire.ops.graph.plan.BufferPlan`, which also has the two sizes). The buffer
        `result` is outside the arena."""

def instruction_sets() -> list[tuple[str, bool, str]]:
    """(name, whether this processor runs it, "yes" or what it lacks), slowest first."""

def operation_times() -> list[tuple[str, int, int, int, int, int, int]]:
    """See `quire.ops.cpu.operation_counts`."""

def make_cache(layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: str, /) -> Cache: ...
