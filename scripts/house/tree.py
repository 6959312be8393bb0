"""The source tree as the checks see it: Python files with their syntax trees, and a report form."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE_SUFFIXES = (".cpp", ".cc", ".h", ".hpp", ".inl")


@dataclass(frozen=True)
class Report:
    """What one check found: one line about what was read, and one line for each breach."""

    summary: str
    breaches: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """One Python file. `path` is relative to the root of the tree it was found in, with forward slashes."""

    path: str
    text: str

    @cached_property
    def syntax(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of the file, in no promised order."""
        return list(ast.walk(self.syntax))

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def module(self) -> str:
        """`src/quire/core/plan.py` -> `quire.core.plan`; a package is named without `__init__`."""
        parts = self.path.removesuffix(".py").split("/")
        if parts[0] == "src":
            parts = parts[1:]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(root: Path, folder: str) -> list[Source]:
    """The Python files below `root/folder`, sorted by path; none if there is no such folder."""
    found = sorted((root / folder).rglob("*.py"))
    return [Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in found]


def native_files(root: Path) -> Iterator[tuple[str, str]]:
    """Path and text of the C++ files below `root/native`."""
    for path in sorted((root / "native").rglob("*")):
        if path.suffix in NATIVE_SUFFIXES:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
