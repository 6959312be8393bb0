"""The bound of the queue: which requests may still wait, and when a refused caller should retry.

A sequence waits from the moment it is let in here until its first step. Past the bound a request is refused before
it costs anything. Where several callers are known, half of the queue is divided between them by weight and the other
half is open to all: so one caller's flood leaves room for every other, and no caller is refused its share.

`retry_after_s` is the time in which the queue empties at the rate of the last seconds.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from quire.core.fair_shares import MAX_WEIGHT
from quire.errors import InvalidRequestError, OverloadedError, TooManyRequestsError

RATE_SECONDS = 10.0
"""Memory of the rate at which the queue empties."""
FIRST_RETRY_SECONDS = 5
"""While no rate is known."""
MAX_RETRY_SECONDS = 600
MAX_CALLER_WEIGHT = MAX_WEIGHT


class Caller(NamedTuple):
    """Of a request: a name without meaning (a digest of the key), and a share against that of other callers."""

    name: str = ""
    weight: int = 1
    network: str = ""
    """Where it comes from: where there are no keys, work beside the event loop is done in turns by it."""


ANYBODY = Caller()


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Bounds of what waits."""

    max_requests: int
    """Sequences that wait beyond those for which a row is free; 0: no request waits for a row."""
    max_tokens: int
    """Their prompt tokens."""
    max_num_seqs: int
    """Rows of the engine."""


class Rate:
    """Events per second, of the last `RATE_SECONDS` above all."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._first_s: float | None = None
        self._last_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        """`amount` of events happened."""
        if self._first_s is None:
            self._first_s = self._last_s = now_s
        self._weight = self._weight * math.exp(min(0.0, self._last_s - now_s) / RATE_SECONDS) + amount
        self._last_s = now_s

    def read(self, now_s: float) -> float | None:
        """Events per second; None when none was seen."""
        if self._first_s is None:
            return None
        age_s = max(now_s - self._first_s, 1.0)
        weight = self._weight * math.exp(min(0.0, self._last_s - now_s) / RATE_SECONDS)
        return weight / (RATE_SECONDS * -math.expm1(-age_s / RATE_SECONDS))


@dataclass(slots=True)
class _Held:
    requests: int = 0
    tokens: int = 0


class QueueBound:
    """Counts what waits, by caller. Any thread may call it.

    Args:
        config: the bounds.
        clock: seconds.
    """

    def __init__(self, config: QueueConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[str, int]] = {}
        """The core's id -> caller and prompt tokens."""
        self._held: dict[str, _Held] = {}
        self._total = _Held()
        self._shares: dict[str, float] = {}
        self._free_rows = config.max_num_seqs
        self._requests_rate, self._tokens_rate = Rate(), Rate()
        self.num_rejected = {"requests": 0, "tokens": 0}
        """Refusals so far, by the bound that was met."""

    def expect(self, weights: Mapping[str, int]) -> None:
        """Name the known callers, with weights: of two or more, each has its share of half of the queue."""
        total, shared = sum(weights.values()), len(weights) > 1
        shares = {name: weight / total / 2 for name, weight in weights.items()} if shared else {}
        with self._lock:
            self._shares = shares

    def check_room(self, caller: Caller) -> None:
        """Refuse at once, before a prompt is tokenised, what could not be let in whatever its length.

        Raises:
            OverloadedError: the queue is full. TooManyRequestsError: this caller's part of it is.
        """
        with self._lock:
            self._check(caller, 1, 1)

    def enter(self, caller: Caller, num_prompt_tokens: int, core_ids: tuple[str, ...]) -> None:
        """Let the sequences of one request wait.

        Raises:
            InvalidRequestError: they could never be let in, with the numbers.
            OverloadedError: the queue is full. TooManyRequestsError: this caller's part of it is.
        """
        count, tokens, config = len(core_ids), len(core_ids) * num_prompt_tokens, self._config
        if count > config.max_requests + config.max_num_seqs:
            raise InvalidRequestError(
                f"n asks for {count} sequences at once; {config.max_num_seqs} run and {config.max_requests} wait "
                "at most (max_num_seqs, max_num_queued_reqs)",
                param="n",
            )
        if tokens > config.max_tokens:
            raise InvalidRequestError(
                f"{count} x {num_prompt_tokens} prompt tokens can never wait: the queue holds {config.max_tokens} "
                "(max_num_queued_tokens)",
                param="prompt",
            )
        with self._lock:
            self._check(caller, count, tokens)
            held = self._held.setdefault(caller.name, _Held())
            for item in (held, self._total):
                item.requests += count
                item.tokens += tokens
            self._waiting.update((core_id, (caller.name, num_prompt_tokens)) for core_id in core_ids)

    def left(self, core_id: str, *, was_scheduled: bool) -> None:
        """A sequence had its first step, or ended without one. What never waited here is fine."""
        with self._lock:
            found = self._waiting.pop(core_id, None)
            if found is None:
                return
            name, tokens = found
            for item in (self._held[name], self._total):
                item.requests -= 1
                item.tokens -= tokens
            if not self._held[name].requests:
                del self._held[name]
            if was_scheduled:
                now_s = self._clock()
                self._requests_rate.add(1, now_s)
                self._tokens_rate.add(tokens, now_s)

    def observe(self, num_running: int, num_waiting: int) -> None:
        """The state after a step. Rows count as free only while no request waits for something else."""
        self._free_rows = 0 if num_waiting else max(0, self._config.max_num_seqs - num_running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their first step."""
        return self._total.requests

    def _check(self, caller: Caller, count: int, tokens: int) -> None:
        room = self._config.max_requests + self._free_rows
        if self._overfull(caller.name, count, room, lambda held: held.requests):
            raise self._refusal(caller, "requests", self._total.requests, self._requests_rate)
        if self._total.requests and self._overfull(
            caller.name, tokens, self._config.max_tokens, lambda held: held.tokens
        ):
            raise self._refusal(caller, "tokens", self._total.tokens, self._tokens_rate)

    def _overfull(self, name: str, amount: int, room: int, count: Callable[[_Held], int]) -> bool:
        """Whether `amount` more for `name` would leave the open part of `room` too small for what is beyond shares."""
        shares = {other: int(share * room) for other, share in self._shares.items()}
        beyond = sum(max(0, count(held) - shares.get(other, 0)) for other, held in self._held.items() if other != name)
        own = amount + (count(self._held[name]) if name in self._held else 0)
        return beyond + max(0, own - shares.get(name, 0)) > room - sum(shares.values())

    def _refusal(self, caller: Caller, what: str, waiting: int, rate: Rate) -> OverloadedError:
        self.num_rejected[what] += 1
        per_second, retry_s = rate.read(self._clock()), FIRST_RETRY_SECONDS
        if per_second is not None:
            retry_s = MAX_RETRY_SECONDS
            if per_second * MAX_RETRY_SECONDS > waiting:
                retry_s = max(1, math.ceil(waiting / per_second))
        unit = "requests" if what == "requests" else "prompt tokens"
        if not self._shares:
            return OverloadedError(f"the queue is full: {waiting} {unit} wait", retry_after_s=retry_s)
        held = self._held.get(caller.name, _Held())
        own = held.requests if what == "requests" else held.tokens
        return TooManyRequestsError(
            f"too many requests with this key: {own} of the {waiting} {unit} that wait are its own",
            retry_after_s=retry_s,
        )
