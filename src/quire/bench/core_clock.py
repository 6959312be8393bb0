"""The clock on the control plane: microseconds that the core itself takes for one step.

The caller composes scheduler and executor (this folder may import neither), so the same clock reads any.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Steps(Protocol):
    """The two halves of a scheduler's step."""

    def schedule(self, now_s: float) -> Any:
        """The plan of the next step."""

    def update(self, plan: Any, result: Any) -> object:
        """Take in the result of a plan."""


class Carrier(Protocol):
    """An executor."""

    def execute(self, plan: Any) -> Any:
        """Start a step."""

    def collect(self, handle: Any) -> Any:
        """Wait for its result."""


@dataclass(frozen=True, slots=True)
class CoreTimes:
    """Medians over `num_steps` steps in which each of `num_rows` rows computed one token, in microseconds."""

    num_rows: int
    num_steps: int
    schedule_us: float
    update_us: float
    executor_us: float
    """The executor's share, which is no part of the core's time."""

    @property
    def core_us(self) -> float:
        """The core's own time for one step."""
        return self.schedule_us + self.update_us


def time_core(
    make: Callable[[int], tuple[Steps, Carrier]],
    num_rows: int,
    *,
    num_steps: int = 200,
    between: Callable[[], object] | None = None,
) -> CoreTimes:
    """Time `num_steps` steps of `num_rows` decoding rows; `between` two steps runs what is not timed.

    `make(num_rows)` gives a scheduler with that many requests added (all of which fit at once and last for
    more than `num_steps` tokens) and its executor. Steps until all rows decode are not counted.
    """
    scheduler, executor = make(num_rows)
    times: list[tuple[float, float, float]] = []
    while len(times) < num_steps:
        if between is not None:
            between()
        begun = time.perf_counter()
        plan = scheduler.schedule(begun)
        planned = time.perf_counter()
        result = executor.collect(executor.execute(plan))
        computed = time.perf_counter()
        scheduler.update(plan, result)
        updated = time.perf_counter()
        if not plan.scheduled:
            raise ValueError(f"the requests ended after {len(times)} of {num_steps} steps")
        if len(plan.scheduled) == plan.num_tokens == num_rows:
            times.append((planned - begun, updated - computed, computed - planned))
    schedule_us, update_us, executor_us = (statistics.median(part) * 1e6 for part in zip(*times, strict=True))
    return CoreTimes(num_rows, num_steps, schedule_us, update_us, executor_us)
