"""Rates over rows, beside their limits, as SVG: what a report needs, and no library for it.

python benchmarks/kernels.py --only gated_linear --json | python benchmarks/plot_kernels.py [OPERATION] > kernels.svg
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

COLOURS = ("#1f6fb4", "#d1495b", "#2a9d5c", "#8a5fbf", "#c98a1b")
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 250, 56, 34, 66

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """A line, and the limit of what it shows, dashed."""

    name: str
    points: Points
    limit: Points


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing."""

    title: str
    series: Sequence[Series]


def draw(panels: Sequence[Panel], x_label: str, y_label: str) -> str:
    """An SVG document with the panels side by side, all on the same axes.

    Raises:
        ValueError: there is nothing to draw, or something that has no logarithm.
    """
    values = [point for panel in panels for one in panel.series for point in (*one.points, *one.limit)]
    if not values or min(min(point) for point in values) <= 0:
        raise ValueError("a plot needs points above zero")
    axes = _Axes([x for x, _ in values], [y for _, y in values])
    names = list(dict.fromkeys(one.name for panel in panels for one in panel.series))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width = LEFT + len(panels) * (WIDTH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 76}" width="{width}" '
        'font-family="sans-serif" font-size="12" fill="none">',
        f'<rect width="{width}" height="{TOP + HEIGHT + 76}" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        parts.append(f'<g transform="translate({LEFT + i * (WIDTH + GAP)} {TOP})">')
        parts += axes.frame(panel.title, x_label, y_label)
        for one in panel.series:
            parts.append(axes.line(one.limit, colours[one.name], 'stroke-dasharray="4 4" opacity="0.6"'))
            parts.append(axes.line(one.points, colours[one.name], 'stroke-width="2"'))
        parts.append("</g>")
    for i, name in enumerate(names):
        x, y = LEFT + i * 110, TOP + HEIGHT + 60
        parts.append(f'<path d="M{x} {y}h24" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}" fill="#222">{escape(name)}</text>')
    parts.append(f'<text x="{LEFT + len(names) * 110}" y="{TOP + HEIGHT + 64}" fill="#222">dashed: the limit</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Axes:
    """From values to places in a panel."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.x_ticks = sorted(set(xs))
        low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
        self.y_ticks = [10.0**power for power in range(low, max(high, low + 1) + 1)]

    def place(self, x: float, y: float) -> str:
        """`x,y` in pixels."""
        across = _share(x, self.x_ticks) * WIDTH
        return f"{across:.1f},{(1 - _share(y, self.y_ticks)) * HEIGHT:.1f}"

    def line(self, points: Points, colour: str, style: str) -> str:
        """A polyline with a dot for each point."""
        return f'<polyline points="{" ".join(self.place(*point) for point in points)}" stroke="{colour}" {style}/>'

    def frame(self, title: str, x_label: str, y_label: str) -> list[str]:
        """Title, border, grid and numbers."""
        parts = [f'<text y="-12" fill="#222" font-weight="bold">{escape(title)}</text>']
        for x in self.x_ticks:
            across = self.place(x, self.y_ticks[0]).partition(",")[0]
            parts.append(f'<path d="M{across} 0V{HEIGHT}" stroke="#ddd"/>')
            parts.append(f'<text x="{across}" y="{HEIGHT + 16}" text-anchor="middle" fill="#222">{x:g}</text>')
        for y in self.y_ticks:
            down = self.place(self.x_ticks[0], y).partition(",")[2]
            parts.append(f'<path d="M0 {down}H{WIDTH}" stroke="#ddd"/>')
            parts.append(f'<text x="-6" y="{float(down) + 4:.1f}" text-anchor="end" fill="#222">{y:g}</text>')
        parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" stroke="#888"/>')
        parts.append(
            f'<text x="{WIDTH / 2}" y="{HEIGHT + 34}" text-anchor="middle" fill="#222">{escape(x_label)}</text>'
        )
        turned = f'transform="translate(-38 {HEIGHT / 2}) rotate(-90)" text-anchor="middle"'
        return [*parts, f'<text {turned} fill="#222">{escape(y_label)}</text>']


def _share(value: float, ticks: Sequence[float]) -> float:
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    return (math.log(value) - low) / (high - low) if high > low else 0.5


def panels(rates: Sequence[Mapping[str, Any]], operation: str) -> list[Panel]:
    """For each model: rows against TOP/s of one matrix, a line for each format, the limit of each beside it."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for one in rates:
        if one["operation"] == operation:
            found.setdefault(f"{one['model']}, {one['shape']}", {}).setdefault(one["format"], []).append(one)
    return [
        Panel(
            title=title,
            series=[
                Series(
                    name=name,
                    points=[(one["rows"], one["operations_per_s"] / 1e12) for one in ones],
                    limit=[(one["rows"], one["operations_per_s"] / one["of_limit"] / 1e12) for one in ones],
                )
                for name, ones in formats.items()
            ],
        )
        for title, formats in found.items()
    ]


def main() -> None:
    """The report of `kernels.py --json` in, the drawing out."""
    operation = sys.argv[1] if len(sys.argv) > 1 else "gated_linear"
    drawn = panels(json.load(sys.stdin)["rates"], operation)
    if not drawn:
        sys.exit(f"{operation} was not measured")
    print(draw(drawn, "rows", "TOP/s"), end="")


if __name__ == "__main__":
    main()
