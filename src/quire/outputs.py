"""What a caller gets back, with vLLM's fields."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """One token's natural log-probability under the model's own logits, or its logit (`EngineArgs.logprobs_mode`)."""

    logprob: float
    rank: int
    """1 is the most probable token of the vocabulary."""
    decoded_token: str


PositionLogprobs = dict[int, Logprob]
"""Token id -> `Logprob`: the chosen token first, then the best, best first (or those of `logprob_token_ids`)."""


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of a request. In a stream of kind DELTA it holds only what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum over the chosen tokens so far, when `logprobs` was asked for."""
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    """None while it runs; then stop, length, repetition, abort or error."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it, `repetition_detected`; None for the model's own end of sequence."""

    def finished(self) -> bool:
        """True when nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Clock readings of one request, in seconds since the epoch of `time.monotonic`."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0

    @property
    def queued_s(self) -> float | None:
        """Arrival to the first step; None while it waits."""
        return None if self.first_scheduled_s is None else self.first_scheduled_s - self.arrival_s

    @property
    def prefill_s(self) -> float | None:
        """First step to first token."""
        if self.first_token_s is None or self.first_scheduled_s is None:
            return None
        return self.first_token_s - self.first_scheduled_s

    @property
    def decode_s(self) -> float | None:
        """First token to the last one so far."""
        if self.first_token_s is None or self.last_token_s is None:
            return None
        return self.last_token_s - self.first_token_s

    @property
    def time_to_first_token_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def total_s(self) -> float | None:
        """Arrival to the end."""
        return None if self.finished_s is None else self.finished_s - self.arrival_s


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt, whole or as far as it has come."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """One for each prompt token, the first None."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache supplied."""
    metrics: RequestMetrics | None = None
    error: str | None = None
    """Why it failed, when a sequence ended with `error`."""


Labels = tuple[tuple[str, str], ...]


class Metric(NamedTuple):
    """One reading of `get_metrics()`. `kind` is counter, gauge or histogram."""

    name: str
    kind: str
    value: float
    """A histogram's count."""
    total: float = 0.0
    """A histogram's sum of observations."""
    buckets: tuple[tuple[float, int], ...] = ()
    """A histogram's (upper bound, cumulative count), without the infinite one."""
    help: str = ""
    labels: Labels = ()


@dataclass(slots=True)
class Decision:
    """Something that was decided without being asked, and why."""

    name: str
    value: str
    reason: str
    rejected: list[str] = field(default_factory=list)
    """Each alternative with the reason against it."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the time of one request went. `parts` add up to `total_s`."""

    id: str
    caller: str
    """A digest of the API key; empty on a server without keys. Callers may give their requests the same id."""
    finished: bool
    finish_reason: str | None
    sentence: str
    largest: str
    total_s: float
    parts: dict[str, float]
    """Phase -> seconds; all phases, in the order in which a request meets them."""
    queued_because: dict[str, float]
    """Seconds for which the head of the queue lacked a row, blocks or budget while this one queued, and for which an
    admission rule held this one, by the rule's word."""
    waited_for: dict[str, float]
    """Other requests -> seconds for which this one waited because of them."""
    time_to_first_token_s: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_restarts: int
    """Times that the engine's core was replaced meanwhile."""
