"""`quire course`: the exercises of the course; they are begun, and checked."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quire.cli.arguments import Parser
from quire.cli.chat_terminal import CONTROL
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.course.process import Verdict

EXAMPLES = """examples:
  quire course list
  quire course start 2.1
  quire course check 2.1

`start` writes a file with the rules and nothing done; `check` runs it in a process of its own, bounded in time and
memory, and says what holds. The process has your rights: check files that you trust. Exit codes: 0 all checks passed,
1 some failed, 2 wrong usage."""
MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    actions.add_parser("list", help="the exercises, by section of the course", allow_abbrev=False)
    start = actions.add_parser("start", help="write a file to fill in", allow_abbrev=False)
    start.add_argument("section", metavar="SECTION", help="of the course: 2.1")
    start.add_argument("folder", metavar="DIR", nargs="?", default=".", help="where to (default: here)")
    check = actions.add_parser("check", help="check a file", allow_abbrev=False)
    check.add_argument("section", metavar="SECTION", help="of the course: 2.1")
    check.add_argument("file", metavar="FILE", nargs="?", help="default: what start writes, here")
    check.add_argument(
        "--timeout", type=float, default=20.0, metavar="S", help="seconds that a check may take (default: 20)"
    )
    check.add_argument("--recording", metavar="FILE", help="2.2: of quire serve --record; its requests are tried, too")


def run(options: argparse.Namespace) -> int:
    """List, start or check."""
    from quire.course.exercises import EXERCISES, find

    if options.action == "list":
        for one in EXERCISES.values():
            print(f"{one.section}  {one.title:22}{one.file_name:20}{one.skeleton}")
        return 0
    exercise = find(options.section)
    if options.action == "start":
        return _start(exercise.skeleton, Path(options.folder) / exercise.file_name, exercise.section)
    path = Path(options.file or exercise.file_name)
    if not path.is_file():
        advice = "" if options.file else f"; `quire course start {exercise.section}` writes it"
        raise ConfigurationError(f"there is no file {path}{advice}", field="file")
    if not 0 < options.timeout <= 3600:
        raise ConfigurationError(f"timeout must be above 0 and at most 3600, got {options.timeout:g}", field="timeout")
    if options.recording is not None:
        _require_recording(options.recording, exercise.section)
    from quire.course.process import CheckedFile

    checked = CheckedFile(exercise, path, options.timeout, options.recording and Path(options.recording))
    failed = sum(_tell(verdict) for verdict in checked.verdicts())
    if checked.printed:
        print("the file printed:", *map(_harmless, checked.printed), sep="\n  ")
    return 1 if failed else 0


def _require_recording(path: str, section: str) -> None:
    if section != "2.2":
        raise ConfigurationError(f"recording is for exercise 2.2, not for {section}", field="recording")
    from quire.course.checks.scheduler import recorded

    recorded(path)  # it says what is wrong with the file


def _start(skeleton: Path, path: Path, section: str) -> int:
    if not path.parent.is_dir():
        raise ConfigurationError(f"there is no folder {path.parent}", field="folder")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(skeleton.read_text(encoding="utf-8"))
    except FileExistsError:
        print(f"quire: {path} is there already, and stays as it is", file=sys.stderr)
        return 1
    print(f"wrote {path}; check it with: quire course check {section} {path}")
    return 0


def _harmless(text: str) -> str:
    """Text of a learner's file, without what would command the terminal or cannot be written."""
    return text.translate(CONTROL).encode(errors="replace").decode()


def _tell(verdict: "Verdict") -> bool:
    """Print it; whether the check did not pass."""
    first, *rest = _harmless(verdict.text).splitlines() or [""]
    print(f"{MARKS[verdict.passed]}  {_harmless(verdict.title)}{f': {first}' if first else ''}", flush=True)
    for line in rest:
        print(f"        {line}")
    return not verdict.passed
