"""How long a step may take before the core counts as hung: learned from the steps that it has done."""

import math

LEAST_SECONDS = 1.5
"""A shorter pause is never a hang: a machine under load can take that long to come back to a process."""
FIRST_SECONDS = 60.0
"""While no step has been seen, on a device: it may compile first. No first step is waited for longer."""
SLACK = 10.0
SLOWEST_BYTES_PER_S = 2e8
SLOWEST_FLOPS = 2e10
"""Of a machine that a model is served on: what its disk and its processors do at the least."""


class StepAllowance:
    """Classes of steps by the power of two of their work, each with the longest duration seen.

    A class that was not seen is judged by the next smaller one, scaled as if time were in proportion to work (it
    grows more slowly, as the weights are read once a step).

    Args:
        host_weight_bytes: of a model that this machine's processors compute: while no step was seen, the slowest
            machine is the measure, with four operations for each weight of two bytes. None: a device computes.
        hang_timeout_s: what to wait for every step, instead of all this.
    """

    def __init__(self, host_weight_bytes: int | None = None, hang_timeout_s: float | None = None) -> None:
        self._longest_s: dict[int, float] = {}
        self._host_weight_bytes = host_weight_bytes
        self._hang_timeout_s = hang_timeout_s

    @property
    def idle_timeout_s(self) -> float:
        """How long all threads of the process may be idle during a step."""
        return math.inf if self._host_weight_bytes is None or self._hang_timeout_s is not None else LEAST_SECONDS

    def observe(self, work: float, seconds: float) -> None:
        """A step of so much work took so long."""
        size = int(work).bit_length()
        self._longest_s[size] = max(seconds, self._longest_s.get(size, 0.0))

    def seconds_for(self, work: float) -> float:
        """What the other side should wait for a step of so much work: tokens, each by its distance from the first."""
        if self._hang_timeout_s is not None:
            return self._hang_timeout_s
        size = int(work).bit_length()
        known = [seen for seen in self._longest_s if seen <= size]
        if known:
            expected_s = max(self._longest_s[seen] for seen in known) * 2.0 ** (size - max(known))
        elif self._longest_s:
            expected_s = self._longest_s[min(self._longest_s)]
        else:
            return max(LEAST_SECONDS, min(FIRST_SECONDS, self._first_seconds(work)))
        return max(LEAST_SECONDS, SLACK * expected_s)

    def _first_seconds(self, work: float) -> float:
        size = self._host_weight_bytes
        return math.inf if size is None else size / SLOWEST_BYTES_PER_S + 2 * size * work / SLOWEST_FLOPS
