"""What one row's fault may touch: the row."""

from collections.abc import Sequence

import pytest

from quire.core.plan import RowResult, ScheduledRow
from quire.errors import internal_fault_message
from quire.runner.faults import RowFaults

ROWS = [ScheduledRow(row, 0, 1, (), True) for row in range(4)]
FAULT = RuntimeError("of the row")
ERROR = internal_fault_message(FAULT)


class Work:
    """Computes rows, but for those that raise."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken
        self.calls: list[list[int]] = []

    def __call__(self, scheduled: Sequence[ScheduledRow]) -> list[int]:
        rows = [item.row for item in scheduled]
        self.calls.append(rows)
        if not set(self.broken).isdisjoint(rows):
            raise FAULT
        return rows


def test_what_raises_fails_its_row_which_is_then_left_alone() -> None:
    faults, calls = RowFaults(), []

    def work(row: int, *, raises: Exception | None = None) -> None:
        calls.append(row)
        if raises is not None:
            raise raises

    faults.isolate(1, work, 1)
    assert not faults and faults.result(1) is None and faults.without_failed(ROWS) is ROWS
    faults.isolate(1, work, 1, raises=FAULT)
    faults.isolate(1, work, 1, raises=ValueError("a later one"))
    faults.isolate(2, work, 2)
    assert calls == [1, 1, 2]
    assert faults and faults.result(1) == RowResult(1, (), error=ERROR) and faults.result(2) is None
    assert faults.without_failed(ROWS) == [ROWS[0], *ROWS[2:]]
    faults.remove(1)
    faults.remove(1)
    faults.isolate(1, work, 1)
    assert not faults and calls == [1, 1, 2, 1]


def test_rows_are_computed_together_unless_that_fails() -> None:
    faults, work = RowFaults(), Work()
    assert faults.retry_rows_individually(work, ROWS) == [[0, 1, 2, 3]]
    assert faults.retry_rows_individually(work, []) == []
    assert work.calls == [[0, 1, 2, 3]] and not faults


@pytest.mark.parametrize("broken", [(0,), (3,), (1, 2), (0, 1, 3)])
def test_the_others_have_their_results(broken: tuple[int, ...]) -> None:
    faults, work = RowFaults(), Work(*broken)
    assert faults.retry_rows_individually(work, ROWS) == [[row] for row in range(4) if row not in broken]
    assert work.calls == [[0, 1, 2, 3], [0], [1], [2], [3]]
    for row in range(4):
        assert faults.result(row) == (RowResult(row, (), error=ERROR) if row in broken else None)


def test_a_row_alone_fails_alone() -> None:
    faults, work = RowFaults(), Work(2)
    assert faults.retry_rows_individually(work, ROWS[2:3]) == []
    assert work.calls == [[2]], "it is not computed again"
    assert faults.result(2) == RowResult(2, (), error=ERROR)


def test_what_fails_every_row_of_several_is_the_engines_fault() -> None:
    with pytest.raises(RuntimeError, match="of the row"):
        RowFaults().retry_rows_individually(Work(0, 1, 2, 3), ROWS)
