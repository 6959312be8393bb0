"""The budgets: the tree keeps them, and the counter counts."""

from pathlib import Path
from typing import Any

import pytest

from scripts.house.budgets import check_budgets, class_fields, lines_by_folder, read_budget
from scripts.house.tree import ROOT, Source

BUDGET: dict[str, Any] = {
    "lines": {
        "source": 30,
        "native": 5,
        "source_file": 20,
        "source_function": 4,
        "native_file": 4,
        "test_file": 10,
        "script_file": 10,
    },
    "fields": {"src/quire/core/request.py:Request": 3},
    "names": {"environment_variables": 1},
}


def test_the_tree_keeps_the_budgets() -> None:
    assert check_budgets(ROOT).breaches == []


def test_the_promised_numbers_stand() -> None:
    budget = read_budget(ROOT)
    assert budget["lines"]["source_file"] <= 500
    assert budget["lines"]["source_function"] <= 60
    assert budget["fields"] == {
        "src/quire/core/request.py:Request": 16,
        "src/quire/core/plan.py:StepPlan": 12,
        "src/quire/core/request.py:SamplingSpec": 16,
        "src/quire/models/spec.py:DecoderSpec": 24,
        "src/quire/config.py:EngineArgs": 36,
    }
    assert budget["names"]["environment_variables"] <= 10
    assert budget["install"]["base_mb"] <= 150


@pytest.mark.parametrize(
    ("path", "text", "word"),
    [
        ("src/quire/a.py", "x = 1\n" * 21, "src/quire/a.py: 21 lines, the budget is 20"),
        ("src/quire/a.py", "x = 1\n" * 31, "src/quire: 31 lines of Python, the budget is 30"),
        ("src/quire/a.py", "class A:\n    def f(self):\n" + "        1\n" * 4, "src/quire/a.py:2 f: 5 lines"),
        ("src/quire/a.py", "async def f():\n" + "    1\n" * 4, "src/quire/a.py:1 f: 5 lines"),
        ("src/quire/a.py", "class StopMixin: ...", "class StopMixin: no mixins"),
        ("src/quire/a.py", "def f():\n    global x\n    x = 1", "global x"),
        ("src/quire/a.py", "SEEN: dict[str, int] = {}", "a.py:1: an empty container: no globals that change"),
        ("src/quire/a.py", "x = 1\nSEEN = set()", "a.py:2: an empty container: no globals that change"),
        ("src/quire/a/utils.py", "", "name the thing"),
        ("src/quire/a.py", "import os\nos.getenv('QUIRE_A')\nos.environ['QUIRE_B']", "QUIRE_A, QUIRE_B: 2"),
        (
            "src/quire/core/request.py",
            "class Request:\n    a: int\n    b: int\n    c: int\n    d: int",
            "4 fields",
        ),
        ("src/quire/core/request.py", "class Renamed: ...", "no class Request"),
        ("native/a.cpp", "//\n" * 5, "native/a.cpp: 5 lines"),
        ("native/ops/a.h", "//\n" * 6, "native: 6 lines of C++"),
        ("tests/a/test_b.py", "#\n" * 11, "tests/a/test_b.py: 11 lines"),
        ("scripts/b.py", "#\n" * 11, "scripts/b.py: 11 lines"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, path: str, text: str, word: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text, encoding="utf-8")
    breaches = check_budgets(tmp_path, BUDGET).breaches
    assert any(word in breach for breach in breaches), breaches


def test_native_environment_variables_count(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    text = 'getenv("QUIRE_A"); std::getenv( "QUIRE_B");\n#define QUIRE_C 1\n'
    (tmp_path / "native/a.cpp").write_text(text, encoding="utf-8")
    assert any("QUIRE_A, QUIRE_B: 2" in breach for breach in check_budgets(tmp_path, BUDGET).breaches)


def test_fields_are_what_an_object_carries() -> None:
    text = """
class Request:
    kind: ClassVar[str] = "x"
    a: int
    def f(self, other):
        self.b = 1
        self.c, other.d = 2, 3
        self.a += self.e
"""
    assert class_fields(Source("src/quire/core/request.py", text), "Request") == {"a", "b", "c"}
    assert class_fields(Source("src/quire/core/request.py", text), "Other") is None


def test_lines_by_folder(tmp_path: Path) -> None:
    for path in ("src/quire/a.py", "src/quire/core/b.py", "src/quire/core/deep/c.py", "tests/law/d.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1\n2\n", encoding="utf-8")
    assert lines_by_folder(tmp_path) == [
        ("src/quire (root)", 1, 2),
        ("src/quire/core", 2, 4),
        ("tests", 1, 2),
    ]


def test_a_folder_has_a_budget_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "src/quire/core").mkdir(parents=True)
    (tmp_path / "src/quire/core/a.py").write_text("x = 1\n" * 8, encoding="utf-8")
    assert check_budgets(tmp_path, BUDGET | {"folders": {"src/quire/core": 8}}).breaches == []
    assert check_budgets(tmp_path, BUDGET | {"folders": {"src/quire/core": 7}}).breaches == [
        "src/quire/core: 8 lines, the budget is 7"
    ]
    assert check_budgets(tmp_path, BUDGET | {"folders": {"src/quire/ops": 7}}).breaches == [
        "src/quire/core: no budget in scripts/budget.toml"
    ]


def test_methods_of_a_class_are_counted(tmp_path: Path) -> None:
    (tmp_path / "src/quire").mkdir(parents=True)
    text = "class A:\n    def f(self): ...\n    def g(self): ...\n    def _h(self): ...\n"
    (tmp_path / "src/quire/a.py").write_text(text, encoding="utf-8")
    assert check_budgets(tmp_path, BUDGET | {"methods": {"src/quire/a.py:A": 2}}).breaches == []
    for limits, word in (({"src/quire/a.py:A": 1}, "2 methods"), ({"src/quire/a.py:B": 1}, "no class B")):
        assert word in check_budgets(tmp_path, BUDGET | {"methods": limits}).breaches[0]


def test_the_reading_spine_is_counted(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n" * 8, encoding="utf-8")
    page = tmp_path / "docs/tour.md"
    page.write_text("# Tour\n- `no.py`\n## The reading spine\n\n1. `a.py`: what it is, `b`\n\n## Else\n- `c.py`\n")
    limits = {"lines": 8, "least_files": 1}
    assert check_budgets(tmp_path, BUDGET | {"spine": limits}).breaches == []
    for changed, word in (({"lines": 7}, "spine: 8 lines"), ({"least_files": 2}, "1 files in the reading spine")):
        assert word in check_budgets(tmp_path, BUDGET | {"spine": limits | changed}).breaches[0]
    page.write_text("## The reading spine\n- `gone.py`\n")
    assert "no file gone.py" in check_budgets(tmp_path, BUDGET | {"spine": limits}).breaches[0]
