"""The native module (`native/module.cpp`). Arrays are numpy's; every function raises ValueError on a wrong shape,
type, layout or index before it computes anything."""

from collections.abc import Sequence
from typing import Any

class PackedLinear:
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_width(self) -> int:
        """The width of a product: half of `out_features` for a gated weight."""
    @property
    def reads_tiles(self) -> bool:
        """Whether its inputs may be rows of bfloat16."""
    @property
    def bytes(self) -> int: ...

class Cache:
    @property
    def bytes(self) -> int: ...
    def block_bytes(self, block: int, layer: int, /) -> Any:
        """A copy of the bytes of one block in one layer."""

_View = tuple[int, int, int, int]
"""`quire.ops.program.View`: buffer, offset, groups, width."""

class Program:
    """Instructions are appended in the order in which they will run."""

    def embed(self, positions: bool, table: PackedLinear, scale: float, y: _View, /) -> None:
        """Of the token ids, or of the positions."""
    def linear(self, x: _View, weight: PackedLinear, adds: bool, kind: int, y: _View, /) -> None:
        """`adds` to what y holds; `kind` is read for a gated weight."""
    def norm(
        self, x: _View, residual: _View | None, weight: Any, bias: Any | None, eps: float, centre: bool, y: _View, /
    ) -> None: ...
    def add(self, x: _View, y: _View, /) -> None: ...
    def attention(
        self,
        qkv: tuple[_View, _View, _View],
        layer: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: Any | None,
        cos: Any | None,
        sin: Any | None,
        narrows: Sequence[int],
        y: _View,
        /,
    ) -> None:
        """From one that `narrows` on, only the outputs of a step are computed: their rows of these buffers move up."""
    def activation(self, x: _View, kind: int, multiply: bool, y: _View, /) -> None: ...
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
        storage: str,
        gated: bool,
        rounding: tuple[int, int, int] | None,
        /,
    ) -> PackedLinear:
        """`weight [out, in]`: uint16 bits of bfloat16 or float16, or float32; or `(in, [(descriptor, offset in bytes,
        rows), ...])` of files. `rounding`: bits, group and levels of `pack_integers`, to which it is rounded first.
        ValueError also where a file ends early, and with rounding where a weight is not finite."""
    def probe(self, kind: str, data: Any, /) -> int:
        """`kind` is read (of `data`), float32, bfloat16 or int8: bytes, or operations; 0 without such instructions."""
    def quantize(
        self, weight: Any, storage: str, four_bits: bool, group_size: int, values: Any, scales: Any, /
    ) -> bool:
        """False where a weight is not finite."""
    def pack_integers(
        self, values: Any, scales: Any, bias: Any | None, bits: int, group: int, levels: int, gated: bool, /
    ) -> PackedLinear:
        """`values [out, in]` int8, `scales [out, ceil(in / group)]`, integers of 4 or 8 bits; inputs will be rounded to
        integers up to `levels`. See `QuantizedWeight`."""
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
    def rope(self, x: Any, positions: Any, cos: Any, sin: Any, /) -> None: ...
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
    def copy_blocks(self, cache: Cache, source_ids: Any, target_ids: Any, /) -> None: ...
    def program(self, buffers: list[tuple[int, int, bool, bool]], kept: int, passing: int, result: int, /) -> Program:
        """An empty program. Of each buffer: where it begins, in floats for each token, its width, whether it holds rows
        of bfloat16, and whether it passes (`quire.ops.program.Placement`). The buffer `result` is outside the arena."""

def instruction_sets() -> list[tuple[str, bool, str]]:
    """(name, whether this processor runs it, "yes" or what it lacks), slowest first."""

def operation_times() -> list[tuple[str, int, int, int, int, int, int]]:
    """See `quire.ops.cpu.operation_counts`."""

def make_cache(layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, storage: str, /) -> Cache: ...
