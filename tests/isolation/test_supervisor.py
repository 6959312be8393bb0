"""The supervisor over cores that are not there: each is a script, and the clock is set by hand."""

import errno
import math
import os
import select
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from quire.core.plan import TokenDelta
from quire.core.request import ResumeState
from quire.engine.channel import CoreHealth, CoreInfo, CoreOutputs, Gauges
from quire.errors import EngineDeadError, ModelFileError, OverloadedError
from quire.isolation.breaker import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MOST_DEATHS_IN_A_ROW,
    MOST_DEATHS_WAITED,
)
from quire.isolation.core_process import NUM_SPARE_DESCRIPTORS, CoreExitedError
from quire.isolation.heartbeat import LEAST_SECONDS, Activity
from quire.isolation.supervisor import LATE_WAKE_SECONDS, SupervisedChannel
from quire.isolation.wire import Abort, Add, Begun, Check, Ready, StartFailed, Stepped
from tests.core.harness import new_request
from tests.engine.scripted import Clock, final

INFO = CoreInfo(64, 13, (), "fingerprint")
CRASH, KILL = CoreExitedError("signal 11"), CoreExitedError("signal 9", is_from_outside=True)


class ScriptedCore:
    """As much of a `CoreProcess` as its supervisor uses."""

    has_unsent = False

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.sent: list[Any] = []
        self.ended: list[bool] = []
        self.now: Activity | None = Activity({1: 0.0}, is_awake=True)
        self._reports: deque[Any] = deque()
        self._ours, self._theirs = socket.socketpair()

    def says(self, *reports: Any) -> None:
        """Reports, or the error that is raised in their place."""
        self._reports.extend(reports)
        self._theirs.send(b"x")

    def receive(self) -> list[Any]:
        found: list[Any] = []
        while self._reports and not (found and isinstance(self._reports[0], Exception)):
            if isinstance(self._reports[0], Exception):
                raise self._reports.popleft()
            found.append(self._reports.popleft())
        return found

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def flush(self) -> None:
        pass

    def activity(self) -> Activity | None:
        return self.now

    def fileno(self) -> int:
        return self._ours.fileno()

    def end(self, *, at_once: bool) -> None:
        self.ended.append(at_once)
        self._ours.close()
        self._theirs.close()

    @property
    def added(self) -> list[str]:
        return [message.new.request_id for message in self.sent if isinstance(message, Add)]


class World:
    """A channel, its cores so far and its clock; the system has nothing for so many of its next cores."""

    def __init__(self, num_refused: int = 0) -> None:
        self.clock = Clock()
        self.cores: list[ScriptedCore] = []
        self.num_refused = num_refused
        self.channel = SupervisedChannel(self._spawn, clock=self.clock)  # type: ignore[arg-type]

    def _spawn(self, first: CoreInfo | None) -> ScriptedCore:
        if self.num_refused:
            self.num_refused -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        self.cores.append(ScriptedCore(len(self.cores)))
        return self.cores[-1]

    @property
    def core(self) -> ScriptedCore:
        return self.cores[-1]

    def start(self) -> None:
        self.core.says(Ready(INFO))
        assert self.channel.wait_ready() == INFO

    def says(self, *reports: Any) -> list[TokenDelta]:
        """What the core says, and the deltas that come of it."""
        self.core.says(*reports)
        return [delta for outputs in self.collect() for delta in outputs.deltas]

    def collect(self) -> list[CoreOutputs]:
        found = self.channel.collect()
        while self.core._reports and self.channel.pid == self.core.pid:
            found += self.channel.collect()
        return found

    def begin(self, *names: str) -> None:
        """The core is ready, takes what it is sent, and begins a step with these."""
        self.says(Ready(INFO), Begun(names, 10.0, math.inf))


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    found.start()
    yield found
    found.channel.close()
    found.channel.close()
    for core in found.cores:
        assert core.ended[-1:] == [core is not found.core or found.channel._core is None]


ONE_RUNS = Gauges(1, 0, 0.5)


def stepped(*deltas: TokenDelta, gauges: Gauges = ONE_RUNS) -> Stepped:
    return Stepped(CoreOutputs(deltas, None, gauges))


def add(world: World, *names: str) -> None:
    for name in names:
        world.channel.add(new_request(name, [1, 2], max_tokens=9))


def test_what_waits_is_counted_by_what_is_open(world: World) -> None:
    """Also what the core has not said yet that it has; never more runs than is open."""
    add(world, "a", "b", "c")
    assert world.channel.gauges == Gauges(0, 3, 0.0) and world.core.added == ["a", "b", "c"]
    world.says(Begun(("a", "b"), 10.0, math.inf), stepped(TokenDelta("a", (5,)), gauges=Gauges(2, 1, 0.25)))
    assert world.channel.gauges == Gauges(2, 1, 0.25)
    world.says(stepped(final("a", 5), gauges=Gauges(2, 1, 0.25)))
    add(world, "d")
    assert world.channel.gauges == Gauges(2, 1, 0.25)
    for name in ("b", "c"):
        world.channel.abort(name)
    assert world.channel.gauges == Gauges(1, 0, 0.25), "the core has not said anything since"
    assert [message for message in world.core.sent if isinstance(message, Abort)] == [Abort("b"), Abort("c")]
    world.channel.abort("a")
    world.channel.abort("never")
    assert len(world.core.sent) == 6, "nothing is said of what the core does not have"


def test_requests_go_on_in_the_next_core_with_what_they_were_given(world: World) -> None:
    add(world, "a")
    world.says(Begun(("a",), 10.0, math.inf), stepped(TokenDelta("a", (5, 6), num_cached_tokens=2)), KILL)
    assert world.channel.health == CoreHealth("starting", 1, 0) and world.cores[0].ended == [True]
    assert world.channel.gauges == Gauges(0, 1, 0.0) and not world.channel.is_ready
    add(world, "b")
    assert world.core.added == [], "it has not said that it is ready"
    world.says(Ready(INFO))
    assert world.core.added == ["a", "b"] and world.channel.is_ready
    assert world.core.sent[0].new.resume.output_token_ids == (5, 6)
    assert world.channel.health == CoreHealth("serving", 1, 0)


def die_idle(world: World, reason: CoreExitedError = CRASH) -> None:
    world.says(Ready(INFO), reason)


def test_three_deaths_in_a_row_refuse_all_that_wait_once_and_tell_when_to_come_back(world: World) -> None:
    """Whole seconds, and never less than the pause that is left."""
    add(world, "a")
    for _ in range(MOST_DEATHS_IN_A_ROW - 1):
        die_idle(world)
    assert len(world.cores) == MOST_DEATHS_IN_A_ROW and world.channel.health.state == "starting"
    die_idle(world)
    assert len(world.cores) == MOST_DEATHS_IN_A_ROW and world.channel.health.state == "paused"
    assert world.channel.pid is None and not world.channel.is_ready
    world.channel.wait()  # what is due is due at once
    with pytest.raises(OverloadedError) as caught:
        world.channel.collect()
    assert FIRST_PAUSE_SECONDS <= caught.value.retry_after_s <= FIRST_PAUSE_SECONDS + 2
    assert world.channel.collect() == [] and world.channel.gauges == Gauges(0, 0, 0.0)
    for passed_s in (0.3, 1.0, 3.2, 4.999):
        world.clock.now_s = Clock.now_s + passed_s
        with pytest.raises(OverloadedError) as caught:
            add(world, "b")
        wait_s = caught.value.retry_after_s
        assert wait_s == int(wait_s) and FIRST_PAUSE_SECONDS - passed_s <= wait_s <= FIRST_PAUSE_SECONDS - passed_s + 2
        assert world.channel.collect() == [] and len(world.cores) == MOST_DEATHS_IN_A_ROW
    world.clock.now_s = Clock.now_s + FIRST_PAUSE_SECONDS
    add(world, "c")
    assert world.channel.collect() == [] and len(world.cores) == MOST_DEATHS_IN_A_ROW + 1
    world.says(Ready(INFO))
    assert world.core.added == ["c"] and world.channel.is_ready
    assert world.channel.health.num_died == MOST_DEATHS_IN_A_ROW


def test_those_present_wait_while_cores_are_killed_and_newcomers_do_not(world: World) -> None:
    add(world, "a")
    world.says(Begun(("a",), 10.0, math.inf), stepped(TokenDelta("a", (5,))))
    for _ in range(MOST_DEATHS_IN_A_ROW):
        die_idle(world, KILL)
    assert world.channel.health.state == "paused" and world.collect() == []
    with pytest.raises(OverloadedError):
        add(world, "b")
    world.clock.now_s += FIRST_PAUSE_SECONDS
    assert world.collect() == [] and len(world.cores) == MOST_DEATHS_IN_A_ROW + 1
    world.says(Ready(INFO))
    assert world.core.added == ["a"] and world.core.sent[0].new.resume.output_token_ids == (5,)


def test_those_present_do_not_wait_for_ever(world: World) -> None:
    add(world, "a")
    world.core.says(KILL)
    with pytest.raises(OverloadedError):
        for _ in range(2 * MOST_DEATHS_WAITED):
            world.channel.collect()
            if world.channel.health.state == "paused":
                world.clock.now_s += LONGEST_PAUSE_SECONDS
            else:
                world.core.says(KILL)
    assert world.channel.health.num_died == MOST_DEATHS_WAITED and world.collect() == []


def test_a_core_that_the_system_has_nothing_for_is_tried_again(world: World) -> None:
    add(world, "a")
    world.num_refused = MOST_DEATHS_IN_A_ROW - 1
    world.says(KILL)
    assert world.channel._seconds_until_due() == 0, "one of the three in a row is left"
    assert world.channel.collect() == []
    world.num_refused = 1
    for _ in range(2):
        with pytest.raises(OverloadedError):
            add(world, "b")
        world.channel.wait()
        pause_s = world.channel._seconds_until_due()
        assert pause_s is not None and pause_s > 0
        world.clock.now_s += pause_s
        assert world.channel.collect() == []
    world.says(Ready(INFO))
    assert world.core.added == ["a"] and len(world.cores) == 2 and world.channel.health.num_died == 1


def test_a_first_core_that_the_system_has_nothing_for_is_an_error_that_says_so() -> None:
    with pytest.raises(EngineDeadError, match="Too many open files"):
        World(num_refused=1)


def test_descriptors_are_kept_for_a_start(world: World) -> None:
    """As many as it takes, and no more are held afterwards."""

    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    spare, before = world.channel._spare, num_open()
    with spare.given_up():
        assert num_open() == before - NUM_SPARE_DESCRIPTORS
    assert num_open() == before


@pytest.mark.parametrize(
    ("tokens", "reason", "is_of_use"), [((5,), None, True), ((), None, False), ((), "error", False)]
)
def test_a_core_is_of_use_when_it_gives_a_token(
    world: World, tokens: tuple[int, ...], reason: str | None, is_of_use: bool
) -> None:
    for _ in range(MOST_DEATHS_IN_A_ROW - 1):
        die_idle(world)
    world.says(Ready(INFO))
    add(world, "a")
    world.says(stepped(TokenDelta("a", tokens, finish_reason=reason)))
    die_idle(world)
    assert (world.channel.health.state == "starting") is is_of_use


def test_a_request_that_is_found_fails_and_the_engine_is_not_what_is_wrong(world: World) -> None:
    """One crash in which two were present, and one of each alone: the second one is found. That narrows or explains
    more deaths than the breaker would let pass."""
    add(world, "a", "b")
    world.says(Begun(("a", "b"), 10.0, math.inf), stepped(TokenDelta("a", (5,)), TokenDelta("b", (5,))), CRASH)
    world.says(Ready(INFO))
    assert world.core.added == ["a"], "it is tried alone"
    world.says(Begun(("a",), 10.0, math.inf), stepped(final("a", 5, 5)))
    assert world.core.added == ["a", "b"]
    found = world.says(Begun(("b",), 10.0, math.inf), CRASH)
    assert [(delta.request_id, delta.finish_reason) for delta in found] == [("b", "error")]
    assert "more than once" in str(found[0].error)
    world.says(Ready(INFO))
    assert world.core.added == ["a"] and world.core.sent[0].new.resume.output_token_ids == (5, 5, 5)
    for _ in range(MOST_DEATHS_IN_A_ROW - 1):
        assert world.channel.health.state != "paused"
        die_idle(world)


def test_a_death_that_narrows_the_quarantine_is_not_counted(world: World) -> None:
    names = [f"r{number}" for number in range(64)]
    add(world, *names)
    world.says(Begun(tuple(names), 10.0, math.inf), CRASH)
    for _ in range(2 * MOST_DEATHS_IN_A_ROW):
        world.says(Ready(INFO))
        group = world.core.added
        if len(group) == 1:
            break
        world.says(Begun(tuple(group), 10.0, math.inf), CRASH)
        assert world.channel.health.state == "starting"
    assert len(world.core.added) == 1
    die_idle(world)
    assert world.channel.health.state == "starting", "two deaths count: the first, and this one"


def test_time_without_work_is_nobodys_silence(world: World) -> None:
    """A core that was idle for long has its time from the request on that it is sent then."""
    world.core.now = None
    assert world.channel._seconds_until_due() is None
    world.clock.now_s += 1000.0
    assert world.channel.is_ready
    add(world, "a")
    world.channel.collect()
    assert world.channel.is_ready and len(world.cores) == 1
    world.clock.now_s += LEAST_SECONDS - 0.1
    add(world, "b")
    world.channel.collect()
    assert world.channel.is_ready and len(world.cores) == 1
    world.clock.now_s += 0.2
    assert not world.channel.is_ready, "the second request gave it no time"
    world.channel.collect()
    assert world.channel.health == CoreHealth("starting", 0, 1)


def test_a_step_has_the_time_that_the_core_asks_for(world: World) -> None:
    world.core.now = None
    add(world, "a")
    world.says(Begun(("a",), 30.0, math.inf))
    world.clock.now_s += 29.0
    world.channel.collect()
    assert world.channel.health.num_hung == 0
    world.clock.now_s += 1.0
    assert [outputs.deltas for outputs in world.channel.collect()] == []
    assert world.channel.health == CoreHealth("starting", 0, 1) and world.cores[0].ended == [True]


def test_a_supervisor_that_woke_late_judges_no_core(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for late_s, is_judged in ((LATE_WAKE_SECONDS / 2, True), (2 * LATE_WAKE_SECONDS, False)):
        world.core.now = None
        add(world, f"late {late_s}")
        world.says(Begun((f"late {late_s}",), 5.0, math.inf))
        choose = world.channel._selector.select

        def select_late(timeout_s: float | None = None, late_s: float = late_s, choose: Any = choose) -> Any:
            assert timeout_s is not None
            world.clock.now_s += timeout_s + late_s
            return choose(0)

        before = world.channel.health.num_hung
        with monkeypatch.context() as patch:
            patch.setattr(world.channel._selector, "select", select_late)
            world.channel.wait()
        world.channel.collect()
        assert world.channel.health.num_hung - before == is_judged
        if is_judged:
            world.says(Ready(INFO))


def test_a_successor_may_take_as_long_to_start_as_the_first_did_and_some(world: World) -> None:
    world.says(KILL)
    world.core.now = None
    world.clock.now_s += 9.9
    world.channel.collect()
    assert len(world.cores) == 2
    world.clock.now_s += 0.1
    world.channel.collect()
    assert len(world.cores) == 3 and world.channel.health == CoreHealth("starting", 1, 1)


def test_a_slow_start_gives_its_successors_five_times_as_long() -> None:
    world = World()
    world.clock.now_s += 4.0
    world.start()
    world.says(KILL)
    world.core.now = None
    world.clock.now_s += 19.9
    world.channel.collect()
    assert len(world.cores) == 2
    world.clock.now_s += 0.1
    world.channel.collect()
    assert len(world.cores) == 3
    world.channel.close()


def test_a_first_core_that_cannot_start_is_told_in_its_own_words() -> None:
    for report, error in (
        (StartFailed("ModelFileError", "no such file", "model"), ModelFileError),
        (StartFailed("SomethingElse", "no such file", "model"), Exception),
        (CoreExitedError("no such file"), EngineDeadError),
    ):
        world = World()
        world.core.says(report)
        with pytest.raises(error, match="no such file"):
            world.channel.wait_ready()
        world.channel.close()


def test_a_check_reaches_a_core_that_serves(world: World) -> None:
    world.channel.check()
    assert world.core.sent == [Check()]
    world.says(KILL)
    world.channel.check()
    assert world.core.sent == [], "it has not said that it is ready"


def test_cleared_it_has_another_core_and_knows_no_request(world: World) -> None:
    """Whatever came before, also when it is interrupted in the middle and called again; what is added then goes on from
    where it was."""
    add(world, "a", "b")
    world.begin("a")
    world.channel._selector.unregister(world.core)  # as far as the first call came
    world.channel.clear()
    assert len(world.cores) == 2 and world.cores[0].ended == [True]
    assert (world.channel.gauges.num_waiting, world.channel.is_ready, world.channel.health.num_died) == (0, False, 0)
    given = ResumeState((5, 6), 1, 2)
    world.channel.add(replace(new_request("a", [1, 2], max_tokens=9), resume=given))
    world.says(Ready(INFO))
    assert [message.new.resume for message in world.core.sent if isinstance(message, Add)] == [given]
    world.channel.clear()
    world.says(Ready(INFO))
    assert world.core.added == []


def test_what_could_not_be_sent_is_watched_for(world: World) -> None:
    world.core.has_unsent = True
    flushed: list[int] = []
    world.core.flush = lambda: flushed.append(1)  # type: ignore[method-assign]
    world.channel.wait()
    assert not flushed, "an interrupt while it waits must change nothing"
    world.channel.collect()
    assert flushed
    world.core.has_unsent = False
    world.channel.wake()
    world.channel.wait()
    world.channel.collect()
    assert len(flushed) == 1 and not select.select([world.channel._woken], [], [], 0)[0], "woken once, and no more"
