"""What is printed and written of the verdicts."""

import json
from collections.abc import Sequence

from scripts.mutation.campaign import KILLED, Outcome, Verdict

FAILURES = (Outcome.SURVIVED, Outcome.INVALID)
"""What makes a run fail."""


def line_of(verdict: Verdict) -> str:
    """One line for a fault."""
    fault = verdict.fault
    line = f"{verdict.outcome.value:18} {fault.id} [{verdict.seconds:.1f} s] {verdict.failure}".rstrip()
    if verdict.outcome in KILLED and fault.survives is not None:
        line += " -- although it is argued that it survives"
    return line


def record_of(verdict: Verdict) -> str:
    """One line of JSON for a fault."""
    fault = verdict.fault
    return json.dumps(
        {
            "id": fault.id,
            "area": fault.area,
            "file": fault.file,
            "outcome": verdict.outcome.name.lower(),
            "seconds": round(verdict.seconds, 2),
            "failure": verdict.failure,
            "survives": fault.survives,
        }
    )


def summary_of(verdicts: Sequence[Verdict]) -> list[str]:
    """A table by area, then all that was not killed."""
    areas = sorted({verdict.fault.area for verdict in verdicts})
    lines = ["", f"{'area':14}{'seeded':>8}{'run':>6}{'killed':>8}{'%':>7}{'argued':>8}{'survived':>10}{'seconds':>9}"]
    lines += [_row(area, [verdict for verdict in verdicts if verdict.fault.area == area]) for area in areas]
    if len(areas) > 1:
        lines.append(_row("all", verdicts))
    for outcome in (*FAILURES, Outcome.ARGUED, Outcome.NOT_RUN):
        found = [verdict for verdict in verdicts if verdict.outcome is outcome]
        if found:
            lines += ["", f"{outcome.value}:", *(_explained(verdict) for verdict in found)]
    return lines


def _row(name: str, verdicts: Sequence[Verdict]) -> str:
    def count(*outcomes: Outcome) -> int:
        return sum(verdict.outcome in outcomes for verdict in verdicts)

    run = len(verdicts) - count(Outcome.NOT_RUN, Outcome.INVALID)
    killed = count(*KILLED)
    share = f"{100 * killed / run:.1f}" if run else "-"
    seconds = sum(verdict.seconds for verdict in verdicts)
    return (
        f"{name:14}{len(verdicts):>8}{run:>6}{killed:>8}{share:>7}{count(Outcome.ARGUED):>8}"
        f"{count(Outcome.SURVIVED):>10}{seconds:>9.0f}"
    )


def _explained(verdict: Verdict) -> str:
    fault = verdict.fault
    if verdict.outcome is Outcome.ARGUED:
        return f"  {fault.id}: {fault.survives}"
    if verdict.outcome is Outcome.INVALID:
        return f"  {fault.id}: {verdict.failure}"
    return f"  {fault.id}: {fault.file}: {' '.join(fault.new.split()) or '(deleted)'}"
