"""How long a step may take before the core counts as hung: learned from the steps that it has done."""

LEAST_SECONDS = 1.5
"""A shorter pause is never a hang: a machine under load can take that long to come back to a process."""
FIRST_SECONDS = 60.0
"""While no step has been seen."""
SLACK = 10.0


class StepAllowance:
    """Classes of steps by the power of two of their work, each with the longest duration seen.

    A class that was not seen is judged by the next smaller one, scaled as if time were in proportion to work (it
    grows more slowly, as the weights are read once a step).
    """

    def __init__(self) -> None:
        self._longest_s: dict[int, float] = {}

    def observe(self, work: float, seconds: float) -> None:
        """A step of so much work took so long."""
        size = int(work).bit_length()
        self._longest_s[size] = max(seconds, self._longest_s.get(size, 0.0))

    def seconds_for(self, work: float) -> float:
        """What the other side should wait for a step of so much work."""
        size = int(work).bit_length()
        known = [seen for seen in self._longest_s if seen <= size]
        if known:
            expected_s = max(self._longest_s[seen] for seen in known) * 2.0 ** (size - max(known))
        elif self._longest_s:
            expected_s = self._longest_s[min(self._longest_s)]
        else:
            return FIRST_SECONDS
        return max(LEAST_SECONDS, SLACK * expected_s)
