"""Runs a plan: rows in and out, gather, model, logits, sample.

A step has two halves. `launch` hands all its work to the device and waits for nothing; `collect` waits for the tokens
that were sampled. Between them the next steps may be launched: what they need of those tokens is on the device, by row.
A row whose next step needs its token on the host (a penalty counts it) is not in a plan before that token is known.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow, RowResult, ScheduledRow, StepPlan, StepResult, TokenLogprobs
from quire.models.model import Model
from quire.ops.types import Array, AttentionBatch, Provider
from quire.runner.faults import RowFaults
from quire.runner.graphs import Capture, DecodeGraphs, GraphBuckets
from quire.runner.memory import PROMPT_LOGPROB_ROWS, StepShape, take_largest_steps
from quire.runner.rows import Rows
from quire.sampling.features import SamplingFeature
from quire.sampling.logprobs import token_logprobs, values_of
from quire.sampling.sampler import NOT_FINITE, PendingSamples, Sampler

logger = logging.getLogger("quire.runner")


@dataclass(slots=True, eq=False)
class InFlightStep:
    """A step between `launch` and `collect`."""

    plan: StepPlan
    samples: list[PendingSamples] = field(default_factory=list)
    """Of the rows that sample: together, or row by row where launching them together failed."""
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...] | None] = field(default_factory=dict)
    """By row, where a request asks for them; None where logits were not finite."""
    removed: set[int] = field(default_factory=set)
    """Rows that were removed since: what was sampled for them is of no use."""
    result: StepResult | None = None
    """Once it is collected."""

    def read(self, scheduled: Sequence[ScheduledRow]) -> list[RowResult]:
        """The results of some rows of the plan; waits for the device."""
        if scheduled is self.plan.scheduled and not self.prompt_logprobs and len(self.samples) == 1:
            (samples,) = self.samples
            if len(samples.rows) == len(scheduled):
                return samples.read(range(len(scheduled)))
        results = {item.row: RowResult(item.row, ()) for item in scheduled}
        for samples in self.samples:
            places = [place for place, row in enumerate(samples.rows) if row in results]
            if places:
                results.update((result.row, result) for result in samples.read(places))
        for row in self.prompt_logprobs.keys() & results.keys():
            found = self.prompt_logprobs[row]
            if found is None:
                results[row] = RowResult(row, (), error=NOT_FINITE)
            elif results[row].error is None:
                results[row] = results[row]._replace(prompt_logprobs=found)
        return [results[item.row] for item in scheduled]


class ModelRunner:
    """One model on one device, its cache and its rows.

    Args:
        num_blocks, block_size: of the paged cache.
        max_rows: permanent rows, the scheduler's `max_num_seqs`.
        max_model_len: longest sequence in tokens.
        features: those of the sampler, in the order in which they edit logits.
        capture: how decode steps become CUDA graphs (`Device.capture`); None: they are launched each time.
        recomputes: `first_difference` will be called, which needs a block of its own.
        logprobs_mode: `EngineArgs.logprobs_mode`.
    """

    def __init__(
        self,
        model: Model,
        ops: Provider,
        *,
        num_blocks: int,
        block_size: int,
        max_rows: int,
        max_model_len: int,
        features: Sequence[SamplingFeature] = (),
        capture: Capture | None = None,
        recomputes: bool = False,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        self._model = model
        self._ops = ops
        self._max_rows = max_rows
        self._spare_block = num_blocks
        """Behind those of the scheduler, where `capture` or `recomputes` wants it."""
        self._cache = ops.make_cache(model.cache_shape(num_blocks + (capture is not None or recomputes), block_size))
        self._rows = Rows(max_rows, max_model_len, block_size)
        self._sampler = Sampler(ops, max_rows, features, logprobs_mode)
        self._logprobs_mode = logprobs_mode
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            buckets = GraphBuckets(max_rows, -(-max_model_len // block_size), block_size)
            self._graphs = DecodeGraphs(
                model, ops, self._cache, self._rows, self._sampler, buckets, num_blocks, capture
            )
        self._faults = RowFaults()
        self._in_flight: deque[InFlightStep] = deque()
        """Steps that are not collected, in their order."""
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}
        """Row -> (number of best tokens, prompt length), for rows that ask for log-probabilities of their prompt."""
        self._host_rows: set[int] = set()
        """Rows whose next step needs their last token on the host."""
        self._dirty_rows: set[int] = set()
        """Rows that a request left and that could not be cleared."""

    def warm_up(self, shape: StepShape) -> None:
        """Before any plan: compute the largest steps once. Memory that the allocator ever takes, it takes now."""
        take_largest_steps(self._model, self._ops, self._cache, shape)
        if self._graphs is not None:
            self._graphs.capture_largest()

    def run_idle_work(self) -> bool:
        """In a moment without work: something that makes later steps quicker; False if there is nothing to do."""
        return self._graphs is not None and self._graphs.run_idle_work()

    def clear(self) -> None:
        """Free every row and forget the steps in flight, in whatever state they are."""
        self._in_flight.clear()
        for row in range(self._max_rows):
            self._clear(row)

    def give_back(self, runs: Sequence[tuple[int, int]]) -> None:
        """Give the memory of these blocks back to the system: see `Device.release_blocks`."""
        for first, number in runs:
            self._ops.release_blocks(self._cache, first, number)

    def first_difference(self, block_ids: Sequence[int], token_ids: Sequence[int]) -> int | None:
        """Between steps: of the blocks of a text, compute the last one, which holds `token_ids`, again, and compare it
        bit for bit: the first layer whose keys or values differ, or None."""
        ops, size, start = self._ops, len(token_ids), (len(block_ids) - 1) * len(token_ids)
        batch = AttentionBatch(
            positions=ops.array(np.arange(start, start + size), "int32"),
            query_starts=ops.array(np.array([0, size]), "int32"),
            starts=ops.array(np.array([start]), "int32"),
            block_tables=ops.array(np.array([[*block_ids[:-1], self._spare_block]]), "int32"),
        )
        self._model.forward(ops.array(np.array(token_ids), "int32"), batch, self._cache)
        for layer in range(self._model.spec.num_layers):
            kept, computed = (ops.block_bytes(self._cache, one, layer) for one in (block_ids[-1], self._spare_block))
            if kept != computed:
                return layer
        return None

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. A fault in the work of one row fails that row (see `quire.runner.faults`).

        Raises:
            Exception: no row can be computed, or one cannot be cleared before the next request enters it.
        """
        return self._read(self._start(plan))

    def launch(self, plan: StepPlan) -> InFlightStep:
        """The first half of `execute`: hand all work of a step to the device, without waiting for it."""
        step = self._start(plan)
        for samples in step.samples:
            self._rows.add_pending(samples.rows, samples.tokens, self._ops)
        self._in_flight.append(step)
        return step

    def collect(self, step: InFlightStep) -> StepResult:
        """The second half; steps that were launched before are collected first. A second call gives the same."""
        while step.result is None:
            first = self._in_flight.popleft()
            pending = chain.from_iterable(samples.rows for samples in first.samples)
            self._rows.resolve_pending([row for row in pending if row not in first.removed])
            first.result = self._read(first)
        return step.result

    def _start(self, plan: StepPlan) -> InFlightStep:
        faults = self._faults
        for row in plan.removed:
            self._clear(row)
        for new in plan.new:
            if new.row in self._dirty_rows:
                self._remove(new.row)
                self._dirty_rows.remove(new.row)
            faults.isolate(new.row, self._enter, new)
        for item in plan.scheduled:
            if item.new_block_ids:
                faults.isolate(item.row, self._rows.extend, item.row, item.new_block_ids)
        waiting = (row for row, *_ in plan.scheduled if row in self._host_rows and self._rows.has_pending_token(row))
        assert next(waiting, None) is None, "a plan schedules a row that needs its last token on the host"
        step = InFlightStep(plan)
        for samples, logprobs in faults.retry_rows_individually(self._launch, faults.without_failed(plan.scheduled)):
            step.samples += [] if samples is None else [samples]
            step.prompt_logprobs |= logprobs
        return step

    def _read(self, step: InFlightStep) -> StepResult:
        """Results of all rows of a step; tokens become known ones of their rows."""
        faults, plan, removed = self._faults, step.plan, step.removed
        scheduled = faults.without_failed(plan.scheduled)
        if removed:
            scheduled = [item for item in scheduled if item.row not in removed]
        results = list(chain.from_iterable(faults.retry_rows_individually(step.read, scheduled)))
        results = self._keep(results)
        if faults or removed:
            done = {result.row: result for result in results} | {row: RowResult(row, ()) for row in removed}
            results = [done[row] if row in removed else faults.result(row) or done[row] for row, *_ in plan.scheduled]
        return StepResult(plan.step_id, tuple(results))

    def _clear(self, row: int) -> None:
        """A request leaves its row. If clearing it fails, no request is there to be failed, and the next one that
        enters the row must not find what was left."""
        self._faults.remove(row)
        self._prompt_logprobs.pop(row, None)
        self._host_rows.discard(row)
        for step in self._in_flight:
            step.removed.add(row)
        try:
            self._remove(row)
        except Exception:
            logger.exception("a row was not cleared: it is tried again before the next request enters")
            self._dirty_rows.add(row)

    def _remove(self, row: int) -> None:
        self._rows.remove(row)
        self._sampler.remove(row)

    def _enter(self, new: NewRow) -> None:
        self._rows.enter(new)
        self._sampler.add(new)
        if new.sampling.needs_output_tokens:
            self._host_rows.add(new.row)
        if new.sampling.num_prompt_logprobs is not None:
            self._prompt_logprobs[new.row] = new.sampling.num_prompt_logprobs, new.num_prompt_tokens

    def _keep(self, results: list[RowResult]) -> list[RowResult]:
        """Every token sampled becomes a known one of its row, and so does what is forced after it; a row that failed is
        freed by the next plan. Returns the results with what was forced."""
        sampled = [result for result in results if result.token_ids]
        for result in self._sampler.edited(sampled):
            for token_id in result.token_ids:
                self._faults.isolate(result.row, self._sampler.on_token, result.row, token_id)
        if not sampled:
            return results
        rows, token_ids, *_ = zip(*sampled, strict=True)
        try:
            self._rows.append(rows, list(chain.from_iterable(token_ids)))
        except Exception:  # noqa: BLE001 -- one row's fault: which one shows when each is alone
            for row, tokens in zip(rows, token_ids, strict=True):
                self._faults.isolate(row, self._rows.append, (row,), tokens)
        forced: dict[int, list[int]] = {}
        for result in self._sampler.edited(sampled):
            if self._faults.result(result.row) is None:
                self._faults.isolate(result.row, self._append_forced, result.row, forced)
        if not forced:
            return results
        return [
            result._replace(token_ids=(*result.token_ids, *forced[result.row])) if result.row in forced else result
            for result in results
        ]

    def _append_forced(self, row: int, found: dict[int, list[int]]) -> None:
        """What must come next in `row` comes without a step of its own for each token."""
        tokens: list[int] = []
        while forced := self._sampler.forced(row):
            if len(tokens) + len(forced) > self._rows.room(row):
                break
            for token_id in forced:
                self._sampler.on_token(row, token_id)
            tokens += forced
        if tokens:
            self._rows.append_run(row, tokens)
            found[row] = tokens

    def _launch(
        self, scheduled: Sequence[ScheduledRow]
    ) -> tuple[PendingSamples | None, dict[int, tuple[TokenLogprobs, ...] | None]]:
        """Hand rows to the device: their samples, and the log-probabilities of prompts. Only the cache changes, and
        computing a row again writes the same into it."""
        if self._graphs is not None and all(item.num_tokens == 1 for item in scheduled):
            rows = [item.row for item in scheduled]
            all_sample = all(item.samples for item in scheduled) and self._prompt_logprobs.keys().isdisjoint(rows)
            if all_sample and self._sampler.needs_only_tokens(rows):
                return self._sampler.wrap_tokens(*self._graphs.sample(scheduled), rows), {}
            hidden, ends = self._graphs.forward(scheduled), np.arange(1, len(scheduled) + 1)
        else:
            asking = self._prompt_logprobs
            num_outputs = [item.num_tokens if item.row in asking else int(item.samples) for item in scheduled]
            batch = self._rows.gather(scheduled, num_outputs, self._ops)
            hidden, ends = self._model.forward(batch.token_ids, batch.attention, self._cache), batch.output_ends
        sampling = [index for index, item in enumerate(scheduled) if item.samples]
        samples = self._sample(scheduled, sampling, hidden, ends) if sampling else None
        return samples, self._prompt_logprobs_of(scheduled, hidden, ends) if self._prompt_logprobs else {}

    def _sample(
        self,
        scheduled: Sequence[ScheduledRow],
        sampling: Sequence[int],
        hidden: Array,
        ends: NDArray[np.int64],
    ) -> PendingSamples:
        """Samples of the rows at the indices `sampling`.

        Args:
            hidden: `[outputs, hidden]`, the hidden states that the step gives.
            ends: `[rows]`, where those of each row end.
        """
        picked = hidden if len(hidden) == len(sampling) else hidden[self._ops.array(ends[sampling] - 1, "int64")]
        items = [scheduled[index] for index in sampling]
        rows = [item.row for item in items]
        if self._sampler.all_greedy(rows):
            return self._sampler.wrap_tokens(*self._model.greedy(picked), rows)
        positions = [item.start + item.num_tokens for item in items]
        return self._sampler.sample(self._model.logits(picked), rows, positions)

    def _prompt_logprobs_of(
        self, scheduled: Sequence[ScheduledRow], hidden: Array, ends: NDArray[np.int64]
    ) -> dict[int, tuple[TokenLogprobs, ...] | None]:
        return {
            item.row: self._read_prompt(item, hidden[end - item.num_tokens : end])
            for item, end in zip(scheduled, ends.tolist(), strict=True)
            if item.row in self._prompt_logprobs
        }

    def _read_prompt(self, item: ScheduledRow, hidden: Array) -> tuple[TokenLogprobs, ...] | None:
        """Waits for the device: these are many numbers, and few requests ask for them."""
        ops = self._ops
        num_top, num_prompt = self._prompt_logprobs[item.row]
        stop = min(item.start + item.num_tokens, num_prompt - 1)
        found: list[TokenLogprobs] = []
        for start in range(item.start, stop, PROMPT_LOGPROB_ROWS):
            end = min(start + PROMPT_LOGPROB_ROWS, stop)
            logits = self._model.logits(hidden[start - item.start : end - item.start])
            if not ops.to_numpy(ops.rows_finite(logits)).all():
                return None
            chosen = self._rows.token_ids(item.row, start + 1, end + 1)
            token_ids = ops.array(np.array(chosen, np.int32), "int32")
            wanted = values_of(ops, logits, token_ids, num_top, self._logprobs_mode)
            arrays = ops.fetch([wanted.chosen, wanted.rank, wanted.top_ids, wanted.top_logprobs])()
            found += [token_logprobs(arrays, place, token_id, num_top) for place, token_id in enumerate(chosen)]
        return tuple(found)
