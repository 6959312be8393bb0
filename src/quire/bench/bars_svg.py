"""Tables as drawings: a row for each thing, a bar for each figure. No library, light and dark."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

CHARACTER, COLUMN, BAR, LINE, TOP = 7, 170, 90, 24, 62
STYLE = (
    "text{font:12px sans-serif;fill:#222}.head{font-weight:bold}.small{font-size:11px;fill:#555}.bar{fill:#1f6fb4}"
    ".loss{fill:#c4432b}.page{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.small{fill:#a8a8a8}.bar{fill:#5aa9e6}.loss{fill:#f08a6c}"
    ".page{fill:#16181d}}"
)


@dataclass(frozen=True, slots=True)
class Column:
    """Bars, a row each."""

    head: str
    kind: str
    """Class of the bars: bar (more is better), loss (less is)."""
    cells: Sequence[tuple[float, str]]
    """Share of the width in [0, 1], and the figure beside the bar."""


@dataclass(frozen=True, slots=True)
class Bars:
    """A table."""

    title: str
    subtitle: str
    rows: Sequence[str]
    columns: Sequence[Column]
    notes: Sequence[str] = ()


def draw_bars(tables: Sequence[Bars], foot: Sequence[str]) -> str:
    """An SVG document, one table under the other; below them, how and where it was measured."""
    parts, top, width = list[str](), 8, 0
    left = CHARACTER * max(len(row) for table in tables for row in table.rows) + 40
    for table in tables:
        width = max(width, left + COLUMN * len(table.columns))
        parts.append(f'<g transform="translate(12 {top})">')
        parts += [_text(0, 14, table.title, "head"), _text(0, 32, table.subtitle, "small")]
        parts += [_text(left + COLUMN * place, 52, one.head, "small") for place, one in enumerate(table.columns)]
        for index, name in enumerate(table.rows):
            y = TOP + LINE * index
            parts.append(_text(0, y + 13, name))
            for place, column in enumerate(table.columns):
                share, shown = column.cells[index]
                x, length = left + COLUMN * place, max(0.0, min(1.0, share)) * BAR
                parts.append(f'<rect class="{column.kind}" x="{x}" y="{y + 3}" width="{length:.1f}" height="13"/>')
                parts.append(_text(x + BAR + 6, y + 13, shown))
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


def _lines(texts: Sequence[str], top: int, width: int) -> list[str]:
    """Small print, wrapped."""
    wrapped = [line for text in texts for line in textwrap.wrap(text, width // 6)]
    return [_text(0, top + 16 * place, line, "small") for place, line in enumerate(wrapped)]


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{marked}>{escape(text)}</text>'
