"""The lists of faults fit the tree, and the runner tells a fault that is killed from one that survives."""

import fcntl
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.house.tree import ROOT
from scripts.mutation.campaign import Campaign, Outcome, Verdict, outcome_of
from scripts.mutation.faults import FAULTS, Fault, list_problems, read_faults
from scripts.mutation.report import line_of, record_of, summary_of
from scripts.mutation.tree_copy import TreeCopy
from scripts.mutation.trial import Ending, Trial, run_tests

LIST = """
[[fault]]
id = "thing-less"
file = "src/quire/thing.py"
old = "a + b"
new = "a - b"
tests = ["tests/test_thing.py"]
"""
THING = "def total(a, b):\n    return a + b\n"
TEST = "from quire.thing import total\n\n\ndef test_total():\n    assert total(2, 2) == 4\n"
FAULT = Fault("thing-less", "src/quire/thing.py", "a + b", "a - b", ("tests/test_thing.py",), area="thing")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one function and one test, for which pytest needs none of the plugins that are installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    root = tmp_path / "tree"
    for path, text in {
        "src/quire/__init__.py": "",
        "src/quire/thing.py": THING,
        "tests/test_thing.py": TEST,
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ["-ra", "--import-mode=importlib"]\n',
        FAULTS / "thing.toml": LIST,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


def test_the_lists_fit_the_tree() -> None:
    faults = read_faults(ROOT)
    assert list_problems(ROOT, faults) == []
    assert len(faults) > 100


def test_a_list_that_fits_has_no_problem(tree: Path) -> None:
    assert read_faults(tree) == [FAULT]
    assert list_problems(tree, [FAULT]) == []


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"file": "src/quire/gone.py"}, "there is no Python file src/quire/gone.py"),
        ({"file": "tests/test_thing.py"}, "there is no Python file tests/test_thing.py in src"),
        ({"old": "a * b"}, "occurs 0 times"),
        ({"old": "a"}, "occurs 3 times"),
        ({"new": "a + b"}, "means the same"),
        ({"new": "a + b  # sum"}, "means the same"),
        ({"new": "a +"}, "invalid syntax"),
        ({"tests": ()}, "no test is named"),
        ({"tests": ("tests/test_gone.py",)}, "there is no test file tests/test_gone.py"),
        ({"tests": ("tests/test_thing.py::test_gone",)}, "has no test_gone"),
        ({"id": "Thing less"}, "lower-case words"),
        ({"survives": "Because."}, "an argument"),
    ],
)
def test_a_list_that_does_not_fit_is_seen(tree: Path, changed: dict[str, str], problem: str) -> None:
    (found,) = list_problems(tree, [replace(FAULT, **changed)])  # type: ignore[arg-type]
    assert problem in found


def test_two_faults_have_two_ids(tree: Path) -> None:
    assert list_problems(tree, [FAULT, FAULT]) == ["thing-less: two faults have this id"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("why = 'x'", "unknown: why"),
        ("new = 1", "a string"),
        ("tests = 'x'", "a list"),
        ("[other]", "only"),
        ("x", "="),
    ],
)
def test_a_list_that_cannot_be_read_is_named(tree: Path, line: str, word: str) -> None:
    key = line.split()[0]
    kept = [old for old in LIST.splitlines() if not old.startswith(f"{key} =")]
    (tree / FAULTS / "thing.toml").write_text("\n".join([*kept, line]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"thing.toml: .*{word}"):
        read_faults(tree)


def test_what_becomes_of_faults(tree: Path) -> None:
    """Killed; survived, since 2 + 2 is 2 * 2, also as argued; not judged by a test that fails anyway."""
    failing = tree / "tests/test_wrong.py"
    failing.write_text("def test_wrong():\n    assert False\n", encoding="utf-8")
    lives = replace(FAULT, id="thing-times", new="a * b")
    faults = [
        FAULT,
        lives,
        replace(lives, id="thing-argued", survives="the test adds two and two alone"),
        replace(FAULT, id="thing-unsure", tests=("tests/test_thing.py", "tests/test_wrong.py")),
    ]
    verdicts = list(Campaign(tree, 1000.0, jobs=1, native=None).run(faults))
    assert {verdict.fault.id: (verdict.outcome, verdict.failure) for verdict in verdicts} == {
        "thing-less": (Outcome.KILLED, "tests/test_thing.py::test_total"),
        "thing-times": (Outcome.SURVIVED, ""),
        "thing-argued": (Outcome.ARGUED, ""),
        "thing-unsure": (Outcome.INVALID, "tests/test_wrong.py::test_wrong"),
    }
    assert (tree / "src/quire/thing.py").read_text(encoding="utf-8") == THING, "faults go into a copy"


def test_after_the_bound_nothing_is_started(tree: Path) -> None:
    (verdict,) = Campaign(tree, 0.0, jobs=1, native=None).run([FAULT])
    assert verdict.outcome is Outcome.NOT_RUN


OUTLIVES = """
import fcntl, subprocess, sys, time

CHILD = '''
import fcntl, sys, time
held = open("held", "w")
fcntl.flock(held, fcntl.LOCK_EX)
print("holds", flush=True)
time.sleep(600)
open("ended", "w")
'''


def test_leaves_a_child():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"holds\\n"
"""


def test_what_tests_leave_behind_is_ended(tree: Path, tmp_path: Path) -> None:
    (tree / "tests/test_outlives.py").write_text(OUTLIVES, encoding="utf-8")
    copy = TreeCopy(tree, tmp_path / "copy", None)
    assert run_tests(copy, ["tests/test_outlives.py"], limit_s=500).ending is Ending.PASSED
    with (tmp_path / "copy/held").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # once the child is gone
    assert not (tmp_path / "copy/ended").exists()


def test_a_hang_is_ended_and_counts_as_killed(tree: Path, tmp_path: Path) -> None:
    copy = TreeCopy(tree, tmp_path / "copy", None)
    endless = replace(FAULT, old="return a + b", new="while True:\n        pass")
    with copy.with_fault(endless):
        trial = run_tests(copy, FAULT.tests, limit_s=1)
    assert trial.ending is Ending.HUNG and outcome_of(endless, trial) is Outcome.HUNG
    assert (copy.root / "src/quire/thing.py").read_text(encoding="utf-8") == THING


def test_a_campaign_that_is_closed_leaves_nothing(tree: Path) -> None:
    """The test of the second fault waits for ever: closing ends it, and the folder of the copy is gone."""
    waits = f"import os, threading\n\n\ndef test_waits():\n    open({str(tree / 'waits')!r}, 'w').write(os.getcwd())\n"
    (tree / "tests/test_waits.py").write_text(f"{waits}    threading.Event().wait()\n", encoding="utf-8")
    verdicts = Campaign(tree, 1000.0, jobs=1, native=None).run(
        [FAULT, replace(FAULT, id="waits", tests=("tests/test_waits.py",))]
    )
    assert next(verdicts).outcome is Outcome.KILLED
    while not (tree / "waits").exists() or not (tree / "waits").read_text(encoding="utf-8"):
        time.sleep(0.01)
    verdicts.close()
    assert not Path((tree / "waits").read_text(encoding="utf-8")).exists()


def test_tests_that_are_not_there_judge_nothing(tree: Path, tmp_path: Path) -> None:
    copy = TreeCopy(tree, tmp_path / "copy", None)
    assert run_tests(copy, ["tests/test_gone.py"], limit_s=500).ending is Ending.NO_TESTS


def test_the_summary_counts_by_area() -> None:
    other = replace(FAULT, id="other", area="other", survives="two and two are four either way")
    verdicts = [
        Verdict(FAULT, Outcome.KILLED, 1.0, "tests/test_thing.py::test_total"),
        Verdict(replace(FAULT, id="hangs"), Outcome.HUNG, 2.0),
        Verdict(replace(FAULT, id="lives"), Outcome.SURVIVED, 1.0),
        Verdict(replace(FAULT, id="late"), Outcome.NOT_RUN),
        Verdict(other, Outcome.ARGUED, 1.0),
    ]
    lines = summary_of(verdicts)
    assert [line.split() for line in lines[2:5]] == [
        ["other", "1", "1", "0", "0.0", "1", "0", "1"],
        ["thing", "4", "3", "2", "66.7", "0", "1", "4"],
        ["all", "5", "4", "2", "50.0", "1", "1", "5"],
    ]
    assert "  other: two and two are four either way" in lines
    assert line_of(verdicts[0]).endswith("thing-less [1.0 s] tests/test_thing.py::test_total")
    assert "although it is argued" in line_of(Verdict(other, Outcome.KILLED))
    assert '"outcome": "hung"' in record_of(verdicts[1])


def test_a_fault_that_is_seen_is_not_argued_for() -> None:
    argued = replace(FAULT, survives="the test adds two and two alone")
    endings = {ending: outcome_of(argued, Trial(ending, 1.0)) for ending in (Ending.PASSED, Ending.FAILED)}
    assert endings == {Ending.PASSED: Outcome.ARGUED, Ending.FAILED: Outcome.KILLED}
