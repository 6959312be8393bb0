"""What a live view shows: blocks and their holders, the last steps, requests, and how fast it all goes.

It reads step records and the engine's other events, and keeps no text and no token. What the prefix cache still
remembers of free blocks is derived: a full block that its last holder leaves is remembered until another is given it.
Blocks that the core forgot meanwhile (a row failed, memory was given back) are shown for too long; the counts of the
records are true.
"""

import math
import statistics
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.core.limits import SchedulerConfig
from quire.core.plan import ScheduledRow, StepRecord
from quire.core.request import NewRequest
from quire.engine.percentiles import percentile

if TYPE_CHECKING:  # what a simulation takes is imported where there is a viewer: every server starts with this module
    from quire.observe.replay import Asked
    from quire.observe.simulate import Times
    from quire.observe.step_cost import Sample

KEPT_STEPS = 400
"""That a viewer sees when it comes."""
MOST_ENDED = 60
"""Requests that ended and are still listed."""
WINDOW = 200
"""Latencies that the percentiles are of."""
RATE_S = 2.0
"""Over which tokens a second are counted."""
COMPARED = 40
"""Requests of the comparison with static batches, which takes time that grows with them."""
WATCHED_S = 60.0
NOTED_S, FEW_SAMPLES = 0.05, 32
"""Between two steps whose time is noted, once there are so many: with hundreds of rows it takes a fifth of a ms."""
LONGEST_STEP_S = 30.0
MOST_ROWS = 256


@dataclass(slots=True)
class LiveRequest:
    """A sequence."""

    index: int
    """Its number in the view: colours go by it."""
    name: str
    """Its public name."""
    num_prompt: int
    max_tokens: int
    num_output: int = 0
    num_computed: int = 0
    state: str = "waiting"
    """waiting, prefill, decode, preempted, or how it ended."""
    reason: str = ""
    """Why it did not advance in the last step."""
    blocks: list[int] = field(default_factory=list)
    blocks_version: int = 0
    """Of the view when they last changed."""
    arrival_s: float = 0.0

    def shown(self, since: int) -> dict[str, Any]:
        """As a viewer gets it: the blocks only where they changed."""
        return {
            "index": self.index,
            "name": self.name,
            "num_prompt": self.num_prompt,
            "max_tokens": self.max_tokens,
            "num_output": self.num_output,
            "num_computed": self.num_computed,
            "state": self.state,
            "reason": self.reason,
            "blocks": list(self.blocks) if self.blocks_version > since else None,
        }


class LiveView:
    """The state of one engine, for viewers. One thread reports events; any may ask for a frame.

    Args:
        block_size: tokens in a block.
        remembers: whether there is a prefix cache.
        weight_bytes: that a step reads; 0: not known.
        token_bytes: of a token's keys and values.
    """

    def __init__(
        self, block_size: int = 16, *, remembers: bool = True, weight_bytes: int = 0, token_bytes: int = 0
    ) -> None:
        self._lock = threading.Lock()
        self._requests: dict[str, LiveRequest] = {}
        self._ended: deque[LiveRequest] = deque(maxlen=MOST_ENDED)
        self._holders: dict[int, int] = {}
        self._cached: dict[int, None] = {}
        self._cached_version = 0
        self._version = 0
        """Counts events that change what is shown."""
        self._steps: deque[tuple[int, Any]] = deque(maxlen=KEPT_STEPS)
        self._record: StepRecord | None = None
        self._num_seen = 0
        self._block_size = block_size
        self._remembers = remembers
        self._weight_bytes, self._token_bytes = weight_bytes, token_bytes
        self._tokens: deque[tuple[float, int]] = deque()
        self._ttft_s: deque[float] = deque(maxlen=WINDOW)
        self._tpot_s: deque[float] = deque(maxlen=WINDOW)
        self._now_s = 0.0
        self._watched_s = -math.inf
        """When a viewer was last sent a frame: what only a viewer wants is not computed without one."""
        self._samples: deque[Sample] = deque(maxlen=WINDOW)
        self._noted_s = -math.inf
        self._shape: tuple[float, float, float, float] | None = None
        """Of the last step."""
        self._hits = [0, 0]
        """Prompt tokens that were looked up in the prefix cache, and those that were there."""

    def add(self, new: NewRequest, name: str, sequence: int) -> None:
        """A sequence is in the queue."""
        with self._lock:
            shown = name if sequence == 0 else f"{name} [{sequence}]"
            num_prompt = len(new.prompt_token_ids)
            request = LiveRequest(self._num_seen, shown, num_prompt, new.max_tokens, arrival_s=new.arrival_s)
            self._requests[new.request_id] = request
            self._num_seen += 1

    def observe(self, record: StepRecord) -> None:
        """A step begins."""
        with self._lock:
            self._version += 1
            before, self._record = self._record, record
            if before is not None and record.step_id <= before.step_id:
                self._forget_blocks()
            if before is not None and self._shape is not None and 0 < record.now_s - before.now_s < LONGEST_STEP_S:
                self._samples.append((self._shape, record.now_s - before.now_s))
            self._shape = None
            due = len(self._samples) < FEW_SAMPLES or record.now_s - self._noted_s >= NOTED_S
            if record.scheduled and due and record.now_s - self._watched_s < WATCHED_S:
                self._noted_s = record.now_s
                from quire.observe.step_cost import features

                known = self._requests
                self._shape = features(
                    ScheduledRow(0, start, num, (), start + num >= known[name].num_prompt)
                    for name, start, num in record.scheduled
                    if name in known
                )
            self._now_s = record.now_s
            self._hits[0] += record.num_prefix_queries
            self._hits[1] += record.num_prefix_hits
            for stalled in record.stalled:
                request = self._requests.get(stalled.request_id)
                if request is not None:
                    request.reason = stalled.reason
                    if stalled.reason == "preempted":
                        self._leave(request)
                        request.state = "preempted"
            for request_id, block_ids in record.given_blocks:
                self._give(request_id, block_ids)
            rows = [self._advance(*item) for item in record.scheduled]
            waits = [
                (request.index, stalled.reason)
                for stalled in record.stalled
                if (request := self._requests.get(stalled.request_id)) is not None
            ]
            shown = [row for row in rows if row is not None]
            if self._steps and self._steps[-1][1][2] == shown:
                shown = self._steps[-1][1][2]  # as in most steps that only decode
            self._steps.append((self._version, (record.step_id, record.now_s, shown, waits)))

    def tokens(self, request_id: str, count: int, now_s: float, arrival_s: float | None, gap_s: float | None) -> None:
        """A sequence was given tokens.

        Args:
            arrival_s: of its request, whose first tokens they are; else None.
            gap_s: since the sequence's last ones, if there were any.
        """
        if not count:
            return
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                request.num_output += count
            self._tokens.append((now_s, count))
            while self._tokens[0][0] < now_s - RATE_S:
                self._tokens.popleft()
            if arrival_s is not None:
                self._ttft_s.append(now_s - arrival_s)
            if gap_s is not None:
                self._tpot_s.append(gap_s / count)

    def end(self, request_id: str, reason: str, now_s: float) -> None:
        """A sequence has ended. A call that was interrupted may be repeated."""
        with self._lock:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._version += 1
                self._leave(request)
                request.state, request.reason = reason, ""
                self._ended.append(request)

    def core_replaced(self) -> None:
        """Another core begins: with no blocks."""
        with self._lock:
            self._version += 1
            self._forget_blocks()

    def frame(self, since: int) -> Mapping[str, Any]:
        """All that is to be shown, in plain values.

        Args:
            since: the `version` of the frame that the viewer had last; -1: none. Steps that it has are left out, and
                blocks and cached blocks are None where they have not changed since.
        """
        with self._lock:
            record, self._watched_s = self._record, self._now_s
            # Not the record's counts: after the last request's end no step comes that would say so.
            num_running = sum(one.state in ("prefill", "decode") for one in self._requests.values())
            return {
                "version": self._version,
                "now_s": self._now_s,
                "step": -1 if record is None else record.step_id,
                "block_size": self._block_size,
                "num_blocks": 0 if record is None else record.num_blocks,
                "num_free_blocks": 0 if record is None else record.num_blocks - len(self._holders),
                "num_cached_blocks": len(self._cached),
                "num_running": num_running,
                "num_waiting": len(self._requests) - num_running,
                "requests": [request.shown(since) for request in self._requests.values()],
                "ended": [request.shown(since) for request in self._ended],
                "cached": [*self._cached] if self._cached_version > since or since < 0 else None,
                "steps": self._steps_after(since),
                "tokens_per_s": sum(count for _, count in self._tokens) / RATE_S if self._requests else 0.0,
                "ttft_s": _percentiles(self._ttft_s),
                "itl_s": _percentiles(self._tpot_s),
                "prefix_queries": self._hits[0],
                "prefix_hits": self._hits[1],
                "weight_bytes": self._weight_bytes,
                "read_bytes_per_s": self._read_rate(),
            }

    def _steps_after(self, since: int) -> list[tuple[Any, ...]]:
        """Id, time, rows and waits of each; None for rows that are those of the step before."""
        found, before = list[tuple[Any, ...]](), None
        for version, (step_id, now_s, rows, waits) in self._steps:
            if version > since:
                found.append((step_id, now_s, None if rows is before else rows, waits))
                before = rows
        return found

    def _read_rate(self) -> float:
        """Bytes that a step which only decodes reads in a second: the weights, and the keys and values of each row."""
        rates = [
            (self._weight_bytes + self._token_bytes * pairs) / seconds
            for (_, tokens, rows, pairs), seconds in self._samples
            if tokens == rows
        ]
        return statistics.median(rates) if rates and self._weight_bytes else 0.0

    def static_batches(self, max_model_len: int) -> dict[str, Any] | None:
        """Tokens a second of the last requests that ended, in `continuous` and in `static` batches: simulated alike,
        over steps that take what steps took here; and `spans`, of each request in both the seconds of its arrival, its
        first token and its last. None: too few have ended, or too few steps were seen.

        Takes some tenths of a second: for a thread of its own.
        """
        from quire.observe.replay import Session
        from quire.observe.reservations import simulate_reserved
        from quire.observe.simulate import simulate
        from quire.observe.step_cost import LEAST_STEPS, line_through

        with self._lock:
            samples, record = list(self._samples), self._record
            ended = [one for one in self._ended if one.num_output and one.state in ("stop", "length")][-COMPARED:]
        if record is None or len(samples) < LEAST_STEPS or len(ended) < 2:
            return None
        cost = line_through(samples)
        config = SchedulerConfig(MOST_ROWS, 2048, max_model_len, self._block_size, record.num_blocks)
        requests = sorted((_asked(one) for one in ended), key=lambda one: one.arrival_s)
        session = Session(config, "fcfs", prefix_caching=False, num_rules=0, start_s=0.0)
        found = {
            "continuous": simulate(session, requests, cost),
            "static": simulate_reserved(config, requests, cost, "reserve-max", "static"),
        }
        spans = {name: _spans(outcome.times.values()) for name, outcome in found.items()}
        return {**{name: one.numbers()["output_tokens_per_s"] for name, one in found.items()}, "spans": spans}

    def _give(self, request_id: str, block_ids: Sequence[int]) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.state in ("waiting", "preempted"):
            self._leave(request)  # it enters: these are all it has
            request.state = "prefill"
        request.blocks += block_ids
        request.blocks_version = self._cached_version = self._version
        for block_id in block_ids:
            self._holders[block_id] = self._holders.get(block_id, 0) + 1
            self._cached.pop(block_id, None)

    def _advance(self, request_id: str, start: int, num_tokens: int) -> tuple[int, int, bool] | None:
        request = self._requests.get(request_id)
        if request is None:
            return None
        is_decode = start >= request.num_prompt
        request.num_computed, request.reason = start + num_tokens, ""
        request.state = "decode" if is_decode else "prefill"
        return request.index, num_tokens, is_decode

    def _leave(self, request: LiveRequest) -> None:
        request.blocks_version = self._cached_version = self._version
        for place, block_id in enumerate(request.blocks):
            left = self._holders.get(block_id, 0) - 1
            if left > 0:
                self._holders[block_id] = left
                continue
            self._holders.pop(block_id, None)
            if self._remembers and (place + 1) * self._block_size <= request.num_computed:
                self._cached[block_id] = None
        request.blocks = []

    def _forget_blocks(self) -> None:
        self._holders.clear()
        self._cached.clear()
        self._cached_version = self._version
        for request in self._requests.values():
            request.blocks, request.blocks_version = [], self._version
            request.state = "waiting"


def _asked(one: LiveRequest) -> "Asked":
    """As a simulation takes it."""
    from quire.observe.replay import Asked

    return Asked(one.index, one.num_prompt, one.max_tokens, one.arrival_s, reason="stop", num_output=one.num_output)


def _spans(times: "Iterable[Times]") -> list[tuple[float, ...]]:
    found = [(one.arrival_s, one.first_s or one.arrival_s, one.last_s or one.arrival_s) for one in times]
    start_s = min((arrival for arrival, _, _ in found), default=0.0)
    return [tuple(at - start_s for at in one) for one in found]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)} if values else {}
