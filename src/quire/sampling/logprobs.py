"""Log-probabilities of raw logits, as the plain values that go up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.core.plan import TokenLogprobs
from quire.ops.types import Array, Logprobs, Ops

ROWS_AT_ONCE = 16
"""Copies of rows of logits that exist at one time."""


def token_logprobs(arrays: Sequence[Any], place: int, token_id: int, num_top: int) -> TokenLogprobs:
    """Of one row: the chosen token, then its `num_top` best. `arrays` are those of `Logprobs`, as numpy has them."""
    chosen, rank, top_ids, top_logprobs = (array[place].tolist() for array in arrays)
    return TokenLogprobs(
        (token_id, *top_ids[:num_top]), (chosen, *top_logprobs[:num_top]), (rank, *range(1, num_top + 1))
    )


@dataclass(frozen=True, slots=True)
class Named:
    """Log-probabilities of tokens that requests named, of all rows one behind the other."""

    spans: dict[int, tuple[int, tuple[int, ...]]]
    """Place of a row -> where its tokens begin, and which they are."""
    parts: list[Logprobs]

    def arrays(self) -> list[Array]:
        """What the host needs of the device."""
        return [array for part in self.parts for array in (part.chosen, part.rank)]

    def read(self, place: int, chosen: TokenLogprobs, arrays: Sequence[Any]) -> TokenLogprobs:
        """`chosen`, its best tokens replaced by those that the row named, if it named any."""
        if place not in self.spans:
            return chosen
        start, ids = self.spans[place]
        logprobs, ranks = (np.concatenate(arrays[i::2])[start : start + len(ids)].tolist() for i in (0, 1))
        return TokenLogprobs((chosen.token_ids[0], *ids), (chosen.logprobs[0], *logprobs), (chosen.ranks[0], *ranks))


def named_logprobs(ops: Ops, logits: Array, named: dict[int, tuple[int, ...]]) -> Named:
    """Of the rows of `logits [rows, vocabulary]` by their places. The operation tells of one token of a row, so it
    reads a row once for each."""
    spans: dict[int, tuple[int, tuple[int, ...]]] = {}
    asked: list[tuple[int, int]] = []
    for place, ids in named.items():
        spans[place] = len(asked), ids
        asked += [(place, token_id) for token_id in ids]
    parts = []
    for start in range(0, len(asked), ROWS_AT_ONCE):
        places, tokens = zip(*asked[start : start + ROWS_AT_ONCE], strict=True)
        ids = ops.array(np.array(tokens, np.int32), "int32")
        parts.append(ops.logprobs(logits[ops.array(list(places), "int64")], ids, 0))
    return Named(spans, parts)
