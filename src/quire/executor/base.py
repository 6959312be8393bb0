"""What an executor is."""

from typing import Protocol, TypeVar

from quire.core.plan import StepPlan, StepResult

Handle = TypeVar("Handle")


class Executor(Protocol[Handle]):
    """Carries plans down and results up: to this process, to several ranks, to a fake.

    Plans are computed in the order in which they were given. A fault of one row is told in its `RowResult`;
    an exception means that nothing more can be computed.
    """

    def execute(self, plan: StepPlan) -> Handle:
        """Start a step, without waiting if the executor can. The handle is good for one `collect`."""

    def collect(self, handle: Handle) -> StepResult:
        """Wait for the result of a step."""

    def run_idle_work(self) -> bool:
        """While there is no work: something short that makes later steps quicker. False: there is nothing to do."""

    def close(self) -> None:
        """Give back processes, threads and memory. May be called twice."""
