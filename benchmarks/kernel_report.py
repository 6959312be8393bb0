"""Measures every operation and format in legs of bounded time; writes the tables of KERNELS.md and its plot.

python benchmarks/kernel_report.py [SHARE]    # of the whole time, six minutes; 0.1 shows that it works
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPORT, PLOT = HERE / "KERNELS.md", HERE / "kernels.svg"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LEGS = (
    ("Gate and up with their activation", "gated_linear m135 m1b", "1 4 16 64 512", 55),
    ("The other GEMMs of a layer", "linear m135 m1b", "1 16 512", 60),
    ("GEMMs of 7B", "linear gated_linear 7b", "1 16 512", 110),
    ("Logits, and the greedy choice without them", "logits greedy", "1 16", 60),
    ("Attention, new tokens after those in the cache", "attention", "1", 20),
    ("The rest", "add_rms_norm activation_multiply sample", "1 16 512", 20),
)
"""Title, what `--only` takes, `--rows`, seconds within which a case may begin."""


def measure(only: str, rows: str, seconds: float) -> tuple[dict[str, Any], bool]:
    """The report of a leg, and whether it is whole.

    Raises:
        CalledProcessError: it failed.
    """
    flags = ["--only", *only.split(), "--rows", *rows.split(), "--seconds", str(seconds), "--json"]
    done = subprocess.run(
        [sys.executable, str(HERE / "kernels.py"), *flags], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout), "not all was measured" not in done.stderr


def table(title: str, report: Mapping[str, Any], whole: bool) -> list[str]:
    """A leg as text: the limits of its own minutes first."""
    limits = report["limits"]
    units = ", ".join(f"{unit} {value / 1e12:.2f}" for unit, value in limits["operations_per_s"].items())
    lines = [
        f"## {title}",
        "",
        f"Limits in this leg: streaming read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s; TOP/s: {units}."
        + ("" if whole else " The time ran out before all was measured."),
        "",
        "| model | operation | format | shape | rows | us | GB/s | TOP/s | of limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in report["rates"]:
        tops = f"{one['operations_per_s'] / 1e12:.3f}" if one["operations_per_s"] else ""
        lines.append(
            f"| {one['model']} | {one['operation']} | {one['format']} | {one['shape']} | {one['rows']} "
            f"| {one['seconds'] * 1e6:,.1f} | {one['bytes_per_s'] / 1e9:.2f} | {tops} "
            f"| {one['of_limit']:.0%} {one['bound']} |"
        )
    return [*lines, ""]


def text_of(legs: Sequence[tuple[str, Mapping[str, Any], bool]]) -> str:
    """What stands between the marks of KERNELS.md."""
    first = legs[0][1]
    facts = "; ".join(f"{name}: {value}" for name, value in first["machine"].items())
    lines = ["", f"{date.today().isoformat()}. {facts}.", "", f"How: {first['how']}.", ""]
    lines += ["![rows against TOP/s of gate and up, the limit of each format dashed](kernels.svg)", ""]
    for leg in legs:
        lines += table(*leg)
    return "\n".join(lines)


def main() -> None:
    """All legs, then the files."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    legs = []
    for title, only, rows, seconds in LEGS:
        legs.append((title, *measure(only, rows, seconds * share)))
        print(f"{title}: {len(legs[-1][1]['rates'])} cases", flush=True)
    plot = [sys.executable, str(HERE / "plot_kernels.py"), "gated_linear"]
    PLOT.write_text(
        subprocess.run(plot, input=json.dumps(legs[0][1]), capture_output=True, text=True, check=True).stdout
    )
    before, _, rest = REPORT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    REPORT.write_text(f"{before}{BEGIN}\n{text_of(legs)}{END}{after}")


if __name__ == "__main__":
    main()
