"""Runs a plan: rows in and out, gather, model, logits, sample.

A step has two halves. `begin` hands all its work to the device and waits for nothing; `finish` waits for the tokens
that were drawn. Between them the next steps may begin: what they need of those tokens is on the device, by row. A row
whose next step needs its token on the host (a penalty counts it) is not in a plan before that token is known.
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
from quire.ops.types import Array, AttentionBatch, Ops
from quire.runner.faults import RowFaults
from quire.runner.graphs import DecodeGraphs, GraphLimits, Record
from quire.runner.memory import PROMPT_LOGPROB_ROWS, StepLimits, take_largest_steps
from quire.runner.rows import Rows
from quire.sampling.logprobs import token_logprobs
from quire.sampling.sampler import NOT_FINITE, Drawn, Sampler

logger = logging.getLogger("quire.runner")


@dataclass(frozen=True, slots=True)
class Launched:
    """Some rows of a step, handed to the device."""

    scheduled: Sequence[ScheduledRow]
    sampling: Sequence[int]
    """Which of them sample."""
    drawn: Drawn | None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...] | None]
    """By row, for those that asked; None where logits were not finite."""

    def read(self, scheduled: Sequence[ScheduledRow]) -> list[RowResult]:
        """The results of some of these rows; waits for the device."""
        whole = scheduled is self.scheduled
        if whole and not self.prompt_logprobs and self.drawn is not None and len(self.sampling) == len(scheduled):
            return self.drawn.read(range(len(scheduled)))
        results = {item.row: RowResult(item.row, ()) for item in scheduled}
        if self.drawn is not None:
            drawn_rows = self.drawn.rows
            places = [place for place in range(len(drawn_rows)) if drawn_rows[place] in results]
            results.update((result.row, result) for result in self.drawn.read(places))
        for row in self.prompt_logprobs.keys() & results.keys():
            found = self.prompt_logprobs[row]
            if found is None:
                results[row] = RowResult(row, (), error=NOT_FINITE)
            elif results[row].error is None:
                results[row] = results[row]._replace(prompt_logprobs=found)
        return [results[item.row] for item in scheduled]


@dataclass(slots=True, eq=False)
class BegunStep:
    """A step between its halves."""

    plan: StepPlan
    launched: list[Launched]
    gone: set[int] = field(default_factory=set)
    """Rows that were removed since: what was drawn for them is of no use."""
    result: StepResult | None = None
    """Once it is finished."""


class ModelRunner:
    """One model on one device, its cache and its rows.

    Args:
        num_blocks, block_size: of the paged cache.
        max_rows: permanent rows, the scheduler's `max_num_seqs`.
        max_model_len: longest sequence in tokens.
        record: how decode steps are recorded (`Ops.record`); None: they are launched each time.
        recomputes: `first_difference` will be called, which needs a block of its own.
    """

    def __init__(
        self,
        model: Model,
        ops: Ops,
        *,
        num_blocks: int,
        block_size: int,
        max_rows: int,
        max_model_len: int,
        record: Record | None = None,
        recomputes: bool = False,
    ) -> None:
        self._model = model
        self._ops = ops
        self._spare_block = num_blocks
        """Behind those of the scheduler, where `record` or `recomputes` wants it."""
        self._cache = ops.make_cache(model.cache_shape(num_blocks + (record is not None or recomputes), block_size))
        self._rows = Rows(max_rows, max_model_len, block_size)
        self._sampler = Sampler(ops, max_rows)
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            limits = GraphLimits(max_rows, -(-max_model_len // block_size), block_size)
            self._graphs = DecodeGraphs(model, ops, self._cache, self._rows, self._sampler, limits, num_blocks, record)
        self._faults = RowFaults()
        self._begun: deque[BegunStep] = deque()
        """Steps that are not finished, in their order."""
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}
        """Row -> (number asked for, prompt length), for rows that asked."""
        self._unclean: set[int] = set()
        """Rows that somebody left and that could not be cleared."""

    def warm_up(self, limits: StepLimits) -> None:
        """Before any plan: compute the largest steps once. Memory that the allocator ever takes, it takes now."""
        take_largest_steps(self._model, self._ops, self._cache, limits)
        if self._graphs is not None:
            self._graphs.record_largest()

    def prepare(self) -> bool:
        """In a moment without work: something that makes later steps quicker; False if there is nothing to do."""
        return self._graphs is not None and self._graphs.prepare()

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
        return self._take_in(BegunStep(plan, self._launch_all(plan)))

    def begin(self, plan: StepPlan) -> BegunStep:
        """The first half of `execute`."""
        step = BegunStep(plan, self._launch_all(plan))
        for launched in step.launched:
            if launched.drawn is not None:
                self._rows.expect(launched.drawn.rows, launched.drawn.tokens, self._ops)
        self._begun.append(step)
        return step

    def finish(self, step: BegunStep) -> StepResult:
        """The second half; steps that began before are finished first. Asked again, it says the same."""
        while step.result is None:
            first = self._begun.popleft()
            drawn = (launched.drawn for launched in first.launched if launched.drawn is not None)
            self._rows.arrive([row for one in drawn for row in one.rows if row not in first.gone])
            first.result = self._take_in(first)
        return step.result

    def _launch_all(self, plan: StepPlan) -> list[Launched]:
        faults = self._faults
        for row in plan.removed:
            self._clear(row)
        for new in plan.new:
            if new.row in self._unclean:
                self._remove(new.row)
                self._unclean.remove(new.row)
            faults.contain(new.row, self._enter, new)
        for item in plan.scheduled:
            if item.new_block_ids:
                faults.contain(item.row, self._rows.extend, item.row, item.new_block_ids)
        waiting = (row for row, *_ in plan.scheduled if self._rows.awaits(row) and self._sampler.follows(row))
        assert next(waiting, None) is None, "a plan schedules a row that needs its last token on the host"
        return faults.apart_if_it_fails(self._launch, faults.without_failed(plan.scheduled))

    def _take_in(self, step: BegunStep) -> StepResult:
        """Results of all rows of a step; tokens become known ones of their rows."""
        faults, plan = self._faults, step.plan
        results: list[RowResult] = []
        for launched in step.launched:
            asked = launched.scheduled
            if step.gone:
                asked = [item for item in asked if item.row not in step.gone]
            results += chain.from_iterable(faults.apart_if_it_fails(launched.read, asked))
        self._keep([result for result in results if result.token_ids], faults)
        if faults or step.gone:
            done = {row: RowResult(row, ()) for row in step.gone} | {result.row: result for result in results}
            results = [done[row] if row in step.gone else faults.result(row) or done[row] for row, *_ in plan.scheduled]
        return StepResult(plan.step_id, tuple(results))

    def _clear(self, row: int) -> None:
        """A row is left. If that fails, nobody is there to be told; whoever enters next must not find what was left."""
        self._faults.remove(row)
        self._prompt_logprobs.pop(row, None)
        for step in self._begun:
            step.gone.add(row)
        try:
            self._remove(row)
        except Exception:
            logger.exception("a row was not cleared: it is tried again before the next request enters")
            self._unclean.add(row)

    def _remove(self, row: int) -> None:
        self._rows.remove(row)
        self._sampler.remove(row)

    def _enter(self, new: NewRow) -> None:
        self._rows.enter(new)
        self._sampler.add(new)
        if new.sampling.num_prompt_logprobs is not None:
            self._prompt_logprobs[new.row] = new.sampling.num_prompt_logprobs, new.num_prompt_tokens

    def _keep(self, sampled: Sequence[RowResult], faults: RowFaults) -> None:
        """Every token sampled becomes a known one of its row; a row that failed is freed by the next plan."""
        for result in self._sampler.followed(sampled):
            for token_id in result.token_ids:
                faults.contain(result.row, self._sampler.observe, result.row, token_id)
        if not sampled:
            return
        rows, token_ids, *_ = zip(*sampled, strict=True)
        try:
            self._rows.append(rows, list(chain.from_iterable(token_ids)))
        except Exception:  # noqa: BLE001 -- it is some row's: which one shows when each is alone
            for row, tokens in zip(rows, token_ids, strict=True):
                faults.contain(row, self._rows.append, (row,), tokens)

    def _launch(self, scheduled: Sequence[ScheduledRow]) -> Launched:
        """Hand rows to the device. Only the cache changes, and computing a row again writes the same into it."""
        if self._graphs is not None and all(item.num_tokens == 1 for item in scheduled):
            rows = [item.row for item in scheduled]
            tells = all(item.samples for item in scheduled) and self._prompt_logprobs.keys().isdisjoint(rows)
            if tells and self._sampler.only_draws(rows):
                tokens, finite = self._graphs.draw(scheduled)
                return Launched(scheduled, range(len(rows)), self._sampler.take(tokens, finite, rows), {})
            hidden, ends = self._graphs.forward(scheduled), np.arange(1, len(scheduled) + 1)
        else:
            told = self._prompt_logprobs
            num_outputs = [item.num_tokens if item.row in told else int(item.samples) for item in scheduled]
            batch = self._rows.gather(scheduled, num_outputs, self._ops)
            hidden, ends = self._model.forward(batch.token_ids, batch.attention, self._cache), batch.output_ends
        sampling = [index for index, item in enumerate(scheduled) if item.samples]
        drawn = self._draw(scheduled, sampling, hidden, ends) if sampling else None
        asked = self._prompt_logprobs_of(scheduled, hidden, ends) if self._prompt_logprobs else {}
        return Launched(scheduled, sampling, drawn, asked)

    def _draw(
        self,
        scheduled: Sequence[ScheduledRow],
        sampling: Sequence[int],
        hidden: Array,
        ends: NDArray[np.int64],
    ) -> Drawn:
        picked = hidden if len(hidden) == len(sampling) else hidden[self._ops.array(ends[sampling] - 1, "int64")]
        items = [scheduled[index] for index in sampling]
        rows = [item.row for item in items]
        if self._sampler.takes_the_best(rows):
            return self._sampler.take(*self._model.greedy(picked), rows)
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
        """Waits for the device: these are many numbers, and few ask for them."""
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
            wanted = ops.logprobs(logits, ops.array(np.array(chosen, np.int32), "int32"), num_top)
            arrays = ops.fetch([wanted.chosen, wanted.rank, wanted.top_ids, wanted.top_logprobs])()
            found += [token_logprobs(arrays, place, token_id, num_top) for place, token_id in enumerate(chosen)]
        return tuple(found)
