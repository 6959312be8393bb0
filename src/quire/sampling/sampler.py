"""The sampler: fixed stages from a row's logits to its next token.

    raw logits -> log-probabilities asked for
               -> allowed tokens -> bias -> minimum -> bad words -> penalties      (features, in this order)
               -> temperature -> min_p -> top_k -> top_p -> draw                   (`ops.sample`)

Everything about a row depends on that row alone; the noise of a draw is a function of the request's seed and
the position of the token (see `ops.reference`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow, RowResult, TokenLogprobs
from quire.ops.types import Array, Ops, SampleBatch
from quire.sampling.features import LogitsFeature
from quire.sampling.logits import AllowedTokens, BadWords, LogitBias, MinTokens
from quire.sampling.logprobs import token_logprobs
from quire.sampling.penalties import Penalties

_make = tuple.__new__  # a NamedTuple at half the cost of its constructor
NOT_FINITE = "the model gave logits that are not finite"
NOTHING_LEFT = "no token is allowed: the masks of the request exclude the whole vocabulary"


@dataclass(slots=True)
class _Numbers:
    """Parameters of the draw by row."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seeds: NDArray[np.uint64]


class Sampler:
    """Draws tokens for rows. `max_rows` is the number of permanent rows."""

    def __init__(self, ops: Ops, max_rows: int) -> None:
        self._ops = ops
        self._numbers = _Numbers(
            np.zeros(max_rows, np.float32),
            np.zeros(max_rows, np.int32),
            np.ones(max_rows, np.float32),
            np.zeros(max_rows, np.float32),
            np.zeros(max_rows, np.uint64),
        )
        self._features: tuple[LogitsFeature, ...] = (
            AllowedTokens(ops),
            LogitBias(ops),
            MinTokens(ops),
            BadWords(),
            Penalties(ops),
        )
        self._users: set[int] = set()
        """Rows that use a feature: when a step has none, its logits go to the draw untouched."""
        self._num_logprobs: dict[int, int] = {}

    def add(self, new: NewRow) -> None:
        """A request takes a row."""
        row, spec = new.row, new.sampling
        self._numbers.temperature[row] = spec.temperature
        self._numbers.top_k[row] = spec.top_k
        self._numbers.top_p[row] = spec.top_p
        self._numbers.min_p[row] = spec.min_p
        self._numbers.seeds[row] = spec.seed % 2**64
        if spec.num_logprobs is not None:
            self._num_logprobs[row] = spec.num_logprobs
        if _edits_logits(new):
            self._users.add(row)
            for feature in self._features:
                feature.add(new)

    def remove(self, row: int) -> None:
        """Clear all of a row."""
        self._num_logprobs.pop(row, None)
        if row in self._users:
            self._users.discard(row)
            for feature in self._features:
                feature.remove(row)

    def takes_the_best(self, rows: Sequence[int]) -> bool:
        """Whether all that these rows want of their logits is the largest: greedy, unedited, no log-probabilities."""
        greedy = not self._numbers.temperature[np.array(rows)].any()
        return greedy and self._users.isdisjoint(rows) and self._num_logprobs.keys().isdisjoint(rows)

    def take(self, tokens: Array, finite: Array, rows: Sequence[int]) -> list[RowResult]:
        """The results of rows that take the best: what `Model.greedy` gave, as `sample` would put it."""
        to_numpy = self._ops.to_numpy
        return [
            _make(RowResult, (row, (token,), (), (), None)) if ok else RowResult(row, (), error=NOT_FINITE)
            for row, token, ok in zip(rows, to_numpy(tokens).tolist(), to_numpy(finite).tolist(), strict=True)
        ]

    def sample(self, logits: Array, rows: Sequence[int], positions: Sequence[int]) -> list[RowResult]:
        """One token for each row. No state of rows changes until `observe` is told what is kept.

        Args:
            logits: float32 `[rows, vocabulary]`, edited in place.
            rows: the permanent row of each.
            positions: index in its sequence of the token to draw.
        """
        ops = self._ops
        errors: list[str | None] = [None] * len(rows)
        finite = ops.to_numpy(ops.rows_finite(logits))
        if not finite.all():
            errors = [None if ok else NOT_FINITE for ok in finite]
            logits[ops.array(~finite, "bool")] = 0.0
        raw = self._raw_copy(logits, rows)
        if not self._users.isdisjoint(rows):
            for feature in self._features:
                feature.apply(logits, rows)
            left = ops.to_numpy(ops.rows_finite(logits))
            if not left.all():
                errors = [error or (None if ok else NOTHING_LEFT) for error, ok in zip(errors, left, strict=True)]
                logits[ops.array(~left, "bool")] = 0.0
        tokens = ops.to_numpy(ops.sample(logits, self._batch(rows, positions))).tolist()
        if raw is None and not any(errors):
            return [_make(RowResult, (row, (token,), (), (), None)) for row, token in zip(rows, tokens, strict=True)]
        logprobs = self._logprobs(raw, rows, tokens)
        return [
            RowResult(row, (token,), logprobs.get(row, ())) if error is None else RowResult(row, (), error=error)
            for row, token, error in zip(rows, tokens, errors, strict=True)
        ]

    def followed(self, results: Sequence[RowResult]) -> list[RowResult]:
        """Those whose tokens `observe` wants to know."""
        return [result for result in results if result.row in self._users] if self._users else []

    def observe(self, row: int, token_id: int) -> None:
        """`token_id` was appended to the sequence of `row`."""
        if row in self._users:
            for feature in self._features:
                feature.observe(row, token_id)

    def _raw_copy(self, logits: Array, rows: Sequence[int]) -> Array | None:
        wanted = [index for index, row in enumerate(rows) if row in self._num_logprobs]
        return logits[self._ops.array(wanted, "int64")] if wanted else None

    def _logprobs(
        self, raw: Array | None, rows: Sequence[int], tokens: Sequence[int]
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        if raw is None:
            return {}
        wanted = [(row, token) for row, token in zip(rows, tokens, strict=True) if row in self._num_logprobs]
        counts = [self._num_logprobs[row] for row, _ in wanted]
        found = token_logprobs(self._ops, raw, [token for _, token in wanted], counts)
        return {row: (item,) for (row, _), item in zip(wanted, found, strict=True)}

    def _batch(self, rows: Sequence[int], positions: Sequence[int]) -> SampleBatch:
        index, numbers, array = np.array(rows), self._numbers, self._ops.array
        return SampleBatch(
            temperature=array(numbers.temperature[index], "float32"),
            top_k=array(numbers.top_k[index], "int32"),
            top_p=array(numbers.top_p[index], "float32"),
            min_p=array(numbers.min_p[index], "float32"),
            seeds=array(numbers.seeds[index], "uint64"),
            positions=array(np.array(positions, np.int64), "int64"),
        )


def _edits_logits(new: NewRow) -> bool:
    spec = new.sampling
    return bool(
        spec.allowed_token_ids
        or spec.logit_bias
        or spec.min_tokens
        or spec.bad_words
        or spec.presence_penalty
        or spec.frequency_penalty
        or spec.repetition_penalty != 1
    )
