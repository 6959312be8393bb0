"""The whole engine in one step: schedule, execute, update, emit."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from quire.core.plan import StepPlan, StepResult, TokenDelta
from quire.core.scheduler import Scheduler


class Executor(Protocol):
    """Carries plans down and results up: to a runner in this process, to several ranks, to a fake.

    Plans are computed in the order in which they were given. A fault of one row is in its `RowResult`; an exception
    means that nothing more can be computed before `clear` was called.
    """

    def execute(self, plan: StepPlan) -> Any:
        """Start a step, without waiting if the executor can. The handle is good for one `collect`."""

    def collect(self, handle: Any) -> StepResult:
        """Wait for the result of a step."""

    def run_idle_work(self) -> bool:
        """While there is no work: something short that makes later steps quicker. False: there is nothing to do."""

    def clear(self) -> None:
        """Forget all requests and all steps in flight, in whatever state they are. A call that was interrupted is
        repeated."""

    def give_back(self, runs: Sequence[tuple[int, int]]) -> None:
        """Give the memory of cache blocks back to the system: runs `(first block, number)`, without content. Where it
        is the device's own, nothing happens."""

    def close(self) -> None:
        """Give back processes, threads and memory. May be called twice."""


class IdleWork(Protocol):
    """What the core does while there is no work, once the executor has none of its own."""

    def do_next(self) -> bool:
        """One short piece. False: there is none left until requests have come."""

    def check(self) -> None:
        """State what should be true by all that was done."""


class EngineCore:
    """A scheduler, an executor, and the body of the loop between them.

    Requests are added to `scheduler`, and aborted there. `clock` gives seconds; the core writes them into its records
    and decides nothing by them.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, clock: Callable[[], float], idle_work: IdleWork | None = None
    ) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._idle_work = idle_work

    def step(self) -> list[TokenDelta]:
        """One step for all: every unfinished request is considered, and what is new of them is returned."""
        if not self.scheduler.has_work:
            return []
        plan = self.scheduler.schedule(self._clock())
        handle = self._executor.execute(plan)
        result = self._executor.collect(handle)
        return self.scheduler.update(plan, result)

    def run_idle_work(self) -> bool:
        """See `Executor.run_idle_work`; then the idle work."""
        return self._executor.run_idle_work() or (self._idle_work is not None and self._idle_work.do_next())

    def give_back(self, *, keeps_cached: bool) -> None:
        """Give memory that no block needs back to the system: see `BlockPool.give_back`."""
        self._executor.give_back(self.scheduler.give_back(keeps_cached=keeps_cached))

    def clear(self) -> None:
        """Forget all requests, in whatever state they are: after a fault, or an interrupt in the middle of a step."""
        self._executor.clear()
        self.scheduler.clear()

    def check(self) -> None:
        """State what is always true; for tests, and for idle times in production."""
        self.scheduler.check()
        if self._idle_work is not None:
            self._idle_work.check()

    def close(self) -> None:
        """Close the executor. Nothing can be computed afterwards."""
        self._executor.close()


class OverlappingCore(EngineCore):
    """The same, with the next step planned while one is computed.

    Plan n + 1 is made from counts alone, before the tokens of step n are known; the executor has them by then. That a
    request ended with a token of step n is seen one step late: what step n + 1 sampled for it is dropped. After the
    last request has ended, a step that no request needs may be in flight; it is collected with the next.
    """

    _started: tuple[StepPlan, Any] | None = None

    def clear(self) -> None:
        """See `EngineCore.clear`."""
        self._started = None
        super().clear()

    def step(self) -> list[TokenDelta]:
        """Start the next step, then take in the one before it: the first call after a rest returns nothing."""
        if not self.scheduler.has_work:
            return []
        plan = self.scheduler.schedule(self._clock())
        before, self._started = self._started, (plan, self._executor.execute(plan))
        if before is None:
            return []
        plan, handle = before
        return self.scheduler.update(plan, self._executor.collect(handle))
