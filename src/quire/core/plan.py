"""The two values at which control and data meet: `StepPlan` goes down, `StepResult` comes up.

Plain integers in frozen tuples: they can be printed, stored, sent and replayed. Full data is sent for a
row that enters, differences for one that is known.
"""

from dataclasses import dataclass
from typing import NamedTuple

from quire.core.request import SamplingSpec


class NewRow(NamedTuple):
    """A request takes a row: for the first time, or again after preemption."""

    row: int
    request_id: str
    token_ids: tuple[int, ...]
    """All known tokens: the prompt and, after preemption, what had been sampled."""
    num_prompt_tokens: int
    sampling: SamplingSpec
    block_ids: tuple[int, ...]
    """The blocks it holds when it enters (prefix hits included)."""


class ScheduledRow(NamedTuple):
    """Work for one row in this step: tokens `[start, start + num_tokens)` of its known tokens."""

    row: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]
    """Blocks appended to its block table before this step (beyond those of a `NewRow`)."""
    samples: bool
    """True when the step reaches the last known token, so that a next one is sampled."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the engine. The runner handles `removed`, then `new`, then computes `scheduled`."""

    step_id: int
    removed: tuple[int, ...]
    """Rows that were freed since the last plan; a row may be removed and taken anew in one plan."""
    new: tuple[NewRow, ...]
    scheduled: tuple[ScheduledRow, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all rows."""
        return sum(item.num_tokens for item in self.scheduled)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: the chosen token first, then the most probable, best first, or the tokens that
    the request named.

    `ranks` are ranks in the vocabulary (1 is best).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


class RowResult(NamedTuple):
    """What one scheduled row gave."""

    row: int
    token_ids: tuple[int, ...]
    """Tokens sampled: empty when the row did not sample, one without speculation."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each sampled token, if the request has them reported."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """For prompt positions `start + 1 ...` whose logits this step computed, if requested."""
    error: str | None = None
    """This row alone failed (say, its logits were not finite); its tokens are void."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner gave for the plan of the same `step_id`, one entry for each scheduled row, in order."""

    step_id: int
    rows: tuple[RowResult, ...]


class TokenDelta(NamedTuple):
    """What is new of one request, from the core to the engine. The last one carries `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    """None while running; then one of stop, length, abort, error."""
    stop_reason: int | None = None
    """The stop token that ended it, unless it was the model's end of sequence."""
    error: str | None = None


class Stalled(NamedTuple):
    """A request that did not advance in a step, and why."""

    request_id: str
    reason: str
    """`no_blocks`, `no_row`, `budget`, `preempted`, `in_flight` (its last token is being sampled), `quarantined`
    (after a core died, it waits while others are probed), or the word of the admission rule that holds it; `behind` is
    never listed."""
    by: str | None = None
    """The request that took what this one lacked, where one is to blame: the preemptor, or the one that
    got most of the budget."""


class ScheduledRequest(NamedTuple):
    """A request that advanced in a step."""

    request_id: str
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, and for every request that did not advance, why. Metrics, the live view, replay and
    "why was this slow" all read this record; nothing else observes the scheduler.

    `stalled` names every running request that did not advance, every one that was preempted or is held by an
    admission rule, and the head of the waiting queue. All others that wait are `behind` the head by
    definition and are not listed."""

    step_id: int
    now_s: float
    scheduled: tuple[ScheduledRequest, ...]
    stalled: tuple[Stalled, ...]
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    num_blocks: int
    num_prefix_queries: int
    """Tokens looked up in the prefix cache by admissions of this step."""
    num_prefix_hits: int
    """Of those, tokens found."""
    given_blocks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Requests that were given blocks, with them: all of its block table where one enters, else what is appended."""
