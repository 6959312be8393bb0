"""The loop body, and the clock on it."""

import pytest

from quire.bench import core_clock
from quire.bench.core_clock import time_core
from quire.core.engine_core import EngineCore, Executor, OverlappingCore
from quire.core.limits import SchedulerConfig
from quire.core.plan import StepPlan, StepResult
from quire.core.policy import Fcfs
from quire.core.prefix_cache import PrefixCache
from quire.core.scheduler import Scheduler
from quire.executor.fake import FakeExecutor
from tests.core.harness import KEY, VOCAB_SIZE, alone, new_request


def parts(max_num_seqs: int) -> tuple[Scheduler, FakeExecutor]:
    config = SchedulerConfig(max_num_seqs, 64, 64, 4, 16 * max_num_seqs)
    fake = FakeExecutor(num_blocks=config.num_blocks, block_size=4, max_num_seqs=max_num_seqs, vocab_size=VOCAB_SIZE)
    return Scheduler(config, Fcfs(), PrefixCache(KEY)), fake


def test_steps_until_the_work_is_done() -> None:
    scheduler, fake = parts(4)
    executor: Executor = fake
    ticks = iter(range(100, 200))
    core = EngineCore(scheduler, executor, lambda: float(next(ticks)))
    assert core.step() == [] and core.scheduler.last_record.scheduled == ()
    requests = [new_request(name, [1, 2, number], max_tokens=3) for number, name in enumerate("abc")]
    for new in requests:
        core.scheduler.add(new)
    heard: dict[str, list[int]] = {}
    while core.scheduler.has_work:
        for delta in core.step():
            heard.setdefault(delta.request_id, []).extend(delta.token_ids)
        core.check()
    assert heard == {new.request_id: alone(new).token_ids for new in requests}
    assert (core.scheduler.last_record.now_s, core.scheduler.num_running, core.scheduler.num_waiting) == (102.0, 0, 0)
    core.scheduler.add(new_request("d", [1]))
    assert [delta.finish_reason for delta in core.scheduler.abort("d")] == ["abort"]
    core.close()


class CountingExecutor(FakeExecutor):
    """Counts what it is asked besides steps."""

    num_prepared = num_closed = 0

    def run_idle_work(self) -> bool:
        self.num_prepared += 1
        return self.num_prepared == 1

    def close(self) -> None:
        self.num_closed += 1


def test_the_core_hands_on_what_it_is_asked() -> None:
    scheduler, _ = parts(1)
    executor = CountingExecutor(num_blocks=16, block_size=4, max_num_seqs=1, vocab_size=VOCAB_SIZE)
    core = EngineCore(scheduler, executor, lambda: 0.0)
    for name in "abc":
        core.scheduler.add(new_request(name, [1, 2], max_tokens=3))
    core.step()
    assert (core.scheduler.num_running, core.scheduler.num_waiting, core.scheduler.cache_usage) == (1, 2, 1 / 16)
    assert [core.run_idle_work(), core.run_idle_work(), executor.num_prepared] == [True, False, 2]
    core.close()
    assert executor.num_closed == 1
    scheduler._free_rows.append(0)
    with pytest.raises(AssertionError, match="free rows and held rows are all rows"):
        core.check()


class LateExecutor:
    """Tells a result only when it is asked for, in order, and after the next step was started."""

    def __init__(self, inner: FakeExecutor) -> None:
        self.inner = inner
        self.started: list[StepResult] = []
        self.most_in_flight = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.started.append(self.inner.execute(plan))
        self.most_in_flight = max(self.most_in_flight, len(self.started))
        return self.started[-1]

    def collect(self, handle: StepResult) -> StepResult:
        assert self.started.pop(0) is handle
        return handle

    def close(self) -> None:
        self.inner.close()


def test_the_overlapping_loop_gives_the_same() -> None:
    scheduler, fake = parts(4)
    late = LateExecutor(fake)
    core = OverlappingCore(scheduler, late, lambda: 0.0)
    heard: dict[str, list[int]] = {}
    assert core.step() == []
    waves = [[new_request(f"{wave}{name}", [1, 2, number], max_tokens=3 + number, stop_token_ids=(4,))
              for number, name in enumerate("abcdef")] for wave in range(2)]  # fmt: skip
    for requests in waves:  # the second comes after a rest, in which a step was left in flight
        for new in requests:
            core.scheduler.add(new)
        num_steps = 0
        while core.scheduler.has_work:
            num_steps += 1
            for delta in core.step():
                heard.setdefault(delta.request_id, []).extend(delta.token_ids)
            core.check()
        assert num_steps < 25
    assert heard == {new.request_id: alone(new).token_ids for requests in waves for new in requests}
    assert late.most_in_flight == 2
    core.scheduler.add(new_request("late", [1]))
    assert [delta.finish_reason for delta in core.scheduler.abort("late")] == ["abort"]
    core.close()


def test_the_clock_counts_decoding_steps_only() -> None:
    def make(num_rows: int) -> tuple[Scheduler, FakeExecutor]:
        scheduler, fake = parts(num_rows)
        for number in range(num_rows):
            scheduler.add(new_request(str(number), range(30), max_tokens=20))
        return scheduler, fake

    times = time_core(make, 3, num_steps=5)
    assert (times.num_rows, times.num_steps) == (3, 5)
    assert min(times.schedule_us, times.update_us, times.executor_us) > 0
    assert times.core_us == times.schedule_us + times.update_us
    with pytest.raises(ValueError, match=r"ended after 1[0-9] of 50 steps"):
        time_core(make, 3, num_steps=50)


class Ticks:
    """A clock that stands still but for what the parts of a step add to it: schedule 3 us, execute 7, collect 11,
    update 5; ten times as much in a step that computes prompts."""

    def __init__(self, scheduler: Scheduler, executor: FakeExecutor) -> None:
        self.now_s = 0.0
        self._scheduler, self._executor = scheduler, executor
        self._scale = 1e-6

    def perf_counter(self) -> float:
        return self.now_s

    def schedule(self, now_s: float) -> StepPlan:
        plan = self._scheduler.schedule(now_s)
        self._scale = 1e-6 if plan.num_tokens == len(plan.scheduled) else 1e-5
        self.now_s += 3 * self._scale
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> object:
        self.now_s += 5 * self._scale
        return self._scheduler.update(plan, result)

    def execute(self, plan: StepPlan) -> StepResult:
        self.now_s += 7 * self._scale
        return self._executor.execute(plan)

    def collect(self, handle: StepResult) -> StepResult:
        self.now_s += 11 * self._scale
        return handle


def test_the_clock_tells_the_parts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(num_rows: int) -> tuple[Ticks, Ticks]:
        ticks = Ticks(*parts(num_rows))
        for number in range(num_rows):
            ticks._scheduler.add(new_request(str(number), range(30), max_tokens=20))
        monkeypatch.setattr(core_clock, "time", ticks)
        return ticks, ticks

    times = time_core(make, 2, num_steps=1)
    assert (times.schedule_us, times.executor_us, times.update_us) == pytest.approx((3, 18, 5))
    assert times.core_us == pytest.approx(8)
