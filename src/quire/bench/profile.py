"""Where the time of a run went: operations that ran in native code, by number of rows, and what was none of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class OperationTime:
    """Of one operation, all calls with about as many rows. Counts only grow while a process lives."""

    operation: str
    max_rows: int | None
    """The most rows of the class; None for the last one."""
    calls: int
    rows: int
    """Of all calls together."""
    seconds: float
    weight_bytes: int
    operations_per_row: int
    """Multiplications and additions; 0 where they do not matter."""


def operation_times(counts: Iterable[tuple[str, int, int, int, int, int, int]]) -> list[OperationTime]:
    """From what the native side counts (`operation_counts` in `quire/ops/cpu.py`)."""
    return [
        OperationTime(name, bound or None, calls, rows, nanoseconds / 1e9, num_bytes, operations)
        for name, bound, calls, rows, nanoseconds, num_bytes, operations in counts
    ]


def between(before: Sequence[OperationTime], after: Sequence[OperationTime]) -> list[OperationTime]:
    """What was done after `before`, the longest first."""
    found = {(one.operation, one.max_rows): one for one in before}
    done = []
    for one in after:
        old = found.get((one.operation, one.max_rows))
        if old is not None:
            one = replace(one, calls=one.calls - old.calls, rows=one.rows - old.rows, seconds=one.seconds - old.seconds)
        if one.calls:
            done.append(one)
    return sorted(done, key=lambda one: -one.seconds)


def as_text(times: Sequence[OperationTime], elapsed_s: float) -> str:
    """A table for people; the last line is what no operation took."""
    head = f"{'operation':<34} {'rows':>7} {'calls':>7} {'seconds':>8} {'share':>6} {'us/call':>9}"
    lines = [f"{head} {'GB/s':>6} {'TOP/s':>6}", *(_line(one, elapsed_s) for one in times)]
    rest_s = elapsed_s - sum(one.seconds for one in times)
    lines.append(f"{'between operations (Python)':<34} {'':>7} {'':>7} {rest_s:>8.3f} {rest_s / elapsed_s:>6.1%}")
    return "\n".join(lines)


def _line(one: OperationTime, elapsed_s: float) -> str:
    rows = ">512" if one.max_rows is None else f"<={one.max_rows}"
    rates = ""
    if one.operations_per_row:
        rates = (
            f" {one.calls * one.weight_bytes / one.seconds / 1e9:>6.2f}"
            f" {one.rows * one.operations_per_row / one.seconds / 1e12:>6.3f}"
        )
    return (
        f"{one.operation:<34} {rows:>7} {one.calls:>7} {one.seconds:>8.3f} {one.seconds / elapsed_s:>6.1%} "
        f"{one.seconds / one.calls * 1e6:>9.1f}{rates}"
    )
