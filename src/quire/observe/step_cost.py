"""How long a step takes, by what is in it: a straight line through the steps of a recording.

    seconds = fixed + token * tokens + row * rows that sample + context * (tokens computed x tokens they look at)

The weights are read once a step (`fixed`), each token is multiplied by them (`token`), each row that samples takes
the head (`row`), attention reads what came before (`context`). Fitted by least squares; a coefficient that would be
negative is left out.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quire.core.plan import ScheduledRow
from quire.errors import ConfigurationError
from quire.observe.replay import Session

LEAST_STEPS = 8
"""To fit a line to."""
Features = tuple[float, float, float, float]
Sample = tuple[Features, float]
"""Features of a step, and its seconds."""
_SOFTENING = 1e-9
LEAST_SHARE = 1e-6
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds; see above."""

    fixed: float
    token: float
    row: float = 0.0
    context: float = 0.0

    def seconds(self, scheduled: Iterable[ScheduledRow]) -> float:
        """Of a step with these rows."""
        parts = features(scheduled)
        return sum(c * x for c, x in zip((self.fixed, self.token, self.row, self.context), parts, strict=True))


def features(scheduled: Iterable[ScheduledRow]) -> Features:
    """One, tokens, rows that sample, and pairs of tokens for attention."""
    tokens = rows = pairs = 0.0
    for _, start, num, _, samples in scheduled:
        tokens += num
        rows += samples
        pairs += num * (start + (num + 1) / 2)
    return 1.0, tokens, rows, pairs


def fit(sessions: Sequence[Session]) -> tuple[StepCost, float]:
    """The cost of the steps of a recording, and the median of its relative error on them.

    Raises:
        ConfigurationError: there are too few steps.
    """
    samples = [sample for session in sessions for sample in _samples(session)]
    if len(samples) < LEAST_STEPS:
        text = f"has {len(samples)} steps with a known time; a cost is fitted to {LEAST_STEPS} or more"
        raise ConfigurationError(f"the recording {text}", field="recording")
    kept = _usual(samples)
    cost = line_through(kept)
    errors = [
        abs(cost.fixed * p[0] + cost.token * p[1] + cost.row * p[2] + cost.context * p[3] - s) / s for p, s in kept
    ]
    return cost, statistics.median(errors)


def line_through(samples: Sequence[Sample]) -> StepCost:
    """The cost of steps, of which some are known."""
    return StepCost(*_least_squares(_usual(samples)))


def _usual(samples: Sequence[Sample]) -> list[Sample]:
    """Without the slowest, in which the machine did something else."""
    usual = statistics.median(seconds / sum(parts[:2]) for parts, seconds in samples)
    return [one for one in samples if one[1] / sum(one[0][:2]) <= 20 * usual]


def _samples(session: Session) -> list[Sample]:
    """Of each step, its features and the seconds until the next one could begin."""
    found = list[Sample]()
    begun: dict[int, tuple[float, Features]] = {}
    waits: tuple[Features, float, float] | None = None
    """A step whose result is there: features, when it began, when it ended."""
    num_open = 0
    for event in session.events:
        kind = event[0]
        if kind == "add":
            num_open += 1
        elif kind == "end":
            num_open -= 1
            if num_open == 0 and waits is not None:
                found.append((waits[0], waits[2] - waits[1]))
                waits = None
        elif kind == "plan":
            if waits is not None:
                found.append((waits[0], event[2] - waits[1]))
                waits = None
            if event[5]:
                begun[event[1]] = event[2], features(ScheduledRow(*row) for row in event[5])
        elif kind == "result" and event[1] in begun:
            start_s, parts = begun.pop(event[1])
            waits = parts, start_s, event[2]
        elif kind == "clear":
            begun.clear()
            waits = None
    return [(parts, seconds) for parts, seconds in found if seconds > 0]


def _least_squares(samples: Sequence[Sample]) -> list[float]:
    """Coefficients that are not negative. Each step counts by the inverse of what it should take: the sum of all is
    then right, whatever delays some. One that should take nothing at all counts by a small part of what it took."""
    coefficients = [0.0] * 4
    weights = [seconds for _, seconds in samples]
    for _ in range(ROUNDS):
        coefficients = _weighted(samples, weights)
        weights = [
            max(sum(c * x for c, x in zip(coefficients, parts, strict=True)), LEAST_SHARE * seconds)
            for parts, seconds in samples
        ]
    return coefficients


def _weighted(samples: Sequence[Sample], weights: Sequence[float]) -> list[float]:
    used = [column for column in range(4) if any(parts[column] for parts, _ in samples)]
    while True:
        scales = {c: max(parts[c] / weight for (parts, _), weight in zip(samples, weights, strict=True)) for c in used}
        lines = [
            ([parts[c] / weight / scales[c] for c in used], seconds / weight)
            for (parts, seconds), weight in zip(samples, weights, strict=True)
        ]
        solved = _solve(
            [
                [
                    sum(line[i] * line[j] for line, _ in lines) + (_SOFTENING * len(lines) if i == j else 0.0)
                    for j in range(len(used))
                ]
                + [sum(line[i] * target for line, target in lines)]
                for i in range(len(used))
            ]
        )
        worst = min(range(len(used)), key=solved.__getitem__)
        if solved[worst] >= 0 or len(used) == 1:
            found = dict(zip(used, solved, strict=True))
            return [max(0.0, found.get(c, 0.0)) / scales.get(c, 1.0) for c in range(4)]
        del used[worst]


def _solve(matrix: list[list[float]]) -> list[float]:
    """Gauss, with the largest pivot; the right side is the last column."""
    size = len(matrix)
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(matrix[i][column]))
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        for i in range(size):
            if i != column:
                factor = matrix[i][column] / matrix[column][column]
                matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[column], strict=True)]
    return [matrix[i][size] / matrix[i][i] for i in range(size)]
