"""How long a step of the core may take, and whether a core that is silent for longer still computes.

A hang is judged by the age of the core's last message while it has work, and by its use of processors meanwhile, where
the system reports it. How long a step may take is learned from the steps that the core has done.
"""

import math
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

RECHECK_S = 0.25
"""An idle core is checked again after this: it may have been between two threads."""
LEAST_SECONDS = 1.5
"""A shorter pause is never a hang: a machine under load can take that long to come back to a process."""
FIRST_SECONDS = 60.0
"""While no step has been seen, on a device: it may compile first. No first step is waited for longer."""
SLACK = 10.0
SLOWEST_BYTES_PER_S = 2e8
SLOWEST_FLOPS = 2e10
"""Of a machine that a model is served on: what its disk and its processors do at the least."""


class Activity(NamedTuple):
    """Of a process."""

    used_s: Mapping[int, float]
    """Thread -> its processor time."""
    is_awake: bool
    """A thread runs, or waits for a processor or a disk."""


class Heartbeat:
    """Judges one core.

    - No thread of it awake for `idle_timeout_s`: it hangs, however long its step may take.
    - No message for `allowed_s`: it hangs if no thread is awake, or if one thread has used half of that time on a
      processor since the last message. Else it is starved, and its time begins again; what it has used still counts.

    Any thread may call it.

    Args:
        clock: seconds, monotonic.
        activity: of the core now; None where the system does not say, and then time alone decides.
    """

    def __init__(self, clock: Callable[[], float], activity: Callable[[], Activity | None]) -> None:
        self._clock = clock
        self._activity = activity
        self._lock = threading.RLock()
        self._allowed_s = self._idle_timeout_s = self._next_check_s = math.inf
        self.heard()

    def expect(self, allowed_s: float, idle_timeout_s: float = math.inf) -> None:
        """How long it may now be silent, and how long it may be idle meanwhile."""
        with self._lock:
            self._allowed_s, self._idle_timeout_s = allowed_s, idle_timeout_s
            self.heard()

    def heard(self) -> None:
        """A message came, or it has work from now on."""
        with self._lock:
            self._heard_s = now_s = self._clock()
            self._used_before_s: Mapping[int, float] | None = None
            self._idle_since_s: float | None = None
            self._schedule_check(now_s)

    @property
    def next_check_s(self) -> float:
        """When to check again."""
        return self._next_check_s

    def is_hung(self) -> bool:
        """Check, if it is time."""
        with self._lock:
            return self._is_hung(self._clock())

    def _is_hung(self, now_s: float) -> bool:
        if now_s < self._next_check_s:
            return False
        is_late, activity = now_s >= self._heard_s + self._allowed_s, self._activity()
        if activity is None:
            self._next_check_s = self._heard_s + self._allowed_s
            return is_late
        if not activity.is_awake:
            return is_late or self._is_idle(now_s)
        self._idle_since_s = None
        before_s = self._used_before_s = activity.used_s if self._used_before_s is None else self._used_before_s
        if is_late:
            if any(used - before_s.get(thread, 0.0) > self._allowed_s / 2 for thread, used in activity.used_s.items()):
                return True
            self._heard_s = now_s
        self._schedule_check(now_s)
        return False

    def _is_idle(self, now_s: float) -> bool:
        if self._idle_since_s is None:
            self._idle_since_s, self._next_check_s = now_s, now_s + RECHECK_S
        return now_s >= self._idle_since_s + RECHECK_S

    def _schedule_check(self, now_s: float) -> None:
        self._next_check_s = min(now_s + self._idle_timeout_s, self._heard_s + self._allowed_s)


class StepAllowance:
    """Classes of steps by the power of two of their work, each with the longest duration seen.

    A class that was not seen is judged by the next smaller one, scaled as if time were in proportion to work (it
    grows more slowly, as the weights are read once a step).

    Args:
        host_weight_bytes: of a model that this machine's processors compute: while no step was seen, the slowest
            machine is the measure, with four operations for each weight of two bytes. None: a device computes.
        hang_timeout_s: what to wait for every step, instead of all this.
    """

    def __init__(self, host_weight_bytes: int | None = None, hang_timeout_s: float | None = None) -> None:
        self._longest_s: dict[int, float] = {}
        self._host_weight_bytes = host_weight_bytes
        self._hang_timeout_s = hang_timeout_s

    @property
    def idle_timeout_s(self) -> float:
        """How long all threads of the process may be idle during a step."""
        return math.inf if self._host_weight_bytes is None or self._hang_timeout_s is not None else LEAST_SECONDS

    def observe(self, work: float, seconds: float) -> None:
        """A step of so much work took so long."""
        size = int(work).bit_length()
        self._longest_s[size] = max(seconds, self._longest_s.get(size, 0.0))

    def seconds_for(self, work: float) -> float:
        """What the other side should wait for a step of so much work: tokens, each by its distance from the first."""
        if self._hang_timeout_s is not None:
            return self._hang_timeout_s
        size = int(work).bit_length()
        known = [seen for seen in self._longest_s if seen <= size]
        if known:
            expected_s = max(self._longest_s[seen] for seen in known) * 2.0 ** (size - max(known))
        elif self._longest_s:
            expected_s = self._longest_s[min(self._longest_s)]
        else:
            return max(LEAST_SECONDS, min(FIRST_SECONDS, self._first_seconds(work)))
        return max(LEAST_SECONDS, SLACK * expected_s)

    def _first_seconds(self, work: float) -> float:
        size = self._host_weight_bytes
        return math.inf if size is None else size / SLOWEST_BYTES_PER_S + 2 * size * work / SLOWEST_FLOPS
