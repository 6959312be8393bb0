"""The rate of each operation beside what this machine allows: its memory's streaming read and its units' GEMMs.

Who calls makes the cases (this folder may not import the operations); here they are timed and compared.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HOW = (
    "medians of single calls, each on another copy of weights and cache where these are small, so that they come from "
    "memory; limits: the best of several rounds with all threads, GEMMs of tiles or vectors loaded from the L1; "
    "of limit: the shortest time that bytes and arithmetic allow, over the time taken"
)
CALL_SECONDS = 0.06
FEWEST_CALLS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape. `run(turn)` does it once, with the copy of turn `turn`."""

    operation: str
    format: str
    model: str
    shape: str
    rows: int
    num_bytes: int
    """What must be read and written once."""
    num_operations: int
    """Multiplications and additions; 0 where they do not matter."""
    unit: str | None
    """The limit that its arithmetic has; None where no probe states it."""
    run: Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do, all threads together."""

    read_bytes_per_s: float
    operations_per_s: Mapping[str, float]
    """By unit; one that the processor has not is absent."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A case with its time."""

    operation: str
    format: str
    model: str
    shape: str
    rows: int
    seconds: float
    bytes_per_s: float
    operations_per_s: float
    limit_seconds: float
    """The shortest time that the limits allow."""
    bound: str
    """What sets it: memory, or the unit."""

    @property
    def of_limit(self) -> float:
        """1 is as fast as the machine can."""
        return self.limit_seconds / self.seconds


def time_case(case: Case) -> float:
    """Seconds of one call: a median, after a call that is not counted."""
    case.run(0)
    times: list[float] = []
    end = time.perf_counter() + CALL_SECONDS
    while len(times) < FEWEST_CALLS or time.perf_counter() < end:
        begun = time.perf_counter()
        case.run(len(times) + 1)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def rate(case: Case, seconds: float, limits: Limits) -> Rate:
    """A time beside the limits."""
    memory_s = case.num_bytes / limits.read_bytes_per_s
    peak = limits.operations_per_s.get(case.unit) if case.unit is not None else None
    arithmetic_s = case.num_operations / peak if peak else 0.0
    return Rate(
        operation=case.operation,
        format=case.format,
        model=case.model,
        shape=case.shape,
        rows=case.rows,
        seconds=seconds,
        bytes_per_s=case.num_bytes / seconds,
        operations_per_s=case.num_operations / seconds,
        limit_seconds=max(memory_s, arithmetic_s),
        bound="memory" if memory_s >= arithmetic_s else str(case.unit),
    )


def time_cases(cases: Iterable[Case], seconds: float) -> tuple[list[tuple[Case, float]], bool]:
    """Times of all cases, or of the first and those that were begun within `seconds`; whether these are all."""
    end = time.perf_counter() + seconds
    found: list[tuple[Case, float]] = []
    for case in cases:
        if found and time.perf_counter() > end:
            return found, False
        found.append((case, time_case(case)))
    return found, True


def as_text(rates: Sequence[Rate], limits: Limits, machine: Mapping[str, str]) -> str:
    """A table for people."""
    lines = [f"{name}: {value}" for name, value in machine.items()]
    lines.append(f"limits: streaming read {limits.read_bytes_per_s / 1e9:.1f} GB/s" + "".join(
        f", {unit} {value / 1e12:.2f} TOP/s" for unit, value in limits.operations_per_s.items()))  # fmt: skip
    lines += [HOW, ""]
    head = f"{'operation':<16} {'format':<10} {'model':<6} {'shape':<16} {'rows':>5} {'us':>10}"
    lines.append(f"{head} {'GB/s':>7} {'TOP/s':>7}  of limit")
    for one in rates:
        rate = f"{one.operations_per_s / 1e12:7.3f}" if one.operations_per_s else f"{'-':>7}"
        lines.append(
            f"{one.operation:<16} {one.format:<10} {one.model:<6} {one.shape:<16} {one.rows:>5} "
            f"{one.seconds * 1e6:>10.1f} {one.bytes_per_s / 1e9:>7.2f} {rate}  {one.of_limit:6.0%} {one.bound}"
        )
    return "\n".join(lines)


def as_json(rates: Sequence[Rate], limits: Limits, machine: Mapping[str, str]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "machine": dict(machine),
        "how": HOW,
        "limits": asdict(limits),
        "rates": [asdict(one) | {"of_limit": one.of_limit} for one in rates],
    }
