"""The table of formats as a drawing: a row for each format, a bar for each figure. No library, light and dark."""

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from quire.bench.eval_report import Row, Table

CHARACTER, COLUMN, BAR, LINE, TOP = 7, 170, 90, 24, 62
STYLE = (
    "text{font:12px sans-serif;fill:#222}.head{font-weight:bold}.small{font-size:11px;fill:#555}.bar{fill:#1f6fb4}"
    ".loss{fill:#c4432b}.page{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.small{fill:#a8a8a8}.bar{fill:#5aa9e6}.loss{fill:#f08a6c}"
    ".page{fill:#16181d}}"
)
LEAST_KL = 1e-7
"""Where the bars of KL begin, which grow with its logarithm."""


def draw(tables: Sequence[Table], foot: Sequence[str]) -> str:
    """An SVG document, one table under the other; below them, how and where it was measured."""
    parts, top, width = list[str](), 8, 0
    left = CHARACTER * max(len(row.name) for table in tables for row in table.rows) + 40
    worst = max(abs(table.change(row)) for table in tables for row in table.rows)
    for table in tables:
        columns = _columns(table, worst)
        width = max(width, left + COLUMN * len(columns))
        parts.append(f'<g transform="translate(12 {top})">')
        parts += [_text(0, 14, table.title, "head"), _text(0, 32, f"reference: {table.reference}", "small")]
        parts += [_text(left + COLUMN * place, 52, head, "small") for place, (head, *_) in enumerate(columns)]
        for index, row in enumerate(table.rows):
            y = TOP + LINE * index
            parts.append(_text(0, y + 13, row.name))
            for place, (_, kind, share, shown) in enumerate(columns):
                x, length = left + COLUMN * place, max(0.0, min(1.0, share(row))) * BAR
                parts.append(f'<rect class="{kind}" x="{x}" y="{y + 3}" width="{length:.1f}" height="13"/>')
                parts.append(_text(x + BAR + 6, y + 13, shown(row)))
        below = TOP + LINE * len(table.rows) + 12
        lines = _lines(table.notes, below, width)
        parts += [*lines, "</g>"]
        top += below + 16 * len(lines) + 16
    lines = _lines(foot, 12, width)
    parts += [f'<g transform="translate(12 {top})">', *lines, "</g>"]
    top += 16 * len(lines) + 12
    width += 24
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" height="{top}">'
    page = f'<rect class="page" width="{width}" height="{top}"/>'
    return "\n".join([begin, f"<style>{STYLE}</style>", page, *parts, "</svg>", ""])


Column = tuple[str, str, Callable[[Row], float], Callable[[Row], str]]
"""Heading, class of the bar, its share of the width, and the figure beside it."""


def _columns(table: Table, worst: float) -> list[Column]:
    def largest(value: Callable[[Row], float]) -> float:
        return max(map(value, table.rows))

    found = [_column("memory", "bar", largest(table.memory), table.memory, "{:.0%}")]
    for workload in table.workloads:

        def speedup(row: Row, workload: str = workload) -> float:
            return statistics.median(table.speedups(row, workload))

        found.append(_column(f"speed, {workload}", "bar", largest(speedup), speedup, "{:.2f} x"))
    found.append(_column("perplexity, change", "loss", worst, table.change, "{:+z.2%}"))

    def kl_share(row: Row) -> float:
        return math.log10(max(row.loss.mean_kl, LEAST_KL) / LEAST_KL) / -math.log10(LEAST_KL)

    found.append(("KL, logarithmic", "loss", kl_share, lambda row: f"{row.loss.mean_kl:.1e}"))
    return found


def _column(head: str, kind: str, largest: float, value: Callable[[Row], float], form: str) -> Column:
    return head, kind, lambda row: value(row) / max(largest, 1e-9), lambda row: form.format(value(row))


def _lines(texts: Sequence[str], top: int, width: int) -> list[str]:
    """Small print, wrapped."""
    wrapped = [line for text in texts for line in textwrap.wrap(text, width // 6)]
    return [_text(0, top + 16 * place, line, "small") for place, line in enumerate(wrapped)]


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{marked}>{escape(text)}</text>'
