"""What a sampling feature is: something with state by row that edits logits.

A feature is asked only for rows that use it, so one that nobody uses costs one branch a step. It never adds
an attribute to a request. Rows come and go by `add` and `remove`; a preempted request leaves and comes back
with everything it had generated.
"""

from collections.abc import Sequence
from typing import Protocol

from quire.core.plan import NewRow
from quire.ops.types import Array


class LogitsFeature(Protocol):
    """Edits the logits of the rows that use it."""

    def add(self, new: NewRow) -> None:
        """A request takes `new.row`."""

    def remove(self, row: int) -> None:
        """Forget all of `row`; a row that never used the feature is fine."""

    def follows(self, row: int) -> bool:
        """Whether what it does to `row` depends on the tokens before, so that `observe` must have been told of them."""

    def observe(self, row: int, token_id: int) -> None:
        """`token_id` was appended to the sequence of `row`."""

    def apply(self, logits: Array, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Edit `logits[i]`, which belongs to the token at `positions[i]` of `rows[i]`, in place; float32
        `[rows, vocabulary]`."""
