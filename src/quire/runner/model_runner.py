"""Runs a plan: rows in and out, gather, model, logits, sample."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow, RowResult, ScheduledRow, StepPlan, StepResult, TokenLogprobs
from quire.models.model import Model
from quire.ops.types import Array, Ops
from quire.runner.faults import RowFaults, compute_apart_if_it_fails
from quire.runner.rows import Rows
from quire.sampling.logprobs import token_logprobs
from quire.sampling.sampler import NOT_FINITE, Sampler

PROMPT_LOGPROB_ROWS = 64
"""Rows of logits held at once while the log-probabilities of a prompt are read."""


class ModelRunner:
    """One model on one device, its cache and its rows.

    Args:
        num_blocks, block_size: of the paged cache.
        max_rows: permanent rows, the scheduler's `max_num_seqs`.
        max_model_len: longest sequence in tokens.
    """

    def __init__(
        self, model: Model, ops: Ops, *, num_blocks: int, block_size: int, max_rows: int, max_model_len: int
    ) -> None:
        self._model = model
        self._ops = ops
        self._cache = ops.make_cache(model.cache_shape(num_blocks, block_size))
        self._rows = Rows(max_rows, max_model_len, block_size)
        self._sampler = Sampler(ops, max_rows)
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}
        """Row -> (number asked for, prompt length), for rows that asked."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. A fault in the work of one row fails that row (see `quire.runner.faults`)."""
        faults = RowFaults()
        for row in plan.removed:
            self._remove(row)
        for new in plan.new:
            faults.contain(new.row, self._enter, new)
        for item in plan.scheduled:
            if item.new_block_ids:
                faults.contain(item.row, self._rows.extend, item.row, item.new_block_ids)
        results = compute_apart_if_it_fails(self._compute, faults.without_failed(plan.scheduled))
        self._keep([result for result in results if result.token_ids], faults)
        if faults:
            done = {result.row: result for result in results}
            results = [faults.result(item.row) or done[item.row] for item in plan.scheduled]
        return StepResult(plan.step_id, tuple(results))

    def _remove(self, row: int) -> None:
        self._rows.remove(row)
        self._sampler.remove(row)
        self._prompt_logprobs.pop(row, None)

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

    def _compute(self, scheduled: Sequence[ScheduledRow]) -> list[RowResult]:
        """Results of rows. Only the cache changes, and computing a row again writes the same into it."""
        batch = self._rows.gather(scheduled, self._ops)
        hidden = self._model.forward(batch.token_ids, batch.attention, self._cache)
        results = self._sample(scheduled, hidden, batch.last_tokens)
        return self._add_prompt_logprobs(scheduled, hidden, results) if self._prompt_logprobs else results

    def _sample(
        self, scheduled: Sequence[ScheduledRow], hidden: Array, last_tokens: NDArray[np.int64]
    ) -> list[RowResult]:
        sampling = [index for index, item in enumerate(scheduled) if item.samples]
        if not sampling:
            return [RowResult(item.row, ()) for item in scheduled]
        picked = hidden if len(hidden) == len(sampling) else hidden[self._ops.array(last_tokens[sampling], "int64")]
        items = [scheduled[index] for index in sampling]
        rows = [item.row for item in items]
        if self._sampler.takes_the_best(rows):
            drawn = self._sampler.take(*self._model.greedy(picked), rows)
        else:
            positions = [item.start + item.num_tokens for item in items]
            drawn = self._sampler.sample(self._model.logits(picked), rows, positions)
        if len(drawn) == len(scheduled):
            return drawn
        results = [RowResult(item.row, ()) for item in scheduled]
        for index, result in zip(sampling, drawn, strict=True):
            results[index] = result
        return results

    def _add_prompt_logprobs(
        self, scheduled: Sequence[ScheduledRow], hidden: Array, results: list[RowResult]
    ) -> list[RowResult]:
        first = 0
        for index, item in enumerate(scheduled):
            if item.row in self._prompt_logprobs:
                rows = hidden[first : first + item.num_tokens]
                results[index] = self._with_prompt_logprobs(item, rows, results[index])
            first += item.num_tokens
        return results

    def _with_prompt_logprobs(self, item: ScheduledRow, hidden: Array, result: RowResult) -> RowResult:
        num_top, num_prompt = self._prompt_logprobs[item.row]
        stop = min(item.start + item.num_tokens, num_prompt - 1)
        found: list[TokenLogprobs] = []
        for start in range(item.start, stop, PROMPT_LOGPROB_ROWS):
            end = min(start + PROMPT_LOGPROB_ROWS, stop)
            logits = self._model.logits(hidden[start - item.start : end - item.start])
            if not self._ops.to_numpy(self._ops.rows_finite(logits)).all():
                return RowResult(item.row, (), error=NOT_FINITE)
            chosen = self._rows.token_ids(item.row, start + 1, end + 1)
            found += token_logprobs(self._ops, logits, chosen, [num_top] * len(chosen))
        return result._replace(prompt_logprobs=tuple(found))
