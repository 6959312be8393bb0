"""Runs a plan: rows in and out, gather, model, logits, sample."""

import numpy as np

from quire.core.plan import RowResult, ScheduledRow, StepPlan, StepResult, TokenLogprobs
from quire.models.model import Model
from quire.ops.types import Array, Ops
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
        """Compute one step."""
        for row in plan.removed:
            self._rows.remove(row)
            self._sampler.remove(row)
            self._prompt_logprobs.pop(row, None)
        for new in plan.new:
            self._rows.enter(new)
            self._sampler.add(new)
            if new.sampling.num_prompt_logprobs is not None:
                self._prompt_logprobs[new.row] = new.sampling.num_prompt_logprobs, new.num_prompt_tokens
        if not plan.scheduled:
            return StepResult(plan.step_id, ())
        batch = self._rows.gather(plan.scheduled, self._ops)
        hidden = self._model.forward(batch.token_ids, batch.attention, self._cache)
        results = self._sample(plan, hidden, batch.last_tokens)
        if self._prompt_logprobs:
            results = self._add_prompt_logprobs(plan, hidden, results)
        return StepResult(plan.step_id, tuple(results))

    def _sample(self, plan: StepPlan, hidden: Array, last_tokens: np.ndarray) -> list[RowResult]:
        sampling = [index for index, item in enumerate(plan.scheduled) if item.samples]
        results = [RowResult(item.row, ()) for item in plan.scheduled]
        if not sampling:
            return results
        picked = hidden if len(hidden) == len(sampling) else hidden[self._ops.array(last_tokens[sampling], "int64")]
        logits = self._model.logits(picked)
        items = [plan.scheduled[index] for index in sampling]
        drawn = self._sampler.sample(
            logits, [item.row for item in items], [item.start + item.num_tokens for item in items]
        )
        for index, result in zip(sampling, drawn, strict=True):
            results[index] = result
            for token_id in result.token_ids:
                self._rows.append(result.row, token_id)
        return results

    def _add_prompt_logprobs(self, plan: StepPlan, hidden: Array, results: list[RowResult]) -> list[RowResult]:
        first = 0
        for index, item in enumerate(plan.scheduled):
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
