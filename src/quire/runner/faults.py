"""One row's fault stays in that row.

State of rows is touched row by row, and what that raises fails the row. What is computed for all rows at once changes
no state; when it raises, it is computed again for each row alone: by the independence of rows the others get the very
same results, and the one at fault gets its error.
"""

import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec

from quire.core.plan import RowResult, ScheduledRow
from quire.errors import internal_fault_message

logger = logging.getLogger("quire.runner")
P = ParamSpec("P")
Compute = Callable[[Sequence[ScheduledRow]], list[RowResult]]


class RowFaults:
    """The rows that failed in one step, and what their requests are told."""

    def __init__(self) -> None:
        self._errors: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self._errors)

    def contain(self, row: int, function: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call; what it raises fails `row`. A row that has failed is left alone."""
        if row in self._errors:
            return
        try:
            function(*args, **kwargs)
        except Exception as error:
            logger.exception("a row failed in %s", getattr(function, "__name__", "its own work"))
            self._errors[row] = internal_fault_message(error)

    def result(self, row: int) -> RowResult | None:
        """The result of a row that failed."""
        error = self._errors.get(row)
        return None if error is None else RowResult(row, (), error=error)

    def without_failed(self, scheduled: Sequence[ScheduledRow]) -> Sequence[ScheduledRow]:
        """The rows that can still be computed."""
        return [item for item in scheduled if item.row not in self._errors] if self._errors else scheduled


def compute_apart_if_it_fails(compute: Compute, scheduled: Sequence[ScheduledRow]) -> list[RowResult]:
    """`compute(scheduled)`; where that raises, each row alone.

    Raises:
        Exception: no row of several can be computed: that is the engine's fault, and no row's.
    """
    if not scheduled:
        return []
    try:
        return compute(scheduled)
    except Exception as error:
        logger.exception("a step failed: its rows are computed one by one")
        if len(scheduled) == 1:
            return [RowResult(scheduled[0].row, (), error=internal_fault_message(error))]
        results = []
        for item in scheduled:
            try:
                results += compute((item,))
            except Exception as own:  # noqa: BLE001 -- the row's own; the step's was logged
                results.append(RowResult(item.row, (), error=internal_fault_message(own)))
        if all(result.error is not None for result in results):
            raise
        return results
