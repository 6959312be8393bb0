"""Where the time of each request went, from step records and from nothing else of the core.

::

    received   arrival        first step        first token           last token   made      last byte
       |preparing|   queued       |   prefilling     |   decoding ...      | text    | sending  |
                                       preempted, waiting for blocks or for another request's prefill in between

The time of a sequence is cut at the records in which its state changes, and every piece belongs to one phase: so the
phases add up to the whole by construction. A sequence that goes on decoding is not touched; what the prefill of
other requests in the batch cost it is the difference of a clock that all share. So a step costs work only for
requests that changed.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum

from quire.core.plan import StepRecord
from quire.core.request import NewRequest

MAX_REMEMBERED = 2048
"""Requests that ended and can still be explained; each takes about a kilobyte."""
FIRST = "/0"
"""What is added to the name of a response to name the first of its requests, where it numbers them."""
STEP_MEMORY = 0.1
"""Weight of the newest step in the running mean of steps that only decode."""


class Phase(IntEnum):
    """What a piece of a request's time was spent on."""

    PREPARING = 0
    """Reading the body, the chat template, tokenising."""
    QUEUED = 1
    PREFILLING = 2
    DECODING = 3
    PREEMPTED = 4
    WAITING_FOR_PREFILL = 5
    """Steps that took longer, or passed it by, since another request's prompt was computed in them."""
    WAITING_FOR_BLOCKS = 6
    RECOVERING = 7
    """The core was being restarted."""
    DETOKENISING = 8
    SENDING = 9
    """Until the last byte was taken by the socket."""


QUEUE_REASONS = ("no_row", "no_blocks", "budget")
_STALLED = {"budget": Phase.WAITING_FOR_PREFILL, "no_blocks": Phase.WAITING_FOR_BLOCKS, "preempted": Phase.PREEMPTED,
            "quarantined": Phase.RECOVERING}  # fmt: skip
_KNOWN = {*QUEUE_REASONS, *_STALLED, "in_flight"}
"""All other reasons are words of admission rules."""


@dataclass(slots=True)
class Timeline:
    """One sequence. `seconds[phase]` is complete up to `since_s`; from there on the time belongs to `phase`."""

    request_id: str
    """The request's public name; this is its sequence number `sequence`."""
    sequence: int
    num_prompt_tokens: int
    arrival_s: float
    phase: Phase
    since_s: float
    core_id: str = ""
    caller: str = ""
    share: float = 1.0
    """While prefilling: this sequence's part of the prompt tokens of the step."""
    prefill_clock_s: float = 0.0
    """The shared clock of others' prefill at `since_s`."""
    queue_clocks_s: tuple[float, ...] = ()
    """The clocks of reasons for which the head of the queue waited, at arrival; at admission, their advance."""
    held_s: dict[str, float] = field(default_factory=dict)
    """Seconds in the queue for which an admission rule held it, by the rule's word."""
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(Phase))
    waited_for: dict[str, float] = field(default_factory=dict)
    """Sequence in the core -> seconds for which this one waited because of it. Bounded by `MAX_WAITED_FOR`."""
    waits_for: str | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    finish_reason: str | None = None
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_restarts: int = 0
    """Cores that were replaced while it was here."""

    MAX_WAITED_FOR = 8

    def close(self, now_s: float, prefill_clock_s: float) -> None:
        """Give the time since the last cut to its phase."""
        spent_s = max(0.0, now_s - self.since_s)
        waited_s = 0.0
        if self.phase is Phase.DECODING:
            waited_s = min(spent_s, prefill_clock_s - self.prefill_clock_s)
        elif self.phase is Phase.PREFILLING:
            waited_s = spent_s * (1.0 - self.share)
        self.seconds[Phase.WAITING_FOR_PREFILL] += waited_s
        self.seconds[self.phase] += spent_s - waited_s
        if self.waits_for is not None and (
            self.waits_for in self.waited_for or len(self.waited_for) < self.MAX_WAITED_FOR
        ):
            self.waited_for[self.waits_for] = self.waited_for.get(self.waits_for, 0.0) + spent_s
        self.since_s, self.prefill_clock_s = max(now_s, self.since_s), prefill_clock_s


@dataclass(slots=True)
class RequestTimes:
    """One request: its sequences, and when the server received it and was done with it."""

    request_id: str
    caller: str = ""
    """Two callers may give their requests the same name."""
    sequences: list[Timeline] = field(default_factory=list)
    received_s: float | None = None
    made_s: float | None = None
    """The last text was made."""
    sent_s: float | None = None
    """The last byte was taken, or the caller had gone."""

    @property
    def has_ended(self) -> bool:
        """Whether every sequence has had its last token."""
        return all(item.ended_s is not None for item in self.sequences)


class RequestTimelines:
    """The timelines of all requests that live, and of the last `MAX_REMEMBERED` that ended.

    One thread calls `add`, `observe`, `first_token` and `end`; any may call `find` and `sent`.
    """

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._lock = threading.Lock()
        self._live: dict[str, Timeline] = {}
        self._decoding: set[str] = set()
        self._requests: dict[tuple[str, str], RequestTimes] = {}
        """By caller and public name; those that live are never forgotten."""
        self._ended: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Of these, the ones that ended, in the order in which they did."""
        self._names: dict[str, str] = {}
        """The core's id -> the public name, for `waited_for`; of the remembered."""
        self._last: StepRecord | None = None
        self._prefill_clock_s = 0.0
        self._queue_clocks_s = (0.0,) * len(QUEUE_REASONS)
        self._decode_step_s: float | None = None

    def add(self, new: NewRequest, request_id: str, sequence: int, now_s: float) -> None:
        """A sequence of a request of this public name is in the queue from `now_s` on."""
        timeline = Timeline(
            request_id, sequence, len(new.prompt_token_ids), new.arrival_s, Phase.QUEUED, now_s,
            new.request_id, new.caller, queue_clocks_s=self._queue_clocks_at(now_s),
        )  # fmt: skip
        timeline.seconds[Phase.PREPARING] = max(0.0, now_s - new.arrival_s)
        with self._lock:
            self._live[new.request_id] = timeline
            key = (new.caller, request_id)
            times = self._requests.get(key)
            if times is not None and sequence == 0 and times.has_ended:
                self._forget(key)
                times = None
            if times is None:
                times = self._requests[key] = RequestTimes(request_id, new.caller)
                if request_id.endswith(FIRST):
                    self._forget_rest(key)
            times.sequences.append(timeline)
            self._names[new.request_id] = request_id

    def observe(self, record: StepRecord) -> None:
        """A step begins at `record.now_s`; the one before has ended."""
        with self._lock:
            now_s, last = record.now_s, self._last
            if last is not None:
                if record.step_id != last.step_id + 1:
                    self._recover(last.now_s, now_s)
                else:
                    self._advance_clocks(last, now_s - last.now_s)
            self._last = record
            changed = [item for item in record.scheduled if item.request_id not in self._decoding]
            num_prefill = sum(item.num_tokens for item in changed)
            for request_id, start, num_tokens in changed:
                timeline = self._live.get(request_id)
                if timeline is not None:
                    self._schedule(request_id, timeline, start, num_tokens / num_prefill, now_s)
            for stalled in record.stalled:
                timeline = self._live.get(stalled.request_id)
                if timeline is not None and timeline.phase is not Phase.QUEUED and stalled.reason in _STALLED:
                    self._stall(stalled.request_id, timeline, stalled.reason, stalled.by, now_s)

    def core_replaced(self) -> None:
        """The core was replaced: the new one resumes all live requests."""
        for timeline in self._live.values():
            timeline.num_restarts += 1

    def first_token(self, core_id: str, now_s: float) -> None:
        """A sequence's first token came."""
        timeline = self._live.get(core_id)
        if timeline is not None:
            timeline.first_token_s = now_s

    def end(self, core_id: str, finish_reason: str, num_output_tokens: int, now_s: float) -> None:
        """A sequence has had its last token. A call that was interrupted may be repeated."""
        with self._lock:
            timeline = self._live.get(core_id)
            self._decoding.discard(core_id)
            if timeline is None:
                return
            if timeline.phase is Phase.QUEUED:
                self._leave_queue(timeline, now_s)
            clock_s = self._prefill_clock_s
            if self._last is not None and timeline.phase is Phase.DECODING:
                clock_s += self._prefill_cost(self._last, max(0.0, now_s - self._last.now_s))
            timeline.close(now_s, clock_s)
            timeline.ended_s, timeline.finish_reason = now_s, finish_reason
            timeline.num_output_tokens = num_output_tokens
            key = timeline.caller, timeline.request_id
            if key in self._requests and self._requests[key].has_ended:
                self._ended[key] = None
                self._forget_oldest()
            del self._live[core_id]

    def made(self, request_id: str, caller: str, now_s: float) -> None:
        """The last text of a request was made."""
        times = self._requests.get((caller, request_id))
        if times is not None:
            times.made_s = now_s

    def sent(self, response_id: str, caller: str, received_s: float, sent_s: float) -> list[RequestTimes]:
        """The server is done with a response, which answers the request of that name or those numbered below it."""
        with self._lock:
            found = self._named(caller, response_id)
            for times in found:
                times.received_s, times.sent_s = received_s, sent_s
            return found

    def find(self, request_id: str) -> list[RequestTimes]:
        """The request of a name, or the numbered ones of a response, of every caller that gave that name; empty when
        it is not remembered."""
        with self._lock:
            for core_id, timeline in self._live.items():
                if timeline.request_id.startswith(request_id):
                    self._cut(core_id, timeline)
            names = (request_id, request_id + FIRST)
            callers = [caller for caller, name in self._requests if name in names]
            return [times for caller in callers for times in self._named(caller, request_id)]

    def name_of(self, core_id: str) -> str | None:
        """The public name behind an id of the core."""
        return self._names.get(core_id)

    def _named(self, caller: str, response_id: str) -> list[RequestTimes]:
        times = self._requests.get((caller, response_id))
        if times is not None:
            return [times]
        numbered: list[RequestTimes] = []
        while (times := self._requests.get((caller, f"{response_id}/{len(numbered)}"))) is not None:
            numbered.append(times)
        return numbered

    def _forget_rest(self, first: tuple[str, str]) -> None:
        """A response begins: what is numbered below the same name is of one that ended."""
        caller, response_id = first[0], first[1].removesuffix(FIRST)
        for times in self._named(caller, response_id)[1:]:
            if times.has_ended:
                self._forget((caller, times.request_id))

    def _cut(self, core_id: str, timeline: Timeline) -> None:
        """Bring a living sequence up to the last record."""
        if self._last is not None and self._last.now_s > timeline.since_s:
            timeline.close(self._last.now_s, self._prefill_clock_s)

    def _advance_clocks(self, last: StepRecord, spent_s: float) -> None:
        self._prefill_clock_s += self._prefill_cost(last, spent_s)
        if last.scheduled and not self._prefill_tokens(last):
            mean = self._decode_step_s
            self._decode_step_s = spent_s if mean is None else mean + STEP_MEMORY * (spent_s - mean)
        before_s, self._queue_clocks_s = self._queue_clocks_s, self._queue_clocks_at(last.now_s + spent_s)
        for stalled in last.stalled:
            timeline = self._live.get(stalled.request_id)
            if timeline is not None and timeline.phase is Phase.QUEUED and stalled.reason not in _KNOWN:
                timeline.held_s[stalled.reason] = timeline.held_s.get(stalled.reason, 0.0) + spent_s
                clocks_s = zip(timeline.queue_clocks_s, before_s, self._queue_clocks_s, strict=True)
                # What the head of the queue lacked meanwhile is not what this one waited for.
                timeline.queue_clocks_s = tuple(then + now - before for then, before, now in clocks_s)

    def _queue_clocks_at(self, now_s: float) -> tuple[float, ...]:
        """The clocks at a time since the last record: what the head of the queue lacked then, it lacks until now."""
        clocks_s, last = list(self._queue_clocks_s), self._last
        for stalled in () if last is None else last.stalled:
            timeline = self._live.get(stalled.request_id)
            waits = timeline is None or timeline.phase is Phase.QUEUED
            if last is not None and waits and stalled.reason in QUEUE_REASONS:
                clocks_s[QUEUE_REASONS.index(stalled.reason)] += max(0.0, now_s - last.now_s)
        return tuple(clocks_s)

    def _prefill_tokens(self, record: StepRecord) -> int:
        return sum(item.num_tokens for item in record.scheduled if item.num_tokens > 1)

    def _prefill_cost(self, record: StepRecord, spent_s: float) -> float:
        """What prompts in a step cost the requests that decoded in it: the time over a step without any; while none was
        seen, a part by tokens."""
        num_prefill = self._prefill_tokens(record)
        if not num_prefill:
            return 0.0
        if self._decode_step_s is not None:
            return max(0.0, spent_s - self._decode_step_s)
        return spent_s * num_prefill / sum(item.num_tokens for item in record.scheduled)

    def _recover(self, from_s: float, now_s: float) -> None:
        """The core was replaced: the time between is no request's work, and every request starts from the queue."""
        for timeline in self._live.values():
            if timeline.since_s < from_s:
                timeline.close(from_s, self._prefill_clock_s)
            timeline.phase = Phase.QUEUED if timeline.first_scheduled_s is None else Phase.RECOVERING
            timeline.waits_for = None
        self._decoding.clear()

    def _schedule(self, core_id: str, timeline: Timeline, start: int, share: float, now_s: float) -> None:
        if timeline.phase is Phase.QUEUED:
            self._leave_queue(timeline, now_s)
        timeline.close(now_s, self._prefill_clock_s)
        timeline.waits_for = None
        if timeline.first_scheduled_s is None:
            timeline.first_scheduled_s = now_s
        if start >= timeline.num_prompt_tokens and timeline.phase is not Phase.PREEMPTED:
            timeline.phase = Phase.DECODING
            self._decoding.add(core_id)
        else:
            timeline.phase, timeline.share = Phase.PREFILLING, share

    def _stall(self, core_id: str, timeline: Timeline, reason: str, by: str | None, now_s: float) -> None:
        if timeline.phase is Phase.PREEMPTED and reason != "preempted":
            return  # it waits at the head of the queue to come back
        timeline.close(now_s, self._prefill_clock_s)
        self._decoding.discard(core_id)
        timeline.phase, timeline.waits_for = _STALLED[reason], by
        timeline.num_preemptions += reason == "preempted"

    def _leave_queue(self, timeline: Timeline, now_s: float) -> None:
        clocks_s, before_s = self._queue_clocks_at(now_s), timeline.queue_clocks_s
        timeline.queue_clocks_s = tuple(now - then for now, then in zip(clocks_s, before_s, strict=True))

    def _forget_oldest(self) -> None:
        while len(self._ended) > self._max_remembered:
            self._forget(next(iter(self._ended)))

    def _forget(self, key: tuple[str, str]) -> None:
        """One that ended."""
        self._ended.pop(key, None)
        times = self._requests.pop(key, None)
        for timeline in () if times is None else times.sequences:
            self._names.pop(timeline.core_id, None)
