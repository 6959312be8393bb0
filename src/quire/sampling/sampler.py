"""The sampler: fixed stages from a row's logits to its next token.

    raw logits -> log-probabilities asked for
               -> allowed tokens -> bias -> minimum -> bad words -> penalties      (features, in this order)
               -> temperature -> min_p -> top_k -> top_p -> draw                   (`ops.sample`)

Everything about a row depends on that row alone; the noise of a draw is a function of the request's seed and
the position of the token (see `ops.reference`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from quire.core.plan import NewRow, RowResult, TokenLogprobs
from quire.errors import NO_TOKEN_LEFT
from quire.ops.types import Array, Logprobs, Ops, SampleBatch
from quire.sampling.features import LogitsFeature
from quire.sampling.logits import TokenRules
from quire.sampling.logprobs import Named, named_logprobs, token_logprobs
from quire.sampling.penalties import Penalties

_make = tuple.__new__  # a NamedTuple at half the cost of its constructor
NOT_FINITE = "the model gave logits that are not finite"
_ERRORS = (NOT_FINITE, NO_TOKEN_LEFT)


class _Numbers(NamedTuple):
    """Parameters of the draw by permanent row, on the host or on the device."""

    temperature: Array  # [max_rows] float32
    top_k: Array  # int32
    top_p: Array  # float32
    min_p: Array  # float32
    seeds: Array  # uint64


@dataclass(frozen=True, slots=True)
class Wanted:
    """Log-probabilities of those rows of a draw that want them."""

    places: dict[int, int]
    """Index of a row -> its place in `found`."""
    num_top: list[int]
    found: Logprobs | None
    named: Named

    def arrays(self) -> list[Array]:
        """What the host needs of the device."""
        found = self.found
        if found is None:
            return []
        return [found.chosen, found.rank, found.top_ids, found.top_logprobs, *self.named.arrays()]

    def read(self, index: int, token_id: int, arrays: Sequence[Any]) -> tuple[TokenLogprobs, ...]:
        """Of the row at `index`, from `arrays` as numpy has them."""
        place = self.places.get(index)
        if place is None:
            return ()
        found = token_logprobs(arrays[:4], place, token_id, self.num_top[place])
        return (self.named.read(place, found, arrays[4:]),)


_NO_LOGPROBS = Wanted({}, [], None, Named({}, []))


class Drawn:
    """One token for each of some rows, which may still be on its way from the device."""

    def __init__(self, ops: Ops, rows: Sequence[int], tokens: Array, flags: Sequence[Array], logprobs: Wanted) -> None:
        """`tokens [rows]` int32, on the device. `flags`: whether a row's logits were finite, and whether they still
        were when they had been edited, bool `[rows]`; the second may be left out."""
        self.rows = rows
        self.tokens = tokens
        self._num_flags = len(flags)
        self._logprobs = logprobs
        self._fetched = ops.fetch([tokens, *flags, *logprobs.arrays()])

    def read(self, indices: Sequence[int]) -> list[RowResult]:
        """The results of `rows[index]` for some of the rows; waits for the device."""
        tokens, *others = self._fetched()
        flags, logprobs = others[: self._num_flags], others[self._num_flags :]
        ids, rows = tokens.tolist(), self.rows
        if not logprobs and all(flag.all() for flag in flags):
            return [_make(RowResult, (rows[index], (ids[index],), (), (), None)) for index in indices]
        results = []
        for index in indices:
            error = next((text for text, flag in zip(_ERRORS, flags, strict=False) if not flag[index]), None)
            if error is not None:
                results.append(RowResult(rows[index], (), error=error))
            else:
                found = self._logprobs.read(index, ids[index], logprobs)
                results.append(RowResult(rows[index], (ids[index],), found))
        return results


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
        self._on_device: _Numbers | None = None
        self._are_stale = True
        """The numbers on the device."""
        self._features: tuple[LogitsFeature, ...] = (TokenRules(ops), Penalties(ops))
        self._users: set[int] = set()
        """Rows that use a feature: when a step has none, its logits go to the draw untouched."""
        self._num_logprobs: dict[int, int] = {}
        self._named_logprobs: dict[int, tuple[int, ...]] = {}
        """Rows of `_num_logprobs` that are told of these tokens instead of the best."""

    def add(self, new: NewRow) -> None:
        """A request takes a row."""
        row, spec = new.row, new.sampling
        self._are_stale = True
        self._numbers.temperature[row] = spec.temperature
        self._numbers.top_k[row] = spec.top_k
        self._numbers.top_p[row] = spec.top_p
        self._numbers.min_p[row] = spec.min_p
        self._numbers.seeds[row] = spec.seed % 2**64
        if spec.num_logprobs is not None:
            self._num_logprobs[row] = spec.num_logprobs
            if spec.logprob_token_ids:
                self._named_logprobs[row] = spec.logprob_token_ids
        if _edits_logits(new):
            self._users.add(row)
            for feature in self._features:
                feature.add(new)

    def remove(self, row: int) -> None:
        """Clear all of a row. After a fault it is called again."""
        self._num_logprobs.pop(row, None)
        self._named_logprobs.pop(row, None)
        if row in self._users:
            for feature in self._features:
                feature.remove(row)
            self._users.remove(row)

    def only_draws(self, rows: Sequence[int]) -> bool:
        """Whether all that these rows want of their logits is a token: unedited, no log-probabilities."""
        return self._users.isdisjoint(rows) and self._num_logprobs.keys().isdisjoint(rows)

    def takes_the_best(self, rows: Sequence[int]) -> bool:
        """Whether all that these rows want of their logits is the largest."""
        return self.only_draws(rows) and not self._numbers.temperature[np.array(rows)].any()

    def take(self, tokens: Array, finite: Array, rows: Sequence[int]) -> Drawn:
        """The draw of rows that only draw: what `draw` or `Model.greedy` gave, as `sample` would put it."""
        return Drawn(self._ops, rows, tokens, [finite], _NO_LOGPROBS)

    def refresh(self) -> None:
        """Let `draw` know the numbers of rows that have entered. What it reads are always the same arrays."""
        if self._on_device is None:
            kinds = ("float32", "int32", "float32", "float32", "uint64")
            self._on_device = _Numbers(*map(self._ops.array, self._numbers, kinds))
        elif self._are_stale:
            for target, values in zip(self._on_device, self._numbers, strict=True):
                target[:] = self._ops.array(values, values.dtype.name)
        self._are_stale = False

    def draw(self, logits: Array, rows: Array, positions: Array) -> tuple[Array, Array]:
        """Tokens int32 `[rows]`, and bool `[rows]`: whether the logits are finite; they are cleared where they are not.
        `rows` and `positions` int64 are on the device; `refresh` came before. Makes the same launches each time."""
        finite = self._ops.clear_broken(logits)
        return self._choose(logits, rows, positions), finite

    def _choose(self, logits: Array, rows: Array, positions: Array) -> Array:
        assert self._on_device is not None
        numbers = _Numbers(*(values[rows] for values in self._on_device))
        return self._ops.sample(logits, SampleBatch(*numbers, positions))

    def sample(self, logits: Array, rows: Sequence[int], positions: Sequence[int]) -> Drawn:
        """One token for each row, without waiting for the device. No state of rows changes until `observe` is told
        what is kept.

        Args:
            logits: float32 `[rows, vocabulary]`, edited in place.
            rows: the permanent row of each.
            positions: index in its sequence of the token to draw.
        """
        ops = self._ops
        self.refresh()
        wanted = [index for index, row in enumerate(rows) if row in self._num_logprobs]
        chosen = ops.array(wanted, "int64") if wanted else None
        flags = [ops.clear_broken(logits)]
        raw = None if chosen is None else logits[chosen]
        if not self._users.isdisjoint(rows):
            for feature in self._features:
                feature.apply(logits, rows, positions)
            flags.append(ops.clear_broken(logits))
        tokens = self._choose(logits, ops.array(rows, "int64"), ops.array(positions, "int64"))
        if raw is None:
            return Drawn(ops, rows, tokens, flags, _NO_LOGPROBS)
        num_top = [self._num_logprobs[rows[index]] for index in wanted]
        found = ops.logprobs(raw, tokens[chosen], max(num_top))
        places = {index: place for place, index in enumerate(wanted)}
        named = {
            place: self._named_logprobs[rows[index]]
            for index, place in places.items()
            if rows[index] in self._named_logprobs
        }
        return Drawn(ops, rows, tokens, flags, Wanted(places, num_top, found, named_logprobs(ops, raw, named)))

    def follows(self, row: int) -> bool:
        """Whether the next draw of `row` depends on the tokens before it: `observe` must have been told of them."""
        return row in self._users and any(feature.follows(row) for feature in self._features)

    def followed(self, results: Sequence[RowResult]) -> list[RowResult]:
        """Those whose tokens `observe` wants to know."""
        return [result for result in results if self.follows(result.row)] if self._users else []

    def observe(self, row: int, token_id: int) -> None:
        """`token_id` was appended to the sequence of `row`."""
        if row in self._users:
            for feature in self._features:
                feature.observe(row, token_id)


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
