"""What a core does while it rests: its invariants are stated, seldom; its memory is given back, late."""

import logging
import threading
import time
from typing import Any

import pytest

from quire.core.engine_core import EngineCore, OverlappingCore
from quire.core.limits import SchedulerConfig
from quire.core.policy import make_policy
from quire.core.prefix_cache import PrefixCache
from quire.core.scheduler import Scheduler
from quire.engine.channel import LocalChannel
from quire.engine.idle import CHECK_SHARE, RELEASE_AFTER_SECONDS, IdleChores
from quire.executor.fake import FakeExecutor
from tests.conftest import PATIENCE_S
from tests.core.harness import KEY, new_request
from tests.engine.scripted import Clock

LIMITS = SchedulerConfig(4, 64, 64, 4, 100, soft_block_limit=8)


class Resting:
    """A core that has computed, and its chores."""

    def __init__(self, release: str = "unused", core_type: type[EngineCore] = EngineCore) -> None:
        self.clock = Clock()
        self.executor = FakeExecutor(num_blocks=100, block_size=4, max_num_seqs=4, vocab_size=13)
        self.released: list[tuple[int, int]] = []
        self.executor.give_back = self.released.extend  # type: ignore[method-assign]
        scheduler = Scheduler(LIMITS, make_policy("fcfs"), PrefixCache(KEY))
        self.core = core_type(scheduler, self.executor, self.clock)
        self.chores = IdleChores(self.core, release, self.clock)
        self.num_checks = 0
        check = scheduler.check

        def counted() -> None:
            self.num_checks += 1
            self.clock.now_s += 0.002
            check()

        scheduler.check = counted  # type: ignore[method-assign]

    def compute(self, *names: str) -> list[tuple[str, tuple[int, ...]]]:
        for name in names:
            self.core.scheduler.add(new_request(name, [1, 2, 3, *name.encode()] * 6))
        deltas = []
        while self.core.scheduler.has_work:
            deltas += [(delta.request_id, delta.token_ids) for delta in self.core.step()]
        return sorted(deltas)


def test_invariants_are_stated_after_work_and_at_most_a_thousandth_of_the_time() -> None:
    resting = Resting("no")
    assert resting.chores.do_due() is None and resting.num_checks == 0, "nothing has changed"
    for count in range(1, 4):
        resting.compute(f"a{count}")
        assert resting.chores.do_due() is None and resting.num_checks == count
        resting.compute(f"b{count}")
        due_s = resting.chores.do_due()
        assert due_s == pytest.approx(0.002 / CHECK_SHARE) and resting.num_checks == count
        resting.clock.now_s += due_s


@pytest.mark.parametrize("core_type", [EngineCore, OverlappingCore])
def test_a_violation_is_logged_and_the_core_computes_on(
    core_type: type[EngineCore], caplog: pytest.LogCaptureFixture
) -> None:
    resting = Resting(core_type=core_type)
    expected = resting.compute("a", "b")
    resting.core.scheduler._pool._num_holders[0] += 1
    with caplog.at_level(logging.ERROR):
        resting.chores.do_due()
    assert "broken invariant" in caplog.text
    assert resting.compute("a", "b") == expected
    resting.core.scheduler.check()


@pytest.mark.parametrize(("release", "num_cached"), [("unused", 8), ("all", 0)])
def test_memory_is_given_back_after_a_rest(release: str, num_cached: int) -> None:
    resting = Resting(release)
    resting.compute("a", "b", "c")
    pool = resting.core.scheduler._pool
    touched = pool.num_touched
    assert touched > 8
    resting.chores.begin()
    due_s = resting.chores.do_due()
    assert due_s is not None and 0 < due_s <= RELEASE_AFTER_SECONDS and not resting.released
    resting.clock.now_s += due_s
    assert resting.chores.do_due() is None
    assert pool.num_cached == num_cached and sum(number for _, number in resting.released) == touched - num_cached
    resting.released.clear()
    assert resting.chores.do_due() is None and not resting.released, "once"
    resting.compute("a")


def test_no_memory_is_given_back_where_none_is_to_be() -> None:
    resting = Resting("no")
    resting.compute("a")
    resting.chores.begin()
    resting.clock.now_s += 10 * RELEASE_AFTER_SECONDS
    assert resting.chores.do_due() is None and not resting.released


def test_a_channel_that_waits_does_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own clock, without being woken."""
    monkeypatch.setattr("quire.engine.idle.RELEASE_AFTER_SECONDS", 0.05)
    resting = Resting("all")
    channel: Any = LocalChannel(resting.core, "all")
    resting.compute("a")
    waiting = threading.Thread(target=channel.wait)
    waiting.start()
    end_s = time.monotonic() + PATIENCE_S
    while not resting.released and time.monotonic() < end_s:
        time.sleep(0.005)
    channel.wake()
    waiting.join(PATIENCE_S)
    assert resting.released and resting.num_checks == 1 and not waiting.is_alive()
