"""What the core knows of a request.

`NewRequest` crosses into the core once, frozen and checked; `Request` is the core's own record of it.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class PenaltySpec(NamedTuple):
    """Penalties on tokens that have occurred; `sampling/features/penalties.py` has the formula."""

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


NO_PENALTIES = PenaltySpec()


class GrammarSpec(NamedTuple):
    """What an answer is held to."""

    source: str
    """A grammar, as `quire.structured` writes it."""
    max_tokens: int
    """Of the answer, its end of sequence included."""


class SamplingSpec(NamedTuple):
    """The numbers of one request's sampling, already checked against the model (no strings, no None-means-default).

    Masks and biases are sorted tuples of token ids. `temperature == 0` is greedy. `top_k == 0` is off.
    `seed` is always a number: the builder of the request has decided it.
    `num_logprobs` / `num_prompt_logprobs`: None when not requested; 0 requests the chosen token alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    penalties: PenaltySpec = NO_PENALTIES
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request, the model's own end-of-sequence tokens included unless they are ignored."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token must not follow the rest."""
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    """With `num_logprobs`: these tokens are reported, instead of the best."""
    grammar: GrammarSpec | None = None
    typical_p: float = 1.0

    @property
    def needs_output_tokens(self) -> bool:
        """Whether the host must know the last sampled token before the next one is sampled: penalties count it, a bad
        word of several tokens may end with the next, and a grammar goes by it."""
        if self.grammar is not None or self.penalties != NO_PENALTIES:
            return True
        return any(len(word) > 1 for word in self.bad_words)


class ResumeState(NamedTuple):
    """What an earlier core has already sent of a request: it is resumed there, and none of it is sent again."""

    output_token_ids: tuple[int, ...] = ()
    num_prompt_logprobs: int = 0
    """Prompt positions, from the second on, whose log-probabilities were sent."""
    num_cached_tokens: int = 0
    """What was reported with the first token."""


NOT_RESUMED = ResumeState()


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request as the core receives it: every number checked, nothing to look up.

    `request_id` is made by the engine, never by a client. `max_tokens` >= 1 and
    `len(prompt_token_ids) + max_tokens` fits `max_model_len`; `eos_token_ids` are those of
    `sampling.stop_token_ids` that are reported as an ordinary stop (`stop_reason` None).
    `cache_salt` separates prefix caches: requests share blocks only within one salt.
    `resume` is empty but for a request whose core died.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingSpec
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    arrival_s: float = 0.0
    resume: ResumeState = NOT_RESUMED
    caller: str = ""
    """The sender, a name without meaning: callers share the engine fairly."""
    caller_weight: int = 1
    """The caller's share against that of others."""
    needs_output_tokens: bool = False
    """The next step of this request needs its own last token on the host. While that token is in flight, the scheduler
    stalls this request alone. True at least where `sampling.needs_output_tokens` is."""
    is_background: bool = False
    """It comes after all others, and is not computed while one of them runs."""


class RequestStatus(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """The core's record of one request: `num_computed` chasing `num_known`.

    There are no phases. Prefill, decode, a prefix hit and the way back after preemption are all the
    case `num_computed < num_known`.
    """

    new: NewRequest
    token_ids: list[int]
    """Everything known: the prompt, then what was sampled."""
    arrival_index: int
    """Order of arrival: ties of priority are broken by it, also after preemption."""
    max_num_tokens: int
    """Length at which it ends: prompt and `max_tokens`, or `max_model_len` if that is less."""
    stop_token_ids: frozenset[int]
    """Those of `new.sampling`, for the look-up that each sampled token needs."""
    status: RequestStatus = RequestStatus.WAITING
    num_in_flight: int = 0
    """Tokens, next after `token_ids`, that steps in flight sample: they are counted before they are known."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache (or are being put there by a step in flight)."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache supplied when the request was first admitted."""
    row: int | None = None
    """The permanent row while running."""
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chain of the full blocks of `token_ids`, as far as it was needed; it outlives preemption."""
    num_prompt_logprobs_sent: int = 0
    """Prompt positions, from the second on, whose log-probabilities were handed out."""
    num_preemptions: int = 0

    @classmethod
    def of(cls, new: NewRequest, arrival_index: int, max_model_len: int) -> "Request":
        """The record of a request that has just come, be it new or resumed."""
        return cls(
            new=new,
            token_ids=[*new.prompt_token_ids, *new.resume.output_token_ids],
            arrival_index=arrival_index,
            max_num_tokens=min(len(new.prompt_token_ids) + new.max_tokens, max_model_len),
            stop_token_ids=frozenset(new.sampling.stop_token_ids),
            num_cached=new.resume.num_cached_tokens,
            num_prompt_logprobs_sent=new.resume.num_prompt_logprobs,
        )

    @property
    def num_known(self) -> int:
        """Tokens that are known to the executor: those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - len(self.new.prompt_token_ids)

    @property
    def num_prompt_logprobs_due(self) -> int:
        """Prompt positions whose log-probabilities were requested and not yet sent."""
        if self.new.sampling.num_prompt_logprobs is None:
            return 0
        return len(self.new.prompt_token_ids) - 1 - self.num_prompt_logprobs_sent

    def take_unsent(self, start: int, prompt_logprobs: tuple[T, ...]) -> tuple[T, ...]:
        """Those of positions `start + 1 ...` that were not sent before a preemption; they count as sent now."""
        unsent = prompt_logprobs[max(0, self.num_prompt_logprobs_sent - start) :]
        self.num_prompt_logprobs_sent += len(unsent)
        return unsent

    def ending(self) -> tuple[str | None, int | None]:
        """`(finish_reason, stop_reason)`, now that its last token may have ended it."""
        token_ids = self.token_ids
        if token_ids[-1] in self.stop_token_ids and self.num_output_tokens > self.new.sampling.min_tokens:
            return "stop", None if token_ids[-1] in self.new.eos_token_ids else token_ids[-1]
        return "length" if len(token_ids) >= self.max_num_tokens else None, None
