"""Medians and ratios of measurements, with how they were made."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quire.bench.offline import Measurement

HOW = (
    "greedy, end of sequence ignored, token ids in and out; other ids in each repetition; a warm-up first; "
    "engines take turns within each repetition; medians"
)


def medians(runs: Sequence[Measurement]) -> dict[tuple[str, str], dict[str, float | None]]:
    """(workload, engine) -> median of each figure."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for run in runs:
        groups.setdefault((run.workload, run.engine), []).append(run)
    return {key: _median(group) for key, group in groups.items()}


def _median(group: Sequence[Measurement]) -> dict[str, float | None]:
    waits = [run.time_to_first_token_s for run in group if run.time_to_first_token_s is not None]
    return {
        "elapsed_time": statistics.median(run.elapsed_time for run in group),
        "requests_per_second": statistics.median(run.requests_per_second for run in group),
        "tokens_per_second": statistics.median(run.tokens_per_second for run in group),
        "output_tokens_per_second": statistics.median(run.output_tokens_per_second for run in group),
        "time_to_first_token_s": statistics.median(waits) if waits else None,
    }


def ratios(found: Mapping[tuple[str, str], Mapping[str, float | None]], ours: str) -> dict[tuple[str, str], float]:
    """(workload, other engine) -> how many times its output rate `ours` reaches."""
    result = {}
    for (workload, engine), figures in found.items():
        own, other = (
            found.get((workload, ours), {}).get("output_tokens_per_second"),
            figures["output_tokens_per_second"],
        )
        if engine != ours and own is not None and other:
            result[workload, engine] = own / other
    return result


def as_text(runs: Sequence[Measurement], machine: Mapping[str, str], ours: str) -> str:
    """A table for people."""
    found = medians(runs)
    speedups = ratios(found, ours)
    counts = {key: sum((run.workload, run.engine) == key for run in runs) for key in found}
    lines = [f"{name}: {value}" for name, value in machine.items()]
    lines += [
        HOW,
        "",
        f"{'':4} {'engine':<16} {'runs':>4} {'seconds':>9} {'out tok/s':>10} {'all tok/s':>10} {'TTFT s':>8}  ratio",
    ]
    for (workload, engine), figures in sorted(found.items()):
        wait = figures["time_to_first_token_s"]
        speedup = speedups.get((workload, engine))
        lines.append(
            f"{workload:4} {engine:<16} {counts[workload, engine]:>4} {figures['elapsed_time']:>9.3f} "
            f"{figures['output_tokens_per_second']:>10.1f} {figures['tokens_per_second']:>10.1f} "
            f"{'-' if wait is None else f'{wait:.3f}':>8}"
            + (f"  {ours} is {speedup:.2f} times this" if speedup is not None else "")
        )
    return "\n".join(lines)


def as_json(runs: Sequence[Measurement], machine: Mapping[str, str], ours: str) -> dict[str, Any]:
    """The same with every run, for programs."""
    found = medians(runs)
    return {
        "machine": dict(machine),
        "how": HOW,
        "runs": [run.as_dict() for run in runs],
        "medians": [{"workload": key[0], "engine": key[1], **figures} for key, figures in sorted(found.items())],
        "ratios": [
            {"workload": key[0], "engine": key[1], f"{ours}_over_it": value}
            for key, value in sorted(ratios(found, ours).items())
        ],
    }
