"""What `quire compare` prints: the table, what is not in it and why, and how the comparison was kept fair."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quire.bench.bars_svg import Bars, Column, draw_bars
from quire.bench.engine_turns import AGREED, STATES, Figures, Spread, Started, Turn, figures, yardstick

MIB = 2**20
OURS = "quire"


@dataclass(frozen=True, slots=True)
class Subject:
    """What was compared, on what."""

    model: str
    dtype: str
    weight_bytes: int
    workloads: Mapping[str, str]
    """Name -> what it is."""
    facts: Mapping[str, str]
    """The machine and the model, for people."""
    fairness: Sequence[tuple[str, str]]
    """Point -> how it was kept."""


def as_text(subject: Subject, turns: Sequence[Turn], started: Sequence[Started]) -> str:
    """For people."""
    found = figures(turns, started)
    lines = [f"{subject.model}, {subject.dtype}, {subject.weight_bytes / MIB:,.0f} MiB of weights", ""]
    width = max([24, *(len(one.name) for one in started)])
    for workload, text in subject.workloads.items():
        rows = {engine: one for (name, engine), one in found.items() if name == workload}
        if not rows:
            continue
        lines += [f"{workload}: {text}", *_table(rows, subject, width), ""]
    legend = (
        "Medians (least to most). * the most output. KV: reserved, not touched (of static batches: what one filled)."
    )
    if any(engine == OURS for _, engine in found):
        legend += f" 1.50x: {OURS} gives 1.50 times its output."
    lines += [legend, ""]
    lost = [one for one in started if one.state != "ran"]
    if lost:
        lines += ["Not in the table:", *(f"  {one.name}: {STATES[one.state]}: {one.reason}" for one in lost)]
        if any(one.state == "missing" for one in lost):
            lines.append(
                "  (--python NAME=PATH names the interpreter of one that has its own; of llama.cpp its llama-server)"
            )
        lines.append("")
    lines += ["How it was kept fair:", *(f"  {point}: {text}" for point, text in _points(subject, turns, started)), ""]
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in subject.facts.items())])


def _table(rows: Mapping[str, Figures], subject: Subject, width: int) -> list[str]:
    """Head and a line for each engine; without ours there is no ratio."""
    ours = rows.get(OURS)
    head = (
        f"{'engine':<{width}} {'runs':>4} {'out tok/s':>26} {'all tok/s':>10} {'TTFT p50 ms':>26} "
        f"{'TTFT p99 ms':>12} {'peak MiB':>9} {'over weights':>12} {'KV MiB':>8}"
    )
    lines = [head if ours is None else f"{head} {f'{OURS} / engine':>14}"]
    best = max(one.output_rate.median for one in rows.values())
    for engine, one in rows.items():
        ratio = "" if ours is None or one is ours else f"{ours.output_rate.median / one.output_rate.median:.2f}x"
        mark = " *" if one.output_rate.median == best else ""
        line = (
            f"{engine:<{width}} {one.runs:>4} {_spread(one.output_rate, 1):>26} {one.total_rate.median:>10.1f} "
            f"{_spread(one.ttft_s, 1e3):>26} {one.ttft_p99_s.median * 1e3:>12.1f} {_mib(one.peak_bytes):>9} "
            f"{_mib(over_weights(one, subject)):>12} {_mib(one.kv_bytes):>8}"
        )
        lines.append((line if ours is None else f"{line} {ratio:>14}").rstrip() + mark)
    return lines


def as_json(subject: Subject, turns: Sequence[Turn], started: Sequence[Started]) -> dict[str, Any]:
    """The same with every run, for programs."""
    found = figures(turns, started)
    return {
        "model": subject.model,
        "dtype": subject.dtype,
        "weight_bytes": subject.weight_bytes,
        "machine": dict(subject.facts),
        "workloads": dict(subject.workloads),
        "engines": [asdict(one) for one in started],
        "fairness": [{"point": point, "kept": text} for point, text in _points(subject, turns, started)],
        "agreement_with": yardstick(turns, started),
        "figures": [
            {"workload": key[0], "engine": key[1], **asdict(one), "over_weights_bytes": over_weights(one, subject)}
            for key, one in found.items()
        ],
        "runs": [
            {**turn.measured.as_dict(), "peak_bytes": turn.peak_bytes, "ttfts_s": list(turn.ran.ttfts_s)}
            for turn in turns
        ],
    }


def as_svg(subject: Subject, turns: Sequence[Turn], started: Sequence[Started]) -> str:
    """The table as bars."""
    found, tables = figures(turns, started), []
    for workload, text in subject.workloads.items():
        rows = {engine: one for (name, engine), one in found.items() if name == workload}
        if rows:
            tables.append(
                Bars(f"{subject.model}, {workload}", text, list(rows), _columns(list(rows.values()), subject))
            )
    foot = [f"{point}: {kept}" for point, kept in _points(subject, turns, started)]
    return draw_bars(tables, [*foot, "; ".join(f"{name}: {value}" for name, value in subject.facts.items())])


def over_weights(one: Figures, subject: Subject) -> int | None:
    """Peak memory without the weights: interpreter, libraries, KV cache, activations."""
    return None if one.peak_bytes is None else max(0, one.peak_bytes - subject.weight_bytes)


def _columns(rows: Sequence[Figures], subject: Subject) -> list[Column]:
    rates = [one.output_rate.median for one in rows]
    waits = [one.ttft_s.median * 1e3 for one in rows]
    peaks = [(over_weights(one, subject) or 0) / MIB for one in rows]
    return [
        Column("output tok/s", "bar", [(value / max(rates), f"{value:,.1f}") for value in rates]),
        Column("TTFT p50, ms", "loss", [(value / max(waits), f"{value:,.0f}") for value in waits]),
        Column("MiB over weights", "loss", [(value / max([*peaks, 1]), f"{value:,.0f}") for value in peaks]),
    ]


def _points(subject: Subject, turns: Sequence[Turn], started: Sequence[Started]) -> list[tuple[str, str]]:
    """The checklist: what is common, then each engine's own."""
    points, found, first = list(subject.fairness), figures(turns, started), yardstick(turns, started)
    for one in started:
        if one.state != "ran":
            continue
        versions = ", ".join(f"{name} {version}" for name, version in one.facts.versions.items()) or "version not told"
        flags = ", ".join(f"{name}={value}" for name, value in one.facts.settings.items())
        filled = [figure.kv_bytes for (_, engine), figure in found.items() if engine == one.name and figure.kv_bytes]
        kv = f"without a bound, at most {_mib(max(filled))} MiB were filled" if filled else "not told"
        kv = f"{_mib(one.facts.kv_bytes)} MiB" if one.facts.kv_bytes else kv
        agree = [figure.agreeing for (_, engine), figure in found.items() if engine == one.name and figure.agreeing]
        text = f"{versions}; {flags}; KV cache {kv}; start and warm-up {one.start_s:.1f} s"
        if agree:
            same, of = sum(pair[0] for pair in agree), sum(pair[1] for pair in agree)
            text += f"; first {AGREED} tokens as {first}'s in {same} of {of} outputs"
        points.append((one.name, text))
    return points


def _spread(one: Spread, scale: float) -> str:
    return f"{one.median * scale:,.1f} ({one.least * scale:,.1f} to {one.most * scale:,.1f})"


def _mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MIB:,.0f}"
