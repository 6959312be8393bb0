"""The table of formats as a drawing: a row for each format, a bar for each figure."""

import math
import statistics
from collections.abc import Callable, Sequence

from quire.bench.bars_svg import Bars, Column, draw_bars
from quire.bench.eval_report import Row, Table

LEAST_KL = 1e-7
"""Where the bars of KL begin, which grow with its logarithm."""


def draw(tables: Sequence[Table], foot: Sequence[str]) -> str:
    """An SVG document, one table under the other; below them, how and where it was measured."""
    worst = max(abs(table.change(row)) for table in tables for row in table.rows)
    drawn = [
        Bars(
            table.title,
            f"reference: {table.reference}",
            [row.name for row in table.rows],
            _columns(table, worst),
            table.notes,
        )
        for table in tables
    ]
    return draw_bars(drawn, foot)


def _columns(table: Table, worst: float) -> list[Column]:
    def largest(value: Callable[[Row], float]) -> float:
        return max(map(value, table.rows))

    found = [_column(table, "memory", "bar", largest(table.memory), table.memory, "{:.0%}")]
    for workload in table.workloads:

        def speedup(row: Row, workload: str = workload) -> float:
            return statistics.median(table.speedups(row, workload))

        found.append(_column(table, f"speed, {workload}", "bar", largest(speedup), speedup, "{:.2f} x"))
    found.append(_column(table, "perplexity, change", "loss", worst, table.change, "{:+z.2%}"))

    def kl_share(row: Row) -> float:
        return math.log10(max(row.loss.mean_kl, LEAST_KL) / LEAST_KL) / -math.log10(LEAST_KL)

    cells = [(kl_share(row), f"{row.loss.mean_kl:.1e}") for row in table.rows]
    found.append(Column("KL, logarithmic", "loss", cells))
    return found


def _column(table: Table, head: str, kind: str, largest: float, value: Callable[[Row], float], form: str) -> Column:
    return Column(head, kind, [(value(row) / max(largest, 1e-9), form.format(value(row))) for row in table.rows])
