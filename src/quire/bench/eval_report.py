"""The table of formats, as text and for programs: memory, speed, loss, and how each was measured."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.bench.eval_loss import Loss

LOSS = (
    "loss: against the reference on the same tokens, teacher-forced; KL(reference || format) in nats over the whole "
    "vocabulary, in float64; perplexity beside the reference's; same: how often the most probable token is its own"
)
MEMORY = "memory: of the weights once packed; 100 % and 1.00 x are the first row"
SPEED = (
    "speed: greedy output tokens/s, end of sequence ignored, a warm-up first, formats in turns; medians (lowest to "
    "highest), and the median of each turn's ratio to the first row"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One model in one format."""

    name: str
    weight_bytes: int
    loss: Loss
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Workload -> output tokens/s of each repetition."""


@dataclass(frozen=True, slots=True)
class Table:
    """All that was measured in one run against one reference."""

    title: str
    reference: str
    exact: Loss
    """The reference's own."""
    text: str
    """Which it was, and how it was cut."""
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    """What must be read beside the figures."""

    @property
    def workloads(self) -> list[str]:
        """Those that were timed."""
        return list(self.rows[0].rates)

    def memory(self, row: Row) -> float:
        """Share of the first row's weights."""
        return row.weight_bytes / self.rows[0].weight_bytes

    def change(self, row: Row) -> float:
        """Of the perplexity, against the reference's."""
        return row.loss.perplexity / self.exact.perplexity - 1

    def speedups(self, row: Row, workload: str) -> list[float]:
        """Over the first row, in each repetition."""
        return [one / base for one, base in zip(row.rates[workload], self.rows[0].rates[workload], strict=True)]


def cells(table: Table) -> list[list[str]]:
    """Headings, then a line for each row."""
    head = ["format", "memory", "", *(name for one in table.workloads for name in (f"{one} tok/s", "speed"))]
    lines = [[*head, "perplexity", "change", "KL mean", "KL p99", "same"]]
    for row in table.rows:
        loss, speeds = row.loss, list[str]()
        for workload in table.workloads:
            rates, ratios = row.rates[workload], table.speedups(row, workload)
            speeds += [f"{statistics.median(rates):,.1f} ({min(rates):,.1f} to {max(rates):,.1f})"]
            speeds += [f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"]
        memory = [f"{row.weight_bytes / 2**20:,.1f} MiB", f"{table.memory(row):.0%}"]
        figures = [f"{loss.perplexity:.3f}", f"{table.change(row):+z.2%}", f"{loss.mean_kl:.1e}", f"{loss.p99_kl:.1e}"]
        lines.append([row.name, *memory, *speeds, *figures, f"{loss.agreement:.1%}"])
    return lines


def as_text(table: Table) -> str:
    """For people."""
    lines = cells(table)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ((text.ljust, text.rjust)[place > 0](widths[place]) for line in lines for place, text in enumerate(line))
    shown = list(aligned)
    size = len(widths)
    return "\n".join(
        [
            table.title,
            f"reference: {table.reference}, perplexity {table.exact.perplexity:.3f}",
            f"text: {table.text}",
            "",
            *("  ".join(shown[first : first + size]).rstrip() for first in range(0, len(shown), size)),
            *(f"\n{note}" for note in table.notes),
        ]
    )


def how(tables: Sequence[Table]) -> list[str]:
    """What the figures are."""
    return [LOSS, MEMORY, *([SPEED] if any(table.workloads for table in tables) else [])]


def as_json(tables: Sequence[Table], machine: Mapping[str, str]) -> dict[str, Any]:
    """The same with every run, for programs."""
    return {"machine": dict(machine), "how": how(tables), "tables": [_table(table) for table in tables]}


def _table(table: Table) -> dict[str, Any]:
    exact = {"name": table.reference, "perplexity": table.exact.perplexity}
    rows = [
        {
            "format": row.name,
            "weight_bytes": row.weight_bytes,
            "memory_ratio": table.memory(row),
            "speed": {
                workload: {
                    "output_tokens_per_second": list(row.rates[workload]),
                    "median": statistics.median(row.rates[workload]),
                    "speedup": statistics.median(table.speedups(row, workload)),
                }
                for workload in table.workloads
            },
            "perplexity": row.loss.perplexity,
            "perplexity_change": table.change(row),
            "mean_kl": row.loss.mean_kl,
            "p99_kl": row.loss.p99_kl,
            "same_token": row.loss.agreement,
        }
        for row in table.rows
    ]
    predicted = table.exact.num_tokens
    return {
        "title": table.title,
        "reference": exact,
        "text": table.text,
        "predicted_tokens": predicted,
        "rows": rows,
        "notes": list(table.notes),
    }
