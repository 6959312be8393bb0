"""The whole engine in one step: schedule, execute, update, emit."""

from collections.abc import Callable
from typing import Any, Protocol

from quire.core.plan import StepPlan, StepRecord, StepResult, TokenDelta
from quire.core.request import NewRequest
from quire.core.scheduler import Scheduler


class PlanExecutor(Protocol):
    """What the core needs of an executor. The contract in full is `quire.executor.base.Executor`."""

    def execute(self, plan: StepPlan) -> Any:
        """Start a step; what is returned stands for its result."""

    def collect(self, handle: Any) -> StepResult:
        """Wait for the result."""

    def run_idle_work(self) -> bool:
        """While there is no work: something short that makes later steps quicker. False: there is nothing to do."""

    def close(self) -> None:
        """Give everything back."""


class IdleWork(Protocol):
    """What the core does while there is no work, once the executor has nothing left to prepare."""

    def do_next(self) -> bool:
        """One short piece. False: there is none left until requests have come."""

    def check(self) -> None:
        """State what should be true by all that was done."""


class EngineCore:
    """A scheduler, an executor, and the body of the loop between them.

    `clock` gives seconds; the core writes them into its records and decides nothing by them.
    """

    idle_work: IdleWork | None = None

    def __init__(self, scheduler: Scheduler, executor: PlanExecutor, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock

    def step(self) -> list[TokenDelta]:
        """One step for all: every unfinished request is considered, and news of them is returned."""
        if not self._scheduler.has_work:
            return []
        plan = self._scheduler.schedule(self._clock())
        handle = self._executor.execute(plan)
        result = self._executor.collect(handle)
        return self._scheduler.update(plan, result)

    def run_idle_work(self) -> bool:
        """See `PlanExecutor.run_idle_work`; then the idle work."""
        return self._executor.run_idle_work() or (self.idle_work is not None and self.idle_work.do_next())

    def add(self, new: NewRequest) -> None:
        """See `Scheduler.add`."""
        self._scheduler.add(new)

    def abort(self, request_id: str) -> list[TokenDelta]:
        """See `Scheduler.abort`."""
        return self._scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        """See `Scheduler.num_running`."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """See `Scheduler.num_waiting`."""
        return self._scheduler.num_waiting

    @property
    def cache_usage(self) -> float:
        """See `Scheduler.cache_usage`."""
        return self._scheduler.cache_usage

    @property
    def last_record(self) -> StepRecord:
        """What the last step did, and why some did not advance."""
        return self._scheduler.last_record

    def check(self) -> None:
        """State what is always true; for tests, and for idle times in production."""
        self._scheduler.check()
        if self.idle_work is not None:
            self.idle_work.check()

    def close(self) -> None:
        """Close the executor. Nothing can be computed afterwards."""
        self._executor.close()


class OverlappingCore(EngineCore):
    """The same, with the next step planned while one is computed.

    Plan n + 1 is made from counts alone, before the tokens of step n are known; who computes has them by then. That a
    request ended with a token of step n is seen one step late: what step n + 1 sampled for it is dropped. After the
    last request has ended, a step that nobody wants may be in flight; it is collected with the next.
    """

    _started: tuple[StepPlan, Any] | None = None

    def step(self) -> list[TokenDelta]:
        """Start the next step, then take in the one before it: the first call after a rest has no news."""
        if not self._scheduler.has_work:
            return []
        plan = self._scheduler.schedule(self._clock())
        before, self._started = self._started, (plan, self._executor.execute(plan))
        if before is None:
            return []
        plan, handle = before
        return self._scheduler.update(plan, self._executor.collect(handle))
