"""The same requests under other settings: the real scheduler over a model of time instead of a model.

Requests come when they came and become as long as they became; how long a step takes is `StepCost`'s to say. What the
scheduler makes of that is no estimate: it is the one that serves.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quire.core.plan import ScheduledRow
from quire.core.scheduler import Scheduler
from quire.engine.percentiles import percentile
from quire.errors import InvalidRequestError
from quire.observe.replay import Asked, Player, Session
from quire.observe.step_cost import StepCost


@dataclass(slots=True)
class Times:
    """Of one request, in seconds."""

    arrival_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_output: int = 0

    def took(self, num_tokens: int, now_s: float) -> None:
        """It was given tokens."""
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s
        self.num_output += num_tokens


@dataclass(slots=True)
class MemoryUse:
    """Of the cache over time, in token-seconds: what is held, and for what."""

    held: float = 0.0
    used: float = 0.0
    """Holds keys and values of a token."""
    reserved: float = 0.0
    """Will hold them, if the answer becomes as long as it does."""

    def add(self, held: float, used: float, reserved: float, seconds: float) -> None:
        """So much for so long."""
        self.held += held * seconds
        self.used += used * seconds
        self.reserved += reserved * seconds

    @property
    def parts(self) -> dict[str, float]:
        """Shares of what is held: `used`, `reserved` for tokens to come, `wasted`."""
        if not self.held:
            return {"used": 0.0, "reserved": 0.0, "wasted": 0.0}
        used, reserved = self.used / self.held, self.reserved / self.held
        return {"used": used, "reserved": reserved, "wasted": max(0.0, 1.0 - used - reserved)}


@dataclass(slots=True)
class Outcome:
    """What became of the requests."""

    times: dict[int, Times] = field(default_factory=dict)
    num_refused: int = 0
    """Longer than the settings allow."""
    num_preemptions: int = 0
    num_steps: int = 0
    row_seconds: float = 0.0
    duration_s: float = 0.0
    memory: MemoryUse | None = None
    num_prompt_tokens: int = 0

    def numbers(self, ttft_s: float | None = None, tpot_s: float | None = None) -> dict[str, float]:
        """The figures. With bounds, also `goodput`: answered requests a second that keep them."""
        done = [one for one in self.times.values() if one.first_s is not None and one.last_s is not None]
        ttft = [(one.first_s or 0.0) - one.arrival_s for one in done]
        tpot = [_tpot(one) for one in done if one.num_output > 1]
        seconds = max(self.duration_s, 1e-9)
        found = {
            "requests": len(done),
            "refused": self.num_refused,
            "preemptions": self.num_preemptions,
            "duration_s": self.duration_s,
            "output_tokens_per_s": sum(one.num_output for one in done) / seconds,
            "mean_running": self.row_seconds / seconds,
            **{f"ttft_p{p}_s": percentile(ttft, p) for p in (50, 99)},
            **{f"tpot_p{p}_s": percentile(tpot, p) for p in (50, 99)},
        }
        if ttft_s is not None or tpot_s is not None:
            kept = [
                one
                for one in done
                if (one.first_s or 0.0) - one.arrival_s <= (ttft_s or math.inf) and _tpot(one) <= (tpot_s or math.inf)
            ]
            found["goodput_requests_per_s"] = len(kept) / seconds
        return found


def _tpot(one: Times) -> float:
    return ((one.last_s or 0.0) - (one.first_s or 0.0)) / max(one.num_output - 1, 1)


def recorded(sessions: Iterable[Session]) -> Outcome:
    """What became of the requests when they were recorded."""
    outcome = Outcome()
    for session in sessions:
        begin = session.start_s
        offset = outcome.duration_s
        _add_recorded(outcome, session, len(outcome.times), begin - offset)
    return outcome


def _add_recorded(outcome: Outcome, session: Session, base: int, zero_s: float) -> None:
    rows: dict[int, int] = {}
    plans: dict[int, tuple[float, list[tuple[int, bool, int]]]] = {}
    first_s, last_s = math.inf, 0.0
    for number, request in session.requests.items():
        outcome.times[base + number] = Times(request.arrival_s - zero_s)
        outcome.num_prompt_tokens += request.prompt
        first_s = min(first_s, request.arrival_s)
    entered: set[int] = set()
    for event in session.events:
        if event[0] == "plan":
            for row in event[3]:
                rows.pop(row, None)
            for row, number, _, _ in event[4]:
                outcome.num_preemptions += number in entered
                entered.add(number)
                rows[row] = number
            plans[event[1]] = event[2], [(rows[item[0]], item[4], item[0]) for item in event[5]]
            outcome.num_steps += 1
        elif event[0] == "result" and event[1] in plans:
            several = dict(event[3])
            begun_s, items = plans.pop(event[1])
            outcome.row_seconds += len(items) * (event[2] - begun_s)
            for number, samples, row in items:
                if samples and row not in event[4]:
                    times, request = outcome.times[base + number], session.requests[number]
                    count = several.get(row, 1)
                    if request.reason is not None:
                        count = min(count, request.num_output - request.given - times.num_output)
                    if count > 0:
                        times.took(count, event[2] - zero_s)
                        last_s = max(last_s, event[2])
        elif event[0] == "clear":
            rows.clear()
            plans.clear()
    if last_s:
        outcome.duration_s += last_s - first_s


def arrivals(sessions: Sequence[Session]) -> list[Asked]:
    """The requests of a recording in their order; those that had no end become as long as they might."""
    found: list[Asked] = []
    for session in sessions:
        for request in session.requests.values():
            num_output = request.num_output if request.reason in ("stop", "length") else max(request.num_output, 1)
            found.append(replace(request, number=len(found), num_output=num_output, reason="stop", given=0))
    return sorted(found, key=lambda request: (request.arrival_s, request.number))


def simulate(session: Session, requests: Sequence[Asked], cost: StepCost, **changes: Any) -> Outcome:
    """Let requests run through the scheduler of a session.

    Args:
        session: whose settings hold but for `changes`: fields of `SchedulerConfig`, `policy`, `prefix_caching`.
        requests: in the order of their arrival.

    Raises:
        ConfigurationError: settings that do not go together; the field is named.
    """
    scheduler = session.scheduler(**changes)
    asked = {request.number: request for request in requests}
    player = Player(replace(session, requests=asked, events=[]))
    outcome, coming = Outcome(memory=MemoryUse()), deque(requests)
    now_s = start_s = requests[0].arrival_s if requests else 0.0
    while coming or scheduler.has_work:
        if not scheduler.has_work and coming:
            now_s = max(now_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now_s:
            request = coming.popleft()
            outcome.num_prompt_tokens += request.prompt
            try:
                scheduler.add(request.new_request(session.config.block_size))
                outcome.times[request.number] = Times(request.arrival_s)
            except InvalidRequestError:
                outcome.num_refused += 1
        if not scheduler.has_work:
            continue
        now_s = _step(scheduler, player, cost, outcome, now_s)
    outcome.duration_s = now_s - start_s
    return outcome


def _step(scheduler: Scheduler, player: Player, cost: StepCost, outcome: Outcome, now_s: float) -> float:
    """One step; the time after it."""
    plan = scheduler.schedule(now_s)
    seconds = cost.seconds(plan.scheduled)
    _account(scheduler, plan.scheduled, outcome, seconds)
    outcome.num_steps += 1
    outcome.num_preemptions += sum(item.reason == "preempted" for item in scheduler.last_record.stalled)
    for delta in scheduler.update(plan, player.result(plan, {}, set())):
        if delta.token_ids:
            outcome.times[int(delta.request_id)].took(len(delta.token_ids), now_s + seconds)
    return now_s + seconds


def _account(scheduler: Scheduler, scheduled: Sequence[ScheduledRow], outcome: Outcome, seconds: float) -> None:
    """What the step holds of the cache: a block that is shared counts once."""
    outcome.row_seconds += scheduler.num_running * seconds
    record = scheduler.last_record
    held = (record.num_blocks - record.num_free_blocks) * scheduler.config.block_size
    # Only a request's last block has room left, and what is lacking of a prompt will be computed in the next steps.
    ends = [start + num for _, start, num, _, _ in scheduled]
    size = scheduler.config.block_size
    empty = sum(-end % size for end in ends)
    assert outcome.memory is not None
    outcome.memory.add(held, max(0, held - empty), 0.0, seconds)
