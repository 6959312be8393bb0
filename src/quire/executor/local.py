"""The executor for one device in this process: it computes when asked."""

from quire.core.plan import StepPlan, StepResult
from quire.runner.model_runner import ModelRunner


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

    def close(self) -> None:
        """Nothing is held outside this process."""
