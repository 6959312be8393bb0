"""A process from the side that started it: what is sent arrives whole, the last reports are read, and
its status says how it ended."""

import hashlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.isolation import core_process
from quire.isolation.core_process import CoreExitedError, CoreProcess
from tests.conftest import PATIENCE_S
from tests.isolation.obedient_core import SYSTEM_SECONDS

ROOT = Path(__file__).parents[2]
MODULE = "tests.isolation.obedient_core"


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CoreProcess]]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started: list[CoreProcess] = []

    def start(*order: Any, **options: Any) -> CoreProcess:
        started.append(CoreProcess(list(order), MODULE, **options))
        return started[-1]

    yield start
    for core in started:
        core.end(at_once=True)


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.005)


def heard(core: CoreProcess, count: int) -> list[Any]:
    """So many reports."""
    reports: list[Any] = []
    while len(reports) < count:
        select.select([core], [], [], PATIENCE_S)
        reports += core.receive()
    return reports


def test_more_than_the_socket_takes_arrives_whole_and_in_order(begin: Callable[..., CoreProcess]) -> None:
    bodies = [os.urandom(number * 7919 % 90_000 + 1) for number in range(60)]
    core = begin("digest", len(bodies))
    for body in bodies:
        core.send(["body", list(body)] if len(body) < 100 else ["body", body])
    assert core.has_unsent, "two and a half megabytes, and nothing was read"
    while core.has_unsent:
        select.select([], [core], [], PATIENCE_S)
        core.flush()
    (report,) = heard(core, 1)
    assert report.entered == (hashlib.sha256(b"".join(bodies)).hexdigest(),)


@pytest.mark.parametrize(
    ("how", "text", "is_from_outside"),
    [
        (-7, "exit status 7", False),
        (signal.SIGKILL, "signal 9", True),
        (signal.SIGTERM, "signal 15", True),
        (signal.SIGSEGV, "signal 11", False),
        (signal.SIGABRT, "signal 6", False),
    ],
)
def test_last_words_are_heard_before_the_end(
    begin: Callable[..., CoreProcess], how: int, text: str, is_from_outside: bool
) -> None:
    core = begin("die", int(how))
    until(lambda: core._process.poll() is not None)
    assert [report.entered for report in core.receive()] == [("0",), ("1",), ("2",)]
    for _ in range(2):
        with pytest.raises(CoreExitedError) as caught:
            core.receive()
        assert (str(caught.value), caught.value.is_from_outside) == (text, is_from_outside)
    core.send(["absent", 0])
    assert not core.has_unsent, "what no process will read is not kept"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_process_does_is_told_thread_by_thread(begin: Callable[..., CoreProcess]) -> None:
    """The work of one thread is in its own account, most of it the system's; while all sleep none is awake."""
    core = begin("spend", 0)
    (report,) = heard(core, 1)
    thread, spent_s = int(report.entered[0]), report.allowed_s
    assert thread != core.pid and spent_s >= SYSTEM_SECONDS

    def is_idle() -> bool:
        activity = core.activity()
        assert activity is not None
        return not activity.is_awake

    until(is_idle)
    activity = core.activity()
    assert activity is not None
    assert {core.pid, thread} <= set(activity.used_s)
    assert activity.used_s[thread] == pytest.approx(spent_s, abs=0.05)
    core.end(at_once=True)
    assert core.activity() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_that_computes_is_awake(begin: Callable[..., CoreProcess]) -> None:
    core = begin("spend", 0)
    until(lambda: (activity := core.activity()) is not None and sum(activity.used_s.values()) > SYSTEM_SECONDS / 2)
    found = []
    while max((activity := core.activity()).used_s.values()) < SYSTEM_SECONDS - 0.1:  # type: ignore[union-attr]
        found.append(activity.is_awake)  # type: ignore[union-attr]
    assert all(found)


@pytest.mark.parametrize("niceness", [0, 1, 19])
def test_how_far_it_gives_way_is_the_callers_to_say(begin: Callable[..., CoreProcess], niceness: int) -> None:
    core = begin("wait", 0, niceness=niceness)
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, core.pid) == min(19, ours + niceness)


def test_it_leaves_by_itself_or_is_made_to(begin: Callable[..., CoreProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_process, "LEAVE_SECONDS", PATIENCE_S)
    core = begin("wait", 0)
    core.end(at_once=False)
    assert core._process.returncode == 0, "it saw that the other side was gone"
    monkeypatch.setattr(core_process, "LEAVE_SECONDS", 0.2)
    core = begin("stay", 0)
    core.end(at_once=False)
    core.end(at_once=False)
    until(lambda: core._process.poll() == -signal.SIGKILL)
