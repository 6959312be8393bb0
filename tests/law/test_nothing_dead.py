"""Nothing dead: what the contract offers and what the base install brings is used by `src`."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from quire.ops.graph.operations import OPERATIONS
from quire.ops.types import Device, Ops
from scripts.house.tree import ROOT

SOURCE = ROOT / "src/quire"


@cache
def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def trees(*, without: str = "") -> Iterator[ast.Module]:
    for path, module in parsed().items():
        if not (without and path.is_relative_to(SOURCE / without)):
            yield module


def methods(protocol: type) -> set[str]:
    return {name for name, value in vars(protocol).items() if callable(value) and not name.startswith("_")}


def uncalled(names: set[str], modules: Iterator[ast.Module]) -> set[str]:
    """Of `names`, those that no attribute in the modules has."""
    seen = {node.attr for module in modules for node in ast.walk(module) if isinstance(node, ast.Attribute)}
    return names - seen


def test_every_operation_is_called_by_src() -> None:
    assert uncalled(methods(Ops), trees(without="ops")) == set()
    assert uncalled(methods(Device), trees(without="ops")) == set()


def test_an_operation_that_nothing_calls_is_seen() -> None:
    assert uncalled({"rms_norm", "transmogrify"}, trees(without="ops")) == {"transmogrify"}


def test_what_can_be_traced_is_an_operation() -> None:
    assert set(OPERATIONS) - methods(Ops) == {"add"}, "which is += of arrays"


def test_the_contract_is_small() -> None:
    assert len(methods(Ops)) <= 26


def imported(modules: Iterator[ast.Module]) -> set[str]:
    found: set[str] = set()
    for module in modules:
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found


def base_dependencies(root: Path) -> set[str]:
    with (root / "pyproject.toml").open("rb") as file:
        stated = tomllib.load(file)["project"]["dependencies"]
    return {re.split(r"[^A-Za-z0-9_.-]", one, maxsplit=1)[0].lower().replace("-", "_") for one in stated}


def test_every_base_dependency_is_imported_by_src() -> None:
    assert base_dependencies(ROOT) <= imported(trees())
