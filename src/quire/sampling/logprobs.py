"""Log-probabilities of raw logits, or these themselves, as the plain values that go up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quire.core.plan import TokenLogprobs
from quire.ops.types import Array, Logprobs, Provider

ROWS_AT_ONCE = 16
"""Copies of rows of logits that exist at one time, where a request names tokens."""


def values_of(ops: Provider, logits: Array, token_ids: Array, num_top: int, mode: str) -> Logprobs:
    """What `Ops.logprobs` gives, with logits in place of their log-probabilities where `mode` is `raw_logits`."""
    found = ops.logprobs(logits, token_ids, num_top)
    if mode != "raw_logits":
        return found
    rows = ops.array(np.arange(len(token_ids)), "int64")
    return replace(found, chosen=logits[rows, token_ids], top_logprobs=logits[rows[:, None], found.top_ids])


def token_logprobs(arrays: Sequence[Any], place: int, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities at one position: of the chosen token, then of the `num_top` best.

    Args:
        arrays: those of `Logprobs`, in its order, as numpy has them.
        place: the index of the position in them.
        token_id: the chosen token.
    """
    chosen, rank, top_ids, top_logprobs = (array[place].tolist() for array in arrays)
    return TokenLogprobs(
        (token_id, *top_ids[:num_top]), (chosen, *top_logprobs[:num_top]), (rank, *range(1, num_top + 1))
    )


@dataclass(frozen=True, slots=True)
class RequestedLogprobs:
    """Log-probabilities of those rows of a step whose requests ask for them, on the device."""

    places: dict[int, int]
    """Index of a row among those sampled -> its place in `best`."""
    num_top: Sequence[int]
    """By place: how many of the best are reported."""
    best: Logprobs
    """Of the chosen and the best tokens, `[places]`."""
    spans: dict[int, tuple[int, tuple[int, ...]]]
    """Place of a row that names tokens -> where these begin in `named`, and which they are."""
    named: Sequence[Logprobs]
    """Of the named tokens of all rows, one after the other, in chunks."""

    def arrays(self) -> list[Array]:
        """What the host needs of the device: arrays `[places]`, then those of the chunks."""
        best = self.best
        named = [array for chunk in self.named for array in (chunk.chosen, chunk.rank)]
        return [best.chosen, best.rank, best.top_ids, best.top_logprobs, *named]

    def read(self, index: int, token_id: int, arrays: Sequence[Any]) -> tuple[TokenLogprobs, ...]:
        """What is reported of a row: nothing, or the chosen token and the best, or those that it names instead.

        Args:
            index: of the row among those sampled.
            token_id: the token that was sampled for it.
            arrays: those of `arrays()`, as numpy has them.
        """
        place = self.places.get(index)
        if place is None:
            return ()
        found = token_logprobs(arrays[:4], place, token_id, self.num_top[place])
        if place not in self.spans:
            return (found,)
        start, ids = self.spans[place]
        logprobs, ranks = (np.concatenate(arrays[4 + i :: 2])[start : start + len(ids)].tolist() for i in (0, 1))
        return (TokenLogprobs((token_id, *ids), (found.logprobs[0], *logprobs), (found.ranks[0], *ranks)),)


class LogprobRequests:
    """Which rows ask for log-probabilities of their sampled tokens, and of which tokens.

    Args:
        mode: `EngineArgs.logprobs_mode`.
    """

    def __init__(self, mode: str = "raw_logprobs") -> None:
        self._mode = mode
        self._num_top: dict[int, int] = {}
        self._named: dict[int, tuple[int, ...]] = {}
        """Rows of `_num_top` for which these tokens are reported instead of the best."""

    def add(self, row: int, num_top: int, named: tuple[int, ...]) -> None:
        """`row` asks for the best `num_top`, or for those `named`, if there are any."""
        self._num_top[row] = num_top
        if named:
            self._named[row] = named

    def remove(self, row: int) -> None:
        """Forget the row, whether it asked or not."""
        self._num_top.pop(row, None)
        self._named.pop(row, None)

    def isdisjoint(self, rows: Sequence[int]) -> bool:
        """Whether none of `rows` asks."""
        return self._num_top.keys().isdisjoint(rows)

    def indices(self, rows: Sequence[int]) -> list[int]:
        """The indices of those of `rows` that ask."""
        return [index for index, row in enumerate(rows) if row in self._num_top]

    def compute(
        self, ops: Provider, raw: Array, tokens: Array, rows: Sequence[int], indices: list[int]
    ) -> RequestedLogprobs:
        """Launch what the rows ask for.

        Args:
            raw: the model's own logits, float32 `[len(indices), vocabulary]`.
            tokens: the sampled tokens, int32 `[len(indices)]`, on the device.
            rows: all permanent rows of the step.
            indices: of those that ask, see `indices()`.
        """
        num_top = [self._num_top[rows[index]] for index in indices]
        best = values_of(ops, raw, tokens, max(num_top), self._mode)
        spans: dict[int, tuple[int, tuple[int, ...]]] = {}
        pairs: list[tuple[int, int]] = []
        for place, index in enumerate(indices):
            ids = self._named.get(rows[index], ())
            if ids:
                spans[place] = len(pairs), ids
                pairs += [(place, token_id) for token_id in ids]
        named = []
        for start in range(0, len(pairs), ROWS_AT_ONCE):  # the operation reports one token of a row: a row for each
            places, token_ids = zip(*pairs[start : start + ROWS_AT_ONCE], strict=True)
            chosen = ops.array(np.array(token_ids, np.int32), "int32")
            named.append(values_of(ops, raw[ops.array(list(places), "int64")], chosen, 0, self._mode))
        return RequestedLogprobs({index: place for place, index in enumerate(indices)}, num_top, best, spans, named)
