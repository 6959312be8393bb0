"""Executors for one device in this process."""

from quire.core.plan import StepPlan, StepResult
from quire.runner.model_runner import InFlightStep, ModelRunner


class LocalExecutor:
    """Runs each plan at once; the handle is the result."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute `plan`."""
        return self._runner.execute(plan)

    def collect(self, handle: StepResult) -> StepResult:
        """The result of `execute`."""
        return handle

    def run_idle_work(self) -> bool:
        """See `ModelRunner.run_idle_work`."""
        return self._runner.run_idle_work()

    def close(self) -> None:
        """Nothing is held outside this process."""


class DeviceExecutor:
    """Hands each plan to a device that computes on its own; the handle is the step that has begun."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def execute(self, plan: StepPlan) -> InFlightStep:
        """Begin to compute `plan`."""
        return self._runner.launch(plan)

    def collect(self, handle: InFlightStep) -> StepResult:
        """Wait for the tokens of a step."""
        return self._runner.collect(handle)

    def run_idle_work(self) -> bool:
        """See `ModelRunner.run_idle_work`."""
        return self._runner.run_idle_work()

    def close(self) -> None:
        """Nothing is held outside this process."""
