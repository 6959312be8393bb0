"""scripts/check: run the checks, one line of result each; exit 1 on a breach."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scripts.house.budgets import check_budgets, lines_by_folder
from scripts.house.core_start import check_core_start
from scripts.house.docstrings import check_docstrings
from scripts.house.forbidden import check_forbidden
from scripts.house.imports import check_imports
from scripts.house.names import check_names
from scripts.house.size import check_size
from scripts.house.tree import ROOT, Report
from scripts.house.words import check_words

GENERATED = ("api_pages", "compatibility_page", "reference_pages")
"""Modules of scripts that write pages of docs/ from the code."""
LINTED = [name for name in ("src", "tests", "scripts", "examples", "benchmarks") if (ROOT / name).is_dir()]


def _tool(*commands: list[str]) -> Callable[[Path], Report]:
    """A check that runs modules of the test environment: what they print is the breach."""

    def check(root: Path) -> Report:
        breaches = []
        last = ""
        for command in commands:
            done = subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True, text=True)
            output = (done.stdout + done.stderr).strip()
            last = output.splitlines()[-1] if output else ""
            if done.returncode:
                breaches.append(f"{' '.join(command)}\n{output}")
        return Report(last, breaches)

    return check


CHECKS: dict[str, tuple[str, Callable[[Path], Report]]] = {
    "lint": ("ruff", _tool(["ruff", "check", "-q", *LINTED], ["ruff", "format", "--check", *LINTED])),
    "types": ("mypy --strict", _tool(["mypy"])),
    "imports": ("who may import whom", check_imports),
    "start": ("what importing the core loads", check_core_start),
    "budgets": ("lines, fields, variables", check_budgets),
    "docstrings": ("shapes, exceptions, more than three words", check_docstrings),
    "pages": ("the generated pages are fresh", _tool(*([f"scripts.{page}", "--check"] for page in GENERATED))),
    "names": ("the public names", check_names),
    "forbidden": ("code-running data, foreign places", check_forbidden),
    "words": ("the field's words", check_words),
    "size": ("the base install", check_size),
}


def main() -> int:
    """Run the chosen checks in order; all of them, and the lines by folder, when none is named."""
    parser = argparse.ArgumentParser(
        prog="scripts/check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check the laws of the house.",
        epilog="\n".join(f"  {name:10} {title}" for name, (title, _) in CHECKS.items()),
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="one of those below; default: all")
    chosen = parser.parse_args().checks
    for name in chosen:
        if name not in CHECKS:
            parser.error(f"no check is called {name}: choose from {', '.join(CHECKS)}")
    failed = [name for name in chosen or CHECKS if not _passes(name)]
    if not chosen:
        _print_lines()
    if failed:
        print(f"scripts/check: failed: {' '.join(failed)}")
    return 1 if failed else 0


def _passes(name: str) -> bool:
    start = time.perf_counter()
    try:
        report = CHECKS[name][1](ROOT)
    except (SyntaxError, ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        report = Report("could not be done", [f"{type(error).__name__}: {error}"])
    word = "FAIL" if report.breaches else "ok"
    print(f"{word:4} {name:10} {report.summary} [{time.perf_counter() - start:.1f} s]", flush=True)
    for breach in report.breaches:
        print("    ", breach.replace("\n", "\n      "), flush=True)
    return not report.breaches


def _print_lines() -> None:
    print(f"\n{'lines by folder':28}{'files':>7}{'lines':>8}")
    for folder, files, lines in lines_by_folder(ROOT):
        print(f"{folder:28}{files:7}{lines:8}")


if __name__ == "__main__":
    sys.exit(main())
