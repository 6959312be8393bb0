"""The public face: `quire.__all__` against tests/law/public_names.txt."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from scripts.house.tree import Report

LIST = "tests/law/public_names.txt"


def written_names(root: Path) -> list[str]:
    """The names of the list; `#` starts a comment."""
    lines = (root / LIST).read_text(encoding="utf-8").splitlines()
    return [name for line in lines if (name := line.split("#")[0].strip())]


def compare(written: list[str], exported: list[str], missing: list[str]) -> list[str]:
    """Breaches: names only in the list, only in `__all__`, doubled, or without an object behind them."""
    breaches = [f"{name}: in {LIST}, not in quire.__all__" for name in sorted(set(written) - set(exported))]
    breaches += [f"{name}: in quire.__all__, not in {LIST}" for name in sorted(set(exported) - set(written))]
    breaches += [f"{name}: twice in quire.__all__" for name in sorted(set(exported)) if exported.count(name) > 1]
    breaches += [f"{name}: quire.{name} does not exist" for name in missing]
    return breaches


def check_names(root: Path) -> Report:
    """Import quire from the tree and compare. Adding or removing a public name is a change of the list."""
    if not (root / "src/quire/__init__.py").exists():
        return Report("src/quire/__init__.py does not exist yet: nothing to compare")
    if str(root / "src") not in sys.path:
        sys.path.insert(0, str(root / "src"))
    quire = importlib.import_module("quire")
    exported = list(quire.__all__)
    breaches = compare(written_names(root), exported, [name for name in exported if not _exists(quire, name)])
    return Report(f"{len(exported)} public names, against the list", breaches)


def _exists(module: ModuleType, name: str) -> bool:
    """True if the name can be had: `quire` imports what stands behind a name when it is first used."""
    try:
        getattr(module, name)
    except (AttributeError, ImportError):
        return False
    return True
