"""Whether a core that says nothing still computes: the age of its last word while work is pending, and its use of
processors meanwhile, where the system reports it."""

import math
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

RECHECK_S = 0.25
"""An idle core is checked again after this: it may have been between two threads."""


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
