"""The sampler: fixed stages from a row's logits to its next token.

    raw logits -> log-probabilities, where a request asks for them
               -> features, in their order (`quire.sampling.features`)             edit the logits
               -> temperature -> min_p -> top_k -> top_p -> Gumbel maximum         `ops.sample`

Everything about a row depends on that row alone; the noise of a sample is a function of the request's seed and the
position of the token (see `ops.reference`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from quire.core.plan import NewRow, RowResult
from quire.errors import NO_TOKEN_LEFT
from quire.ops.types import Array, Provider, SampleBatch
from quire.sampling.features import HoldingFeature, SamplingFeature
from quire.sampling.logprobs import LogprobRequests, RequestedLogprobs

_make = tuple.__new__  # a NamedTuple at half the cost of its constructor
NOT_FINITE = "the model gave logits that are not finite"
_ERRORS = (NOT_FINITE, NO_TOKEN_LEFT)


class _Numbers(NamedTuple):
    """Parameters of sampling by permanent row, on the host or on the device."""

    temperature: Array  # [max_rows] float32
    top_k: Array  # [max_rows] int32
    top_p: Array  # [max_rows] float32
    min_p: Array  # [max_rows] float32
    seeds: Array  # [max_rows] uint64


class PendingSamples:
    """One token for each of some rows, which may still be on its way from the device.

    Args:
        rows: the permanent rows, `[rows]`.
        tokens: int32 `[rows]`, on the device.
        flags: bool `[rows]` each: whether a row's logits were finite, and whether they still were when they had been
            edited; the second may be left out.
        logprobs: None where no row asks for them.
    """

    def __init__(
        self,
        ops: Provider,
        rows: Sequence[int],
        tokens: Array,
        flags: Sequence[Array],
        logprobs: RequestedLogprobs | None = None,
    ) -> None:
        self.rows = rows
        self.tokens = tokens
        self._num_flags = len(flags)
        self._logprobs = logprobs
        self._fetched = ops.fetch([tokens, *flags, *(() if logprobs is None else logprobs.arrays())])

    def read(self, indices: Sequence[int]) -> list[RowResult]:
        """The results of `rows[index]` for each of `indices`; waits for the device."""
        tokens, *others = self._fetched()
        flags, arrays = others[: self._num_flags], others[self._num_flags :]
        ids, rows, logprobs = tokens.tolist(), self.rows, self._logprobs
        if logprobs is None and all(flag.all() for flag in flags):
            return [_make(RowResult, (rows[index], (ids[index],), (), (), None)) for index in indices]
        results = []
        for index in indices:
            error = next((text for text, flag in zip(_ERRORS, flags, strict=False) if not flag[index]), None)
            if error is not None:
                results.append(RowResult(rows[index], (), error=error))
            else:
                found = () if logprobs is None else logprobs.read(index, ids[index], arrays)
                results.append(RowResult(rows[index], (ids[index],), found))
        return results


class Sampler:
    """Samples tokens for rows.

    Args:
        max_rows: the number of permanent rows.
        features: what edits logits, in the order in which it is applied. One of them may be a `HoldingFeature`.
        logprobs_mode: `EngineArgs.logprobs_mode`.
    """

    def __init__(
        self,
        ops: Provider,
        max_rows: int,
        features: Sequence[SamplingFeature] = (),
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
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
        self._features: list[tuple[SamplingFeature, set[int]]] = [(feature, set()) for feature in features]
        """Each with the rows that use it."""
        self._holding: HoldingFeature | None = None
        self._held: set[int] = set()
        for feature, rows in self._features:
            if isinstance(feature, HoldingFeature):
                self._holding, self._held = feature, rows
        self._edited: set[int] = set()
        """Rows that use a feature: when a step has none, its logits are sampled untouched."""
        self._logprobs = LogprobRequests(logprobs_mode)

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
            self._logprobs.add(row, spec.num_logprobs, spec.logprob_token_ids)
        for feature, rows in self._features:
            if feature.uses(spec):
                self._edited.add(row)  # first: `remove` looks only there
                rows.add(row)
                feature.add(new)

    def remove(self, row: int) -> None:
        """Clear all of a row. After a fault it is called again."""
        self._logprobs.remove(row)
        if row in self._edited:
            for feature, rows in self._features:
                if row in rows:
                    feature.remove(row)
                    rows.remove(row)
            self._edited.remove(row)

    def needs_only_tokens(self, rows: Sequence[int]) -> bool:
        """Whether all that these rows need of their logits is a token: unedited, no log-probabilities."""
        return self._edited.isdisjoint(rows) and self._logprobs.isdisjoint(rows)

    def all_greedy(self, rows: Sequence[int]) -> bool:
        """Whether all that these rows need of their logits is the largest."""
        return self.needs_only_tokens(rows) and not self._numbers.temperature[np.array(rows)].any()

    def wrap_tokens(self, tokens: Array, finite: Array, rows: Sequence[int]) -> PendingSamples:
        """What `sample_tokens` or `Model.greedy` gave for `rows` (int32 and bool `[rows]`), as `sample` gives it."""
        return PendingSamples(self._ops, rows, tokens, [finite])

    def refresh(self) -> None:
        """Let `sample_tokens` know the numbers of rows that have entered. It always reads the same arrays."""
        if self._on_device is None:
            kinds = ("float32", "int32", "float32", "float32", "uint64")
            self._on_device = _Numbers(*map(self._ops.array, self._numbers, kinds))
        elif self._are_stale:
            for target, values in zip(self._on_device, self._numbers, strict=True):
                target[:] = self._ops.array(values, values.dtype.name)
        self._are_stale = False

    def sample_tokens(self, logits: Array, rows: Array, positions: Array) -> tuple[Array, Array]:
        """Sample rows that need only tokens. `refresh` came before. Makes the same launches each time.

        Args:
            logits: float32 `[rows, vocabulary]`; a row that is not finite is zeroed.
            rows: permanent rows, int64 `[rows]`, on the device.
            positions: index in its sequence of the token to sample, int64 `[rows]`, on the device.

        Returns:
            Tokens int32 `[rows]`, and whether the logits were finite, bool `[rows]`.
        """
        finite = self._ops.zero_nonfinite_rows(logits)
        return self._choose(logits, rows, positions), finite

    def _choose(self, logits: Array, rows: Array, positions: Array) -> Array:
        assert self._on_device is not None
        numbers = _Numbers(*(values[rows] for values in self._on_device))
        return self._ops.sample(logits, SampleBatch(*numbers, positions))

    def sample(self, logits: Array, rows: Sequence[int], positions: Sequence[int]) -> PendingSamples:
        """One token for each row, without waiting for the device. No state of rows changes: `on_token` does that for
        tokens that are kept.

        Args:
            logits: float32 `[rows, vocabulary]`, edited in place.
            rows: the permanent row of each.
            positions: index in its sequence of the token to sample.
        """
        ops = self._ops
        self.refresh()
        asking = self._logprobs.indices(rows)
        chosen = ops.array(asking, "int64") if asking else None
        flags = [ops.zero_nonfinite_rows(logits)]
        raw = None if chosen is None else logits[chosen]
        if not self._edited.isdisjoint(rows):
            self._edit(logits, rows, positions)
            flags.append(ops.zero_nonfinite_rows(logits))
        tokens = self._choose(logits, ops.array(rows, "int64"), ops.array(positions, "int64"))
        if not self._held.isdisjoint(rows):
            self._decide(tokens, rows)
        if raw is None:
            return PendingSamples(ops, rows, tokens, flags)
        logprobs = self._logprobs.compute(ops, raw, tokens[chosen], rows, asking)
        return PendingSamples(ops, rows, tokens, flags, logprobs)

    def _decide(self, tokens: Array, rows: Sequence[int]) -> None:
        """Waits for the device: rows that are held wait for their own tokens anyway."""
        assert self._holding is not None
        sampled = self._ops.to_numpy(tokens).tolist()
        places = [place for place, row in enumerate(rows) if row in self._held]
        decided = [self._holding.decide(rows[place], sampled[place]) for place in places]
        if decided != [sampled[place] for place in places]:
            tokens[self._ops.array(places, "int64")] = self._ops.array(decided, "int32")

    def _edit(self, logits: Array, rows: Sequence[int], positions: Sequence[int]) -> None:
        for feature, users in self._features:
            places = [place for place, row in enumerate(rows) if row in users] if users else []
            if places:
                feature.apply(logits, [rows[place] for place in places], places, [positions[place] for place in places])

    def on_token(self, row: int, token_id: int) -> None:
        """`token_id` was appended to the sequence of `row`."""
        for feature, rows in self._features:
            if row in rows:
                feature.on_token(row, token_id)

    def forced(self, row: int) -> Sequence[int]:
        """Tokens that must come next in `row`, so that they can be appended without being sampled. None of them where
        the request wants to see log-probabilities, or where another feature might forbid one."""
        if self._holding is None or row not in self._held or not self._logprobs.isdisjoint((row,)):
            return ()
        is_alone = sum(row in rows for _, rows in self._features) == 1
        return self._holding.forced(row) if is_alone else ()

    def edited(self, results: Sequence[RowResult]) -> list[RowResult]:
        """Those of rows that use a feature: `on_token` is for them."""
        return [result for result in results if result.row in self._edited] if self._edited else []
