"""A recording played again: the same scheduler, asked the same, without a model.

What a step gave is known from the recording; what the scheduler decides is compared with what it decided then, plan by
plan. A tool for faults ("what did it do that night?") and for changes of the scheduler ("does it still do the same?").
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from quire.core.limits import SchedulerConfig
from quire.core.plan import RowResult, StepPlan, StepResult, TokenLogprobs
from quire.core.policy import make_policy
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.request import NewRequest, Request, ResumeState, SamplingSpec
from quire.core.scheduler import Scheduler
from quire.errors import ConfigurationError, ShapeError
from quire.observe.recording import GRAIN_BYTES, RAISED, SCHEMA, events_of

LINE_BYTES = 2**26
"""Of the longest line."""
MOST_TOKENS = 2**26
"""Of one sequence, and blocks of a cache: a file may not make a replay hold more than it says itself."""
STOP = 2**32 - 1
"""The token that ends an answer."""
T = TypeVar("T", SchedulerConfig, "Asked")
_NOTHING_KNOWN = TokenLogprobs((), (), ())
_FIELDS = {"start": 2, "add": 4, "abort": 2, "plan": 7, "result": 5, "end": 5, "clear": 1, "give_back": 2}


@dataclass(slots=True)
class Asked:
    """One request of a recording."""

    number: int
    prompt: int
    """Tokens; so are `given` (by a core that died, of the answer) and `max_tokens`."""
    max_tokens: int
    arrival_s: float
    given: int = 0
    priority: int = 0
    caller: str = ""
    weight: int = 1
    waits: bool = False
    prompt_logprobs: bool = False
    logprobs_sent: int = 0
    cached: int = 0
    grains: list[str] = field(default_factory=list)
    reason: str | None = None
    """Why it ended; None: it had not, when the recording did."""
    num_output: int = 0
    background: bool = False

    def tokens(self, first: int, last: int, block_size: int) -> list[int]:
        """Token ids `[first, last)`: equal where the recorded ones were, as far as full blocks go."""
        found = []
        for position in range(first, last):
            block, place = divmod(position, block_size)
            if block >= len(self.grains):  # behind the last full block nothing is shared
                found.append(self.number % STOP)
            else:
                found.append(int(self.grains[block], 16) >> 32 * place & 0x7FFFFFFF if place < 2 else 0)
        return found

    def new_request(self, block_size: int) -> NewRequest:
        """As the scheduler is asked.

        Args:
            block_size: of the recording.
        """
        ids = self.tokens(0, self.prompt + self.given, block_size)
        resume = ResumeState(tuple(ids[self.prompt :]), self.logprobs_sent, self.cached)
        return NewRequest(
            request_id=str(self.number),
            prompt_token_ids=tuple(ids[: self.prompt]),
            max_tokens=self.max_tokens,
            sampling=SamplingSpec(stop_token_ids=(STOP,), num_prompt_logprobs=0 if self.prompt_logprobs else None),
            eos_token_ids=(STOP,),
            priority=self.priority,
            arrival_s=self.arrival_s,
            resume=resume,
            caller=self.caller,
            caller_weight=self.weight,
            needs_output_tokens=self.waits,
            is_background=self.background,
        )


@dataclass(slots=True)
class Session:
    """One life of a core: from its start to its end, or to the end of the recording."""

    config: SchedulerConfig
    policy: str
    prefix_caching: bool
    num_rules: int
    start_s: float
    events: list[list[Any]] = field(default_factory=list)
    requests: dict[int, Asked] = field(default_factory=dict)

    def scheduler(self, rules: Sequence[Any] = (), **changes: Any) -> Scheduler:
        """One like the recorded, without requests; `changes` are those of its configuration."""
        cache = PrefixCache(bytes(32)) if changes.pop("prefix_caching", self.prefix_caching) else NullPrefixCache()
        policy = make_policy(changes.pop("policy", self.policy))
        return Scheduler(replace(self.config, **changes), policy, cache, rules)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first plan that is not the recorded one."""

    session: int
    step_id: int
    recorded: Any
    replayed: Any


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found."""

    num_sessions: int
    num_requests: int
    num_plans: int
    num_equal: int
    first_difference: Difference | None


class RecordedAnswers:
    """The rules of a recording: they answer as they did."""

    def __init__(self) -> None:
        self.answers: Iterator[str | None] = iter(())

    def ready(self, request: Request) -> str | None:
        """See `AdmissionRule.ready`."""
        answer = next(self.answers, None)
        if answer == RAISED:
            raise ShapeError("could not be compiled when this was recorded")
        return answer


def read(path: str) -> list[Session]:
    """The sessions of a recording. A last line that was cut off is left out.

    Raises:
        ConfigurationError: it is none, or of a newer schema; the line is named.
    """
    sessions: list[Session] = []
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    _take(sessions, json.loads(line))
                except (LookupError, RecursionError, TypeError, ValueError) as error:
                    text = f"{path}, line {number}: {str(error)[:200] or type(error).__name__}"
                    raise ConfigurationError(f"no recording: {text}", field="recording") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})", field="recording") from error
    if not sessions:
        raise ConfigurationError(f"no recording: {path} has no line", field="recording")
    return sessions


def _take(sessions: list[Session], event: Any) -> None:
    kind = event[0]
    if len(event) != _FIELDS.get(kind):
        raise ValueError(f"an event {str(kind)[:20]!r} of {len(event)} parts")
    if kind == "start":
        start = event[1]
        if start["schema"] != SCHEMA:
            raise ValueError(f"schema is {start['schema']!r}; this version reads {SCHEMA}")
        config = _whole(SchedulerConfig(**start["config"]))
        if max(config.max_model_len, config.num_blocks, config.max_num_seqs) > MOST_TOKENS:
            raise ValueError(f"the limits of its scheduler are above {MOST_TOKENS:,}")
        make_policy(start["policy"])
        sessions.append(Session(config, start["policy"], start["prefix_caching"], start["num_rules"], start["time_s"]))
        return
    if not sessions:
        raise ValueError("it does not begin with a start")
    session = sessions[-1]
    if kind == "add":
        _, number, asked, grains = event
        if any(len(grain) != 2 * GRAIN_BYTES for grain in grains) or number in session.requests:
            raise ValueError("a grain or a number is not one")
        request = _whole(Asked(number, grains=grains, **asked))
        if request.prompt < 1 or request.given < 0 or request.prompt + request.given > session.config.max_model_len:
            raise ValueError(f"a request of {request.prompt:,} and {request.given:,} tokens")
        session.requests[number] = request
    elif kind == "end":
        _, number, reason, num_output, grains = event
        request = session.requests[number]
        request.reason, request.num_output, request.grains = reason, num_output, grains
    session.events.append(event)


def _whole(made: T) -> T:
    for item in fields(made):
        if item.type is int and type(getattr(made, item.name)) is not int:
            raise ValueError(f"{item.name} is no whole number")
    return made


def replay(path: str) -> Replayed:
    """Play a recording.

    Raises:
        ConfigurationError: it is none.
    """
    sessions = read(path)
    num_plans = num_equal = 0
    first: Difference | None = None
    for index, session in enumerate(sessions):
        for step_id, recorded, replayed in _plans(session):
            num_plans += 1
            if recorded == replayed:
                num_equal += 1
            elif first is None:
                first = Difference(index, step_id, recorded, replayed)
            if recorded != replayed:
                break  # what follows answers another plan
    return Replayed(len(sessions), sum(len(one.requests) for one in sessions), num_plans, num_equal, first)


def _plans(session: Session) -> Iterator[tuple[int, Any, Any]]:
    """Each plan as it was and as it is, both as a recording has them."""
    rules = RecordedAnswers()
    scheduler = session.scheduler([rules] * (1 if session.num_rules else 0))
    player = Player(session)
    plans: dict[int, StepPlan] = {}
    for event in session.events:
        kind = event[0]
        if kind == "add":
            scheduler.add(session.requests[event[1]].new_request(session.config.block_size))
        elif kind == "abort":
            scheduler.abort(str(event[1]))
        elif kind == "plan":
            rules.answers = iter(event[6])
            plan = plans[event[1]] = scheduler.schedule(event[2])
            yield event[1], event[3:6], _as_recorded(plan)
        elif kind == "result":
            plan = plans.pop(event[1])
            scheduler.update(plan, player.result(plan, dict(event[3]), set(event[4])))
        elif kind == "clear":
            plans.clear()
            player.clear()
            scheduler.clear()
        elif kind == "give_back":
            scheduler.give_back(keeps_cached=event[1])


def _as_recorded(plan: StepPlan) -> list[Any]:
    """As JSON would give it back."""
    events = events_of(plan, {new.request_id: int(new.request_id) for new in plan.new})
    return list(json.loads(json.dumps(events)))


class Player:
    """An executor that knows from a recording how long each answer becomes."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._rows: dict[int, Asked] = {}
        self._known: dict[int, int] = {}
        """Row -> tokens that it has, prompt and answer together."""

    def result(self, plan: StepPlan, several: dict[int, int], failed: set[int]) -> StepResult:
        """What a plan gives. Plans come in their order.

        Args:
            several: row -> tokens, where not one was sampled.
            failed: rows that failed.
        """
        for row in plan.removed:
            self._rows.pop(row, None)
        for new in plan.new:
            self._rows[new.row] = self._session.requests[int(new.request_id)]
            self._known[new.row] = len(new.token_ids)
        rows = [self._row(item, several.get(item.row, 1), item.row in failed) for item in plan.scheduled]
        return StepResult(plan.step_id, tuple(rows))

    def _row(self, item: Any, count: int, has_failed: bool) -> RowResult:
        request = self._rows[item.row]
        if has_failed:
            return RowResult(item.row, (), error="failed when this was recorded")
        end = item.start + item.num_tokens
        told = max(0, min(end + 1, request.prompt) - item.start - 1) if request.prompt_logprobs else 0
        logprobs = (_NOTHING_KNOWN,) * told
        if not item.samples:
            return RowResult(item.row, (), prompt_logprobs=logprobs)
        first = self._known[item.row]
        self._known[item.row] = first + count
        ids = request.tokens(first, first + count, self._session.config.block_size)
        last = request.prompt + request.num_output - first - 1
        if request.reason == "stop" and 0 <= last < len(ids):
            ids[last] = STOP
        return RowResult(item.row, tuple(ids), prompt_logprobs=logprobs)
