"""The field's words: what the glossary replaced must not come back into src, native and docs."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from scripts.house.tree import ROOT, Report

LIST = "scripts/house/words.toml"
FOLDERS = {"src": (".py", ".pyi"), "native": (".h", ".cpp", ".txt"), "docs": (".md",)}


@dataclass(frozen=True, slots=True)
class OldWord:
    """An expression that finds an old word, and what to write instead."""

    old: re.Pattern[str]
    write: str


def read_words(root: Path) -> list[OldWord]:
    """The list of the tree at `root`. Raises `KeyError` and `re.error` for one that is not well formed."""
    data = tomllib.loads((root / LIST).read_text(encoding="utf-8"))
    return [OldWord(re.compile(item["old"]), item["write"]) for item in data["word"]]


def old_words(path: str, text: str, words: list[OldWord]) -> list[str]:
    """Each line with an old word."""
    found = [word for word in words if word.old.search(text)]
    return [
        f"{path}:{number}: {match.group().strip('(')!r}: write {word.write}"
        for number, line in enumerate(text.splitlines(), 1)
        for word in found
        if (match := word.old.search(line))
    ]


def check_words(root: Path = ROOT) -> Report:
    """Lines of src, native and docs with words of the list."""
    words = read_words(root)
    files = [
        path
        for folder, endings in FOLDERS.items()
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in endings and path.is_file()
    ]
    breaches = [
        breach
        for path in files
        for breach in old_words(str(path.relative_to(root)), path.read_text(encoding="utf-8"), words)
    ]
    return Report(f"{len(files)} files for {len(words)} groups of old words", breaches)
