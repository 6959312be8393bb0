"""What a core does in this process while there is no work: it states its invariants, and gives memory back.

Both wait until requests have come since the last time. A check may take a thousandth of the time that passes, so they
cost less than 0.1 %. A violation is a fault of the engine, found where no request suffers by it: it is logged, and
scheduler and rows start anew.
"""

import logging
from collections.abc import Callable

from quire.core.engine_core import EngineCore

CHECK_SHARE = 0.001
"""Of the time, at most, that goes into checks."""
RELEASE_AFTER_SECONDS = 30.0
"""Without a request: the next one then pays for its memory again, some hundred microseconds."""

logger = logging.getLogger("quire")


class IdleChores:
    """Of one core, for the thread that steps it.

    Args:
        release: `EngineArgs.release_idle_memory`.
        clock: seconds.
    """

    def __init__(self, core: EngineCore, release: str, clock: Callable[[], float]) -> None:
        self._core = core
        self._release = release
        self._clock = clock
        self._steps_checked = self._steps_released = 0
        self._next_check_s = 0.0
        self._idle_since_s: float | None = None

    def begin(self) -> None:
        """There is no work from now on."""
        self._idle_since_s = self._clock()

    def do_due(self) -> float | None:
        """Do what is due. Seconds until something will be; None: nothing will before requests have come."""
        now_s, num_steps = self._clock(), self._core.scheduler.num_steps
        if num_steps != self._steps_checked and now_s >= self._next_check_s:
            self._check()
            now_s, num_steps = self._clock(), self._core.scheduler.num_steps
            self._steps_checked = num_steps
        release_s = (now_s if self._idle_since_s is None else self._idle_since_s) + RELEASE_AFTER_SECONDS
        if self._release != "no" and num_steps != self._steps_released and now_s >= release_s:
            self._core.give_back(keeps_cached=self._release != "all")
            self._steps_released = num_steps
        due_s = []
        if num_steps != self._steps_checked:
            due_s.append(self._next_check_s)
        if self._release != "no" and num_steps != self._steps_released:
            due_s.append(release_s)
        return max(0.0, min(due_s) - now_s) if due_s else None

    def _check(self) -> None:
        begin_s = self._clock()
        try:
            self._core.scheduler.check()
        except AssertionError:
            logger.exception("the core starts anew, without a request lost")
            self._core.clear()
        end_s = self._clock()
        self._next_check_s = end_s + (end_s - begin_s) / CHECK_SHARE
