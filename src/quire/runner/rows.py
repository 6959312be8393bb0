"""Permanent rows: what the runner remembers of each active request.

A request keeps one row while it is active; each step gathers the rows it needs. Preemption is leaving and
coming back. Nothing is ever moved from row to row, and `remove` is the one way to free one.

::

    row   token_ids [max_model_len]          num_known   block_table [max_blocks]
    0     12 7 88 4 19 ...                        5       7 2 .
    1     (free)                                  0       . . .
    2     5 5 91 ...                              3       4 . .
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow, ScheduledRow
from quire.ops.types import Array, AttentionBatch, Ops


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens, ragged over rows."""

    token_ids: Array  # [tokens] int32
    attention: AttentionBatch
    last_tokens: NDArray[np.int64]  # [rows]: index in `token_ids` of each row's last token


class Rows:
    """Token ids and block tables by row, in host memory."""

    def __init__(self, max_rows: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self._token_ids = np.zeros((max_rows, max_model_len + 1), np.int32)
        self._block_tables = np.zeros((max_rows, max_blocks), np.int32)
        self._num_known = np.zeros(max_rows, np.int64)
        self._num_blocks = np.zeros(max_rows, np.int64)
        self._block_size = block_size

    def enter(self, new: NewRow) -> None:
        """A request takes a free row."""
        assert self._num_known[new.row] == 0, f"row {new.row} is taken"
        self._token_ids[new.row, : len(new.token_ids)] = new.token_ids
        self._num_known[new.row] = len(new.token_ids)
        self.extend(new.row, new.block_ids)

    def remove(self, row: int) -> None:
        """Clear all of a row."""
        self._num_known[row] = 0
        self._num_blocks[row] = 0

    def extend(self, row: int, block_ids: Sequence[int]) -> None:
        """Blocks are appended to a row's table."""
        held = int(self._num_blocks[row])
        self._block_tables[row, held : held + len(block_ids)] = block_ids
        self._num_blocks[row] = held + len(block_ids)

    def append(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """A token was sampled for each of these rows, which are distinct. What raises has changed no row."""
        index = np.array(rows, np.int64)
        self._token_ids[index, self._num_known[index]] = token_ids
        self._num_known[index] += 1

    def token_ids(self, row: int, start: int, stop: int) -> list[int]:
        """Known tokens of a row."""
        found: list[int] = self._token_ids[row, start:stop].tolist()
        return found

    def gather(self, scheduled: Sequence[ScheduledRow], ops: Ops) -> ForwardBatch:
        """The arrays of one step; nothing is changed. The new blocks of its rows have been appended."""
        # By columns: arrays of tuples of numbers are made in a fifth of the time of an array of rows.
        rows, starts, counts = (np.array(column, np.int64) for column in islice(zip(*scheduled, strict=True), 3))
        assert (starts + counts <= self._num_known[rows]).all(), "a plan reaches past the known tokens"
        query_starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.repeat(starts - query_starts[:-1], counts) + np.arange(query_starts[-1])
        token_ids = self._token_ids[np.repeat(rows, counts), positions]
        widest = -(-int((starts + counts).max()) // self._block_size)
        attention = AttentionBatch(
            positions=ops.array(positions, "int32"),
            query_starts=ops.array(query_starts, "int32"),
            starts=ops.array(starts, "int32"),
            block_tables=ops.array(self._block_tables[rows, :widest], "int32"),
        )
        return ForwardBatch(ops.array(token_ids, "int32"), attention, query_starts[1:] - 1)
