"""Two results of `quire bench serve` or `vllm bench serve` beside each other, with what chance may have made of them.

Requests are drawn again and again, with replacement, from those of each run (the bootstrap: Efron 1979): the middle
95 % of the ratios that come of it are the interval. It knows the spread within a run, and nothing of a machine that was
slower that day: run both in turns.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.engine.percentiles import percentile
from quire.errors import ConfigurationError

DRAWS = 2000
FIGURES: dict[str, tuple[str, float]] = {
    "TTFT mean ms": ("ttft", -1),
    "TTFT median ms": ("ttft", 50),
    "TTFT p99 ms": ("ttft", 99),
    "TPOT mean ms": ("tpot", -1),
    "TPOT median ms": ("tpot", 50),
    "TPOT p99 ms": ("tpot", 99),
}
"""Name -> of which values, and which percentile (-1: the mean)."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of two runs."""

    name: str
    first: float
    second: float
    low: float
    high: float
    """Of the ratio second / first: the middle 95 % of what chance may make of it."""

    @property
    def ratio(self) -> float:
        """Second over first."""
        return self.second / self.first if self.first else 0.0

    @property
    def is_certain(self) -> bool:
        """Whether 1 is outside of the interval."""
        return not self.low <= 1.0 <= self.high


def compare(first: dict[str, Any], second: dict[str, Any], seed: int = 0) -> list[Compared]:
    """The figures that both results have.

    Raises:
        ConfigurationError: a result lacks the times of its requests.
    """
    rng = random.Random(seed)
    runs = [_values(result) for result in (first, second)]
    found = []
    for name, (values, percent) in FIGURES.items():
        samples = [run[values] for run in runs]
        if not all(samples):
            continue
        figure = _figure(percent)
        ratios = sorted(_ratio(rng, samples, figure) for _ in range(DRAWS))
        low, high = percentile(ratios, 2.5), percentile(ratios, 97.5)
        found.append(Compared(name, figure(samples[0]) * 1e3, figure(samples[1]) * 1e3, low, high))
    return found


def _figure(percent: float) -> Callable[[Sequence[float]], float]:
    if percent < 0:
        return lambda values: sum(values) / len(values)
    return lambda values: percentile(values, percent)


def _ratio(rng: random.Random, samples: Sequence[list[float]], figure: Callable[[Sequence[float]], float]) -> float:
    before, after = (figure(rng.choices(values, k=len(values))) for values in samples)
    return after / before if before else 0.0


def _values(result: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of the requests that did not fail."""
    try:
        errors = result.get("errors") or [""] * len(result["ttfts"])
        rows = zip(result["ttfts"], result["itls"], result["output_lens"], errors, strict=True)
        kept = [
            (float(ttft), [float(gap) for gap in gaps], int(count)) for ttft, gaps, count, error in rows if not error
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = "a result lacks ttfts, itls or output_lens of each request: write it with --save-result --save-detailed"
        raise ConfigurationError(text, field="result") from error
    tpots = [sum(gaps) / (count - 1) for _, gaps, count in kept if count > 1]
    return {"ttft": [ttft for ttft, _, _ in kept], "tpot": tpots}
