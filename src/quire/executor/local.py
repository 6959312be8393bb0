"""The executor for one device in this process."""

from collections.abc import Sequence

from quire.core.plan import StepPlan, StepResult
from quire.runner.model_runner import InFlightStep, ModelRunner


class LocalExecutor:
    """Runs plans; the handle is the step in flight, or its result. See `quire.core.engine_core.Executor`.

    Args:
        overlap: the device computes on its own, so that `execute` need not wait.
    """

    def __init__(self, runner: ModelRunner, overlap: bool = False) -> None:
        self._runner = runner
        self._overlap = overlap

    def execute(self, plan: StepPlan) -> InFlightStep | StepResult:
        """Compute `plan`, or launch it."""
        return self._runner.launch(plan) if self._overlap else self._runner.execute(plan)

    def collect(self, handle: InFlightStep | StepResult) -> StepResult:
        """Wait for the tokens of a step that was launched."""
        return handle if isinstance(handle, StepResult) else self._runner.collect(handle)

    def run_idle_work(self) -> bool:
        """Capture a graph, if the runner has any left."""
        return self._runner.run_idle_work()

    def clear(self) -> None:
        """Every row is free afterwards."""
        self._runner.clear()

    def give_back(self, runs: Sequence[tuple[int, int]]) -> None:
        """See `quire.ops.types.Device.release_blocks`."""
        self._runner.give_back(runs)

    def close(self) -> None:
        """Nothing is held outside this process."""
