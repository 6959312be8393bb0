"""Whether a core that says nothing still computes: the age of its last word while work is pending, and its use of
processors meanwhile, where the system tells of that."""

import math
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

SURE_SECONDS = 0.25
"""Who sleeps is looked at again after this: it may have been between two threads."""


class Activity(NamedTuple):
    """Of a process."""

    used_s: Mapping[int, float]
    """Thread -> its processor time."""
    is_awake: bool
    """A thread runs, or waits for a processor or a disk."""


class Heartbeat:
    """Judges one core.

    - Nobody awake in it for `asleep_s`: it hangs, whatever it should take.
    - No word for `allowed_s`: it hangs if nobody is awake, or if one of its threads has used half of that time on a
      processor since the last word. Else it is starved, and its time begins again; what it has used still counts.

    Any thread may call it.

    Args:
        clock: seconds, monotonic.
        activity: of the core now; None where the system does not say, and then time alone decides.
    """

    def __init__(self, clock: Callable[[], float], activity: Callable[[], Activity | None]) -> None:
        self._clock = clock
        self._activity = activity
        self._lock = threading.RLock()
        self._allowed_s = self._asleep_s = self._look_s = math.inf
        self.heard()

    def expect(self, allowed_s: float, asleep_s: float = math.inf) -> None:
        """How long it may now say nothing, and how long it may sleep meanwhile."""
        with self._lock:
            self._allowed_s, self._asleep_s = allowed_s, asleep_s
            self.heard()

    def heard(self) -> None:
        """It gave a word, or has something to do from now on."""
        with self._lock:
            self._heard_s = now_s = self._clock()
            self._used_before_s: Mapping[int, float] | None = None
            self._slept_since_s: float | None = None
            self._look_at(now_s)

    @property
    def look_s(self) -> float:
        """When to look again."""
        return self._look_s

    def is_hung(self) -> bool:
        """Look, if it is time."""
        with self._lock:
            return self._is_hung(self._clock())

    def _is_hung(self, now_s: float) -> bool:
        if now_s < self._look_s:
            return False
        is_late, activity = now_s >= self._heard_s + self._allowed_s, self._activity()
        if activity is None:
            self._look_s = self._heard_s + self._allowed_s
            return is_late
        if not activity.is_awake:
            return is_late or self._is_asleep(now_s)
        self._slept_since_s = None
        before_s = self._used_before_s = activity.used_s if self._used_before_s is None else self._used_before_s
        if is_late:
            if any(used - before_s.get(thread, 0.0) > self._allowed_s / 2 for thread, used in activity.used_s.items()):
                return True
            self._heard_s = now_s
        self._look_at(now_s)
        return False

    def _is_asleep(self, now_s: float) -> bool:
        if self._slept_since_s is None:
            self._slept_since_s, self._look_s = now_s, now_s + SURE_SECONDS
        return now_s >= self._slept_since_s + SURE_SECONDS

    def _look_at(self, now_s: float) -> None:
        self._look_s = min(now_s + self._asleep_s, self._heard_s + self._allowed_s)
