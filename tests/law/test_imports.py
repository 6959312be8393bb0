"""The import law: the tree follows it, and the checker sees each way of breaking it."""

from pathlib import Path

import pytest

from scripts.house.core_start import check_core_start
from scripts.house.import_law import LAW
from scripts.house.imports import check_imports, imports_of
from scripts.house.tree import ROOT, Source


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "src/quire" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_the_tree_follows_the_table() -> None:
    assert check_imports(ROOT).breaches == []


def test_every_row_of_the_table_has_its_room() -> None:
    rooms = {name: ROOT / "src/quire" / name.replace(".", "/") for name in LAW}
    assert [name for name, room in rooms.items() if not (room.is_dir() or room.with_suffix(".py").is_file())] == []


def test_importing_the_scheduler_loads_nothing_heavy() -> None:
    assert check_core_start(ROOT).breaches == []


@pytest.mark.parametrize(
    ("path", "code", "word"),
    [
        ("core/a.py", "import numpy", "core may not import numpy"),
        ("core/a.py", "def f():\n    import torch", "core may not import torch"),
        ("core/a.py", "from quire.engine import engine", "core may not import quire.engine"),
        ("core/a.py", "from ..engine import engine", "core may not import quire.engine"),
        ("core/a.py", "def f():\n    from quire.engine import engine", "core may not import quire.engine"),
        (
            "core/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quire.text import b",
            "quire.text",
        ),
        (
            "core/a.py",
            "import importlib\nimportlib.import_module('quire.ops')",
            "core may not import quire.ops",
        ),
        ("ops/a.py", "import torch", "ops may not import torch"),
        ("ops/a.py", "import transformers", "ops may not import transformers"),
        ("ops/a.py", "def f():\n    import starlette", "ops may not import starlette"),
        ("models/a.py", "from quire.ops import reference", "models may not import quire.ops"),
        ("server/a.py", "from quire.core import request", "server may not import quire.core"),
        ("server/a.py", "import quire\nquire.LLM", "server may not import quire"),
        ("engine/a.py", "from quire.executor.local import b", "engine may not import quire.executor"),
        ("engine/a.py", "from quire.core.plan import _b", "_b is private to quire.core.plan"),
        ("engine/a.py", "from quire.observe.metrics import b", "engine may not import quire.observe"),
        ("server/a.py", "from quire.isolation.wire import b", "server may not import quire.isolation"),
        ("observe/a.py", "from quire.isolation.wire import b", "observe may not import quire.isolation"),
        ("cli/a.py", "from quire.ops import _native", "_native is private"),
        ("attic/a.py", "", "no row for it"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, path: str, code: str, word: str) -> None:
    breaches = check_imports(_tree(tmp_path, {path: code, "ops/_native.py": ""})).breaches
    assert len(breaches) >= 1
    assert any(word in breach and path in breach for breach in breaches)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (
            "core/a.py",
            "import heapq\nfrom quire.errors import B\nfrom quire.core.b import C\nfrom . import d",
        ),
        ("ops/cuda/a.py", "import torch\nimport triton"),
        ("ops/a.py", "def f():\n    import torch"),
        ("ops/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("ops/a.py", "from quire.ops import _native"),
        ("models/a.py", "from quire.ops.types import Ops"),
        ("server/a.py", "import quire\nf'quire {quire.__version__}'"),
        ("server/a.py", "from quire import __version__\nfrom quire.engine.async_engine import B"),
        ("cli/a.py", "from quire.ops.select import b\nfrom quire.core.scheduler import c\nimport numpy"),
        ("llm.py", "from quire.runner.worker import b"),
        ("__init__.py", "from quire.config import B"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, code: str) -> None:
    assert check_imports(_tree(tmp_path, {path: code, "ops/_native.py": ""})).breaches == []


def test_core_reaches_no_clock_by_any_path(tmp_path: Path) -> None:
    files = {
        "__init__.py": "def __getattr__(name):\n    import asyncio",
        "core/__init__.py": "",
        "core/a.py": "from quire.config import b",
        "config.py": "from quire.errors import c",
        "errors.py": "def late():\n    import time",
    }
    breaches = check_imports(_tree(tmp_path, files)).breaches
    assert breaches == ["quire.core.a -> quire.config -> quire.errors -> time (line 2)"]


def test_a_package_that_runs_on_the_way_counts(tmp_path: Path) -> None:
    breaches = check_imports(_tree(tmp_path, {"__init__.py": "import numpy", "core/a.py": ""})).breaches
    assert breaches == ["quire.core.a -> quire -> numpy (line 1)"]


def test_relative_imports_are_resolved() -> None:
    module = Source("src/quire/core/a.py", "from . import b\nfrom .c import d\nfrom ..ops.types import E")
    package = Source("src/quire/core/__init__.py", "from . import b")
    assert [item.module for item in imports_of(module)] == ["quire.core", "quire.core.c", "quire.ops.types"]
    assert [item.module for item in imports_of(package, frozenset({"quire.core.b"}))] == ["quire.core.b"]
