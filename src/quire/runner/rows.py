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
from quire.ops.types import Array, AttentionBatch, Device


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens, ragged over rows."""

    token_ids: Array  # [tokens] int32
    attention: AttentionBatch
    output_ends: NDArray[np.int64]  # [rows]: where a row's hidden states end among those that the step gives


class Rows:
    """Token ids and block tables by row, in host memory; on the device, by row, the token that was sampled last."""

    def __init__(self, max_rows: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self._token_ids = np.zeros((max_rows, max_model_len + 1), np.int32)
        self._block_tables = np.zeros((max_rows, max_blocks), np.int32)
        self._num_known = np.zeros(max_rows, np.int64)  # [max_rows], as are the next two
        self._num_blocks = np.zeros(max_rows, np.int64)
        self._num_pending = np.zeros(max_rows, np.int64)
        """Tokens that the device knows and the host does not: they come after the known ones."""
        self._last_sampled: Array | None = None  # [max_rows] int32
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
        self._num_pending[row] = 0
        self._num_blocks[row] = 0

    def extend(self, row: int, block_ids: Sequence[int]) -> None:
        """Append blocks to the table of `row`."""
        held = int(self._num_blocks[row])
        self._block_tables[row, held : held + len(block_ids)] = block_ids
        self._num_blocks[row] = held + len(block_ids)

    def append(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Append a sampled token to each of `rows`, which are distinct. What raises has changed no row."""
        index = np.array(rows, np.int64)
        self._token_ids[index, self._num_known[index]] = token_ids
        self._num_known[index] += 1

    def append_run(self, row: int, token_ids: Sequence[int]) -> None:
        """Append several tokens to `row`, which has `room` for them."""
        known = int(self._num_known[row])
        self._token_ids[row, known : known + len(token_ids)] = token_ids
        self._num_known[row] = known + len(token_ids)

    def room(self, row: int) -> int:
        """Tokens that can still be appended to `row`."""
        return self._token_ids.shape[1] - int(self._num_known[row])

    def add_pending(self, rows: Sequence[int], tokens: Array, ops: Device) -> None:
        """The next token of each of `rows`, which are distinct, is on the device; `append` comes once the host has it.

        Args:
            tokens: int32 `[rows]`, on the device.
        """
        index = np.array(rows, np.int64)
        self.last_sampled(ops)[ops.array(index, "int64")] = tokens
        self._num_pending[index] += 1

    def last_sampled(self, ops: Device) -> Array:
        """The token of each row that was sampled last, int32 `[max_rows]` on the device. Always the same array."""
        if self._last_sampled is None:
            self._last_sampled = ops.array(np.zeros(len(self._num_known)), "int32")
        return self._last_sampled

    def resolve_pending(self, rows: Sequence[int]) -> None:
        """One token fewer is pending of each of these rows: it will be appended, or there is none."""
        self._num_pending[np.array(rows, np.int64)] -= 1

    def has_pending_token(self, row: int) -> bool:
        """Whether the host lacks a token of the row."""
        return bool(self._num_pending[row])

    def token_ids(self, row: int, start: int, stop: int) -> list[int]:
        """Known tokens of a row."""
        found: list[int] = self._token_ids[row, start:stop].tolist()
        return found

    def gather(self, scheduled: Sequence[ScheduledRow], num_outputs: Sequence[int], ops: Device) -> ForwardBatch:
        """The arrays of one step; nothing is changed. The new blocks of its rows have been appended.

        Args:
            scheduled: at least one row.
            num_outputs: by row, of how many of its last tokens the step gives the hidden states.

        Raises:
            AssertionError: the plan reaches past the tokens that host or device know.
        """
        # By columns: arrays of tuples of numbers are made in a fifth of the time of an array of rows.
        rows, starts, counts = (np.array(column, np.int64) for column in islice(zip(*scheduled, strict=True), 3))
        query_starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=query_starts[1:])
        positions = np.repeat(starts - query_starts[:-1], counts) + np.arange(query_starts[-1])
        row_of_token = np.repeat(rows, counts)
        token_ids = ops.array(self._token_ids[row_of_token, positions], "int32")
        ends = starts + counts
        if self._last_sampled is not None and (ends > self._num_known[rows]).any():
            assert (ends <= self._num_known[rows] + self._num_pending[rows]).all(), "a plan reaches past known tokens"
            # Arithmetic, not a choice by index: the same few operations whatever is pending.
            pending = positions >= self._num_known[row_of_token]
            token_ids = token_ids * ops.array(~pending, "int32") + (
                self._last_sampled[ops.array(row_of_token, "int64")] * ops.array(pending, "int32")
            )
        widest = -(-int(ends.max()) // self._block_size)
        output_ends = np.cumsum(num_outputs)
        outputs = np.repeat(query_starts[1:] - output_ends, num_outputs) + np.arange(output_ends[-1])
        attention = AttentionBatch(
            positions=ops.array(positions, "int32"),
            query_starts=ops.array(query_starts, "int32"),
            starts=ops.array(starts, "int32"),
            block_tables=ops.array(self._block_tables[rows, :widest], "int32"),
            outputs=None if output_ends[-1] == len(positions) else outputs.astype(np.int32),
        )
        return ForwardBatch(token_ids, attention, output_ends)

    def gather_singles(
        self, scheduled: Sequence[ScheduledRow], num_rows: int, width: int, null_block: int
    ) -> NDArray[np.int32]:
        """One token of each row, padded to `num_rows` rows with tables of `width` blocks.

        Returns:
            One int32 array: positions, token ids (0 where pending), 1 where pending, and rows, `[num_rows]` each; then
            block tables `[num_rows, width]`. What pads is token 0 of row 0 at position 0 in `null_block`, which also
            fills the tables.

        Raises:
            AssertionError: the plan reaches past the tokens that host or device know.
        """
        rows, starts = (np.array(column, np.int64) for column in islice(zip(*scheduled, strict=True), 2))
        known = self._num_known[rows]
        assert (starts < known + self._num_pending[rows]).all(), "a plan reaches past known tokens"
        pending = starts >= known
        values = np.zeros(num_rows * (4 + width), np.int32)
        columns, tables = values[: 4 * num_rows].reshape(4, -1), values[4 * num_rows :].reshape(-1, width)
        columns[:, : len(rows)] = starts, np.where(pending, 0, self._token_ids[rows, starts]), pending, rows
        tables[:] = null_block
        tables[: len(rows)] = self._block_tables[rows, :width]
        return values
