"""A workload run by several engines in turns, so that what disturbs one may disturb the others too."""

from collections.abc import Callable, Mapping, Sequence

from quire.bench.offline import Measurement, measure
from quire.bench.workloads import WORKLOADS, Item

Run = Callable[[Sequence[Item]], tuple[float, float | None]]
"""`quire.bench.offline.run_quire` of one engine."""


def take_turns(
    engines: Mapping[str, Run], workload: str, reps: int, vocab_size: int, show: Callable[[Measurement], None]
) -> list[Measurement]:
    """Every engine once in each repetition, first in one order, then in the other.

    Args:
        engines: by the name that their measurements have.
        show: called after each run.
    """
    runs: list[Measurement] = []
    for repetition in range(reps):
        items = WORKLOADS[workload](repetition, vocab_size)
        for name in list(engines)[:: -1 if repetition % 2 else 1]:
            runs.append(measure(name, workload, repetition, items, *engines[name](items)))
            show(runs[-1])
    return runs
