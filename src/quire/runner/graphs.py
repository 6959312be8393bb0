"""Decode steps as recordings: the launches of a whole forward pass, replayed in one call.

A recording is of fixed arrays and sizes. So a step in which every row has one token is written into arrays that stay,
padded to one of a few sizes: rows, and blocks of the widest table. Padded rows compute token 0 at position 0 and write
its keys and values into the *null block*, which belongs to nobody.

::

    one array, one copy a step:   positions | token ids | awaited? | rows      | tables
                                  [rows]      [rows]      [rows]     [rows]      [rows, width]

Nothing is recorded at a start. A size is recorded when it has come a few times, after it has been computed for the step
that brought it: that step takes as long again on the host, and the server was ready at once.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quire.core.plan import ScheduledRow
from quire.models.model import Model
from quire.ops.types import Array, AttentionBatch, Opaque, Ops
from quire.runner.rows import Rows

logger = logging.getLogger("quire.runner")
Work = Callable[[], None]
Record = Callable[[Work], Work]
"""See `Ops.record`."""

RECORD_AT = 3
"""The use of a size at which it is recorded."""
FIRST_WIDTH_TOKENS = 2048
"""Context of the narrowest tables; each next width has four times as much."""
BYTES_PER_GRAPH = 2**20
"""Of the device's own bookkeeping, for each recording: a guess, held against the device by `scripts/gpu_check`."""


class GraphSize(NamedTuple):
    """What a recording is made for."""

    num_rows: int
    width: int
    """Blocks of a row's table."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """The largest decode step."""

    max_rows: int
    max_blocks: int
    """Of one row."""
    block_size: int

    def size_for(self, num_rows: int, width: int) -> GraphSize:
        """The smallest size that holds `num_rows` rows with tables of `width` blocks. Two sizes of rows to a doubling,
        1 2 3 4 6 8 12 16 24 ...: tiles of the kernels are no finer."""
        step = max(1, 2 ** (num_rows.bit_length() - 2))
        wide = max(1, FIRST_WIDTH_TOKENS // self.block_size)
        while wide < width:
            wide *= 4
        return GraphSize(min(self.max_rows, -(-num_rows // step) * step), min(self.max_blocks, wide))

    def sizes(self) -> set[GraphSize]:
        """All that may be recorded."""
        rows = {self.size_for(count, 1).num_rows for count in range(1, self.max_rows + 1)}
        widths = {self.size_for(1, count).width for count in range(1, self.max_blocks + 1)}
        return {GraphSize(count, width) for count in rows for width in widths}


class _Recording:
    """One size: `replay` computes `hidden` from the arrays that stay."""

    def __init__(self, compute: Callable[[], Array], record: Record) -> None:
        self._compute = compute
        self.hidden: Array = None
        self.replay = record(self._work)

    def _work(self) -> None:
        self.hidden = self._compute()


class DecodeGraphs:
    """The recordings of one model, its cache and its rows.

    Args:
        null_block: a block of the cache that no row holds.
    """

    def __init__(
        self, model: Model, ops: Ops, cache: Opaque, rows: Rows, limits: GraphLimits, null_block: int, record: Record
    ) -> None:
        self._model = model
        self._ops = ops
        self._cache = cache
        self._rows = rows
        self._limits = limits
        self._null_block = null_block
        self._record = record
        self._recordings: dict[GraphSize, _Recording] = {}
        self._num_uses: Counter[GraphSize] = Counter()
        self._input = ops.array(np.zeros(limits.max_rows * (4 + limits.max_blocks)), "int32")
        self._query_starts = ops.array(np.arange(limits.max_rows + 1), "int32")
        self._newest = rows.newest(ops)

    def forward(self, scheduled: Sequence[ScheduledRow]) -> Array:
        """Hidden states `[rows, hidden]` of rows with one token each, good until the next call."""
        width = -(-max(item.start + 1 for item in scheduled) // self._limits.block_size)
        size = self._limits.size_for(len(scheduled), width)
        values = self._rows.gather_singles(scheduled, size.num_rows, size.width, self._null_block)
        self._input[: len(values)] = self._ops.array(values, "int32")
        recording = self._recordings.get(size)
        if recording is not None:
            recording.replay()
            return recording.hidden[: len(scheduled)]
        hidden = self._compute(size)
        self._num_uses[size] += 1
        if self._num_uses[size] == RECORD_AT:
            self._try_to_record(size)
        return hidden[: len(scheduled)]

    def _try_to_record(self, size: GraphSize) -> None:
        """After the size was computed: so its kernels are compiled and loaded, which a recording must not do."""
        try:
            self._recordings[size] = _Recording(lambda: self._compute(size), self._record)
        except Exception:
            logger.exception("a decode step of %d rows cannot be recorded: it is launched each time", size.num_rows)

    def _compute(self, size: GraphSize) -> Array:
        count, width = size
        positions, token_ids, awaited, rows = self._input[: 4 * count].reshape((4, count))
        tables = self._input[4 * count : (4 + width) * count].reshape((count, width))
        batch = AttentionBatch(positions, self._query_starts[: count + 1], positions, tables)
        return self._model.forward(token_ids + awaited * self._newest[rows], batch, self._cache)
