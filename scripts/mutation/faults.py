"""The lists of faults, one file for each area: scripts/mutation/faults/AREA.toml.

::

    [[fault]]
    id = "core-budget-not-spent"         # unique in all lists
    file = "src/quire/core/step.py"
    old = "self.budget -= num_tokens"    # occurs once in the file; several lines are allowed
    new = "pass"
    tests = ["tests/core/test_scheduler.py"]  # files or test ids that must fail
    survives = "why no test can or need see it"  # only for an argued survivor
"""

import ast
import re
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

FAULTS = Path("scripts/mutation/faults")
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong line, and the tests that must fail with it."""

    id: str
    file: str
    """A Python file of the package, relative to the root of the tree."""
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str | None = None
    """Why no test can or need see it; None for a fault that a test must kill."""
    area: str = ""
    """The name of its list."""

    def applied_to(self, text: str) -> str:
        """The text of the file with the fault. Raises ValueError when `old` is not there once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.id}: `old` occurs {count} times in {self.file}, not once")
        return text.replace(self.old, self.new)


def read_faults(root: Path) -> list[Fault]:
    """All lists of the tree at `root`, sorted by area. Raises ValueError naming the list that cannot be read."""
    faults = []
    for path in sorted((root / FAULTS).glob("*.toml")):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            faults += [_fault(entry, path.stem) for entry in content.pop("fault", [])]
        except (tomllib.TOMLDecodeError, TypeError) as error:
            raise ValueError(f"{path.name}: {error}") from error
        if content:
            raise ValueError(f"{path.name}: only [[fault]] entries are known, not {', '.join(content)}")
    return faults


def _fault(entry: dict[str, object], area: str) -> Fault:
    texts = {name: value for name, value in entry.items() if name != "tests"}
    tests = entry.get("tests")
    known = {field.name for field in fields(Fault)} - {"area"}
    if not isinstance(tests, list) or not all(isinstance(value, str) for value in [*tests, *texts.values()]):
        raise TypeError(f"fault {entry.get('id')}: `tests` is a list of strings, all else is a string")
    if entry.keys() - known:
        raise TypeError(f"fault {entry.get('id')}: unknown: {', '.join(sorted(entry.keys() - known))}")
    return Fault(**texts, tests=tuple(tests), area=area)  # type: ignore[arg-type]


def list_problems(root: Path, faults: list[Fault]) -> list[str]:
    """What is wrong with the lists, given the tree at `root`: nothing, unless a change left an entry behind."""
    seen: set[str] = set()
    problems = []
    for fault in faults:
        if fault.id in seen:
            problems.append(f"{fault.id}: two faults have this id")
        seen.add(fault.id)
        problems += [f"{fault.id}: {problem}" for problem in _fault_problems(root, fault)]
    return problems


def _fault_problems(root: Path, fault: Fault) -> list[str]:
    problems = []
    if not _ID.fullmatch(fault.id):
        problems.append("an id is lower-case words joined by hyphens")
    if not fault.tests:
        problems.append("no test is named")
    if fault.survives is not None and len(fault.survives.split()) < 5:
        problems.append("`survives` is an argument, in a sentence")
    for test in fault.tests:
        problems += _test_problems(root, test)
    path = root / fault.file
    if not fault.file.startswith("src/") or path.suffix != ".py" or not path.is_file():
        return [*problems, f"there is no Python file {fault.file} in src"]
    text = path.read_text(encoding="utf-8")
    try:
        if _meaning(fault.applied_to(text)) == _meaning(text):
            problems.append("`new` means the same as `old`")
    except (ValueError, SyntaxError) as error:
        problems.append(str(error))
    return problems


@cache
def _meaning(text: str) -> str:
    """The same for two texts that differ in blanks and comments only."""
    return ast.dump(ast.parse(text))


def _test_problems(root: Path, test: str) -> list[str]:
    file, *names = test.partition("[")[0].split("::")
    path = root / file
    if not path.is_file():
        return [f"there is no test file {file}"]
    text = path.read_text(encoding="utf-8")
    return [f"{file} has no {name}" for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]
