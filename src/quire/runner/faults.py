"""One row's fault stays in that row.

State of rows is touched row by row, and what that raises fails the row. What is done for all rows at once changes no
state; when it raises, it is done again for each row alone: by the independence of rows the others get the very same
results, and the one at fault gets its error.
"""

import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from quire.core.plan import RowResult, ScheduledRow
from quire.errors import internal_fault_message

logger = logging.getLogger("quire.runner")
P = ParamSpec("P")
T = TypeVar("T")


class RowFaults:
    """The rows that failed, and the error that their requests get. Such a row is left alone until it is removed."""

    def __init__(self) -> None:
        self._errors: dict[int, str] = {}

    def remove(self, row: int) -> None:
        """The request of `row` has left."""
        self._errors.pop(row, None)

    def __bool__(self) -> bool:
        return bool(self._errors)

    def isolate(self, row: int, function: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `function`; what it raises fails `row`. A row that has failed is left alone."""
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

    def retry_rows_individually(
        self, work: Callable[[Sequence[ScheduledRow]], T], scheduled: Sequence[ScheduledRow]
    ) -> list[T]:
        """`[work(scheduled)]`; where that raises, what `work` gives for each row alone, and the others fail.

        Raises:
            Exception: it raises for each row of several: that is the engine's fault, and no row's.
        """
        if not scheduled:
            return []
        try:
            return [work(scheduled)]
        except Exception as error:
            logger.exception("a step failed: its rows are taken one by one")
            if len(scheduled) == 1:
                self._errors[scheduled[0].row] = internal_fault_message(error)
                return []
            found = []
            for item in scheduled:
                try:
                    found.append(work((item,)))
                except Exception as own:  # noqa: BLE001 -- the row's own; the step's was logged
                    self._errors[item.row] = internal_fault_message(own)
            if not found:
                raise
            return found
