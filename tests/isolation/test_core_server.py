"""The core's side of the socket: what it says of a step before and after it, and what it answers to commands."""

import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from quire.core.engine_core import EngineCore
from quire.core.limits import SchedulerConfig
from quire.core.plan import NewRow, ScheduledRow, StepPlan, StepResult
from quire.core.policy import Fcfs
from quire.core.prefix_cache import PrefixCache
from quire.core.request import SamplingSpec
from quire.core.scheduler import Scheduler
from quire.engine.channel import CoreInfo, Gauges
from quire.executor.fake import FakeExecutor
from quire.isolation.core_server import AnnouncingExecutor, CoreServer
from quire.isolation.wire import Abort, Add, Begun, Check, Report, Stepped, Unframer
from tests.core.harness import KEY, VOCAB_SIZE, new_request

INFO = CoreInfo(32, VOCAB_SIZE, (), "fingerprint")


class Allowance:
    """What a step may take, as it is set; and what was asked and learned of it."""

    idle_timeout_s = math.inf

    def __init__(self) -> None:
        self.next_s = 1.5
        self.asked: list[float] = []
        self.learned: list[float] = []

    def seconds_for(self, work: float) -> float:
        self.asked.append(work)
        return self.next_s

    def observe(self, work: float, seconds: float) -> None:
        assert seconds >= 0
        self.learned.append(work)


class Other:
    """The other end of a core's socket."""

    def __init__(self) -> None:
        self.theirs, self._ours = socket.socketpair()
        self._ours.setblocking(False)
        self._frames = Unframer(Report, 2**20)

    def heard(self) -> list[Any]:
        """All that has come."""
        try:
            return list(self._frames.feed(self._ours.recv(2**20)))
        except BlockingIOError:
            return []

    def close(self) -> None:
        self.theirs.close()
        self._ours.close()


@pytest.fixture
def other() -> Iterator[Other]:
    found = Other()
    yield found
    found.close()


class Still:
    """An executor that only answers."""

    def execute(self, plan: StepPlan) -> StepPlan:
        return plan

    def collect(self, handle: StepPlan) -> StepResult:
        return StepResult(handle.step_id, ())

    def run_idle_work(self) -> bool:
        return False

    def close(self) -> None:
        pass


def plan(*rows: tuple[int, int], new: tuple[str, ...] = ()) -> StepPlan:
    """A step that computes `(start, number)` tokens, with which these enter."""
    entering = tuple(NewRow(row, name, (1,), 1, SamplingSpec(), ()) for row, name in enumerate(new))
    scheduled = tuple(ScheduledRow(row, start, count, (), samples=True) for row, (start, count) in enumerate(rows))
    return StepPlan(0, (), entering, scheduled)


def test_a_step_is_announced_where_it_is_news(other: Other) -> None:
    """Requests that enter, or another time than the last announced; the rest begin in silence."""
    allowance = Allowance()
    executor = AnnouncingExecutor(Still(), other.theirs, allowance)  # type: ignore[arg-type]

    def step(*new: str, next_s: float) -> list[Any]:
        allowance.next_s = next_s
        executor.collect(executor.execute(plan((0, 1), new=new)))
        return other.heard()

    assert step("a", "b", next_s=1.5) == [Begun(("a", "b"), 1.5, math.inf)]
    assert step(next_s=1.5) == []
    assert step(next_s=20.0) == [Begun((), 20.0, math.inf)]
    assert step(next_s=20.0) == []
    assert step("c", next_s=20.0) == [Begun(("c",), 20.0, math.inf)]
    assert step(next_s=1.5) == [Begun((), 1.5, math.inf)]
    assert allowance.learned == allowance.asked


def test_the_work_of_a_step_grows_with_the_distance_of_its_tokens(other: Other) -> None:
    """A token is one, and one more for each 1,024 positions that it attends to."""
    allowance = Allowance()
    executor = AnnouncingExecutor(Still(), other.theirs, allowance)  # type: ignore[arg-type]
    for rows, expected in (
        (((0, 512),), 512 * 1.5),
        (((1023, 1),), 2.0),
        (((512, 512), (2047, 1), (0, 1)), 512 * 2.0 + 3.0 + 1025 / 1024),
    ):
        executor.collect(executor.execute(plan(*rows)))
        assert allowance.asked[-1] == allowance.learned[-1] == pytest.approx(expected)


@pytest.fixture
def server(other: Other) -> CoreServer:
    config = SchedulerConfig(2, 8, INFO.max_model_len, 4, 16)
    executor = FakeExecutor(num_blocks=16, block_size=4, max_num_seqs=2, vocab_size=VOCAB_SIZE)
    core = EngineCore(Scheduler(config, Fcfs(), PrefixCache(KEY)), executor, lambda: 0.0)
    return CoreServer(core, INFO, other.theirs)


def answers(server: CoreServer, other: Other, *commands: Any) -> list[Any]:
    """What is said when these commands have come together."""
    server._commands.extend(commands)
    server._take()
    assert not server._commands
    return [report.outputs for report in other.heard() if isinstance(report, Stepped)]


def test_what_is_refused_is_told_with_the_reason_and_the_rest_is_taken(server: CoreServer, other: Other) -> None:
    bad = replace(new_request("bad", [1]), prompt_token_ids=(VOCAB_SIZE,))
    (outputs,) = answers(server, other, Add(bad), Add(new_request("good", [1, 2])), Add(new_request("long", [1] * 40)))
    assert [(delta.request_id, delta.finish_reason) for delta in outputs.deltas] == [
        ("bad", "error"),
        ("long", "error"),
    ]
    assert "prompt_token_ids" in str(outputs.deltas[0].error) and "40" in str(outputs.deltas[1].error)
    assert outputs.record is None and outputs.gauges == Gauges(0, 1, 0.0)
    assert server._core.scheduler.has_work


def test_an_abort_is_told_when_no_step_will_tell_of_it(server: CoreServer, other: Other) -> None:
    assert answers(server, other, Add(new_request("a", [1, 2])), Add(new_request("b", [1, 2]))) == []
    server._core.step()
    assert answers(server, other, Abort("a")) == [], "the next step reports the room"
    (outputs,) = answers(server, other, Abort("b"))
    assert outputs.deltas == () and outputs.gauges == Gauges(0, 0, 0.0)
    assert answers(server, other, Abort("b"), Abort("never")) == []


def test_a_core_that_breaks_an_invariant_ends(server: CoreServer, other: Other) -> None:
    answers(server, other, Check())
    server._core.scheduler._pool.num_free -= 1
    with pytest.raises(AssertionError):
        answers(server, other, Check())
