"""Hung, starved, or at work: judged by a clock and by what the system says of a process."""

import math

from quire.isolation.heartbeat import FIRST_SECONDS, LEAST_SECONDS, RECHECK_S, SLACK, Activity, Heartbeat, StepAllowance


class World:
    """A clock, and a process each of whose threads uses a processor for its part of the time."""

    def __init__(self, *speeds: float, is_awake: bool = True, is_told: bool = True) -> None:
        self.now_s = 0.0
        self.used_s = dict.fromkeys(range(len(speeds)), 0.0)
        self.speeds, self.is_awake, self.is_told = speeds, is_awake, is_told
        self.heartbeat = Heartbeat(lambda: self.now_s, self.activity)

    def activity(self) -> Activity | None:
        return Activity(dict(self.used_s), self.is_awake) if self.is_told else None

    def seconds_until_hung(self, most_s: float = 100.0) -> float:
        """`inf` if it is not, within `most_s`. Looks when the watcher would."""
        start_s = self.now_s
        while self.now_s < start_s + most_s:
            step_s = max(0.0, min(self.heartbeat.next_check_s, start_s + most_s) - self.now_s) + 0.001
            self.now_s += step_s
            for thread, speed in enumerate(self.speeds):
                self.used_s[thread] += step_s * speed
            if self.heartbeat.is_hung():
                return self.now_s - start_s
        return math.inf


def test_without_the_systems_word_time_alone_decides() -> None:
    world = World(is_told=False)
    world.heartbeat.expect(10.0, 1.5)
    assert 10.0 <= world.seconds_until_hung() < 10.1


def test_nobody_awake_is_seen_long_before_the_time_is_up() -> None:
    world = World(0.0, is_awake=False)
    world.heartbeat.expect(60.0, 1.5)
    assert 1.5 <= world.seconds_until_hung() < 1.6 + RECHECK_S
    world.heartbeat.expect(60.0)  # a device computes: sleeping is no sign
    assert 60.0 <= world.seconds_until_hung() < 60.1


def test_between_two_threads_is_no_sleep() -> None:
    world = World(0.0, is_awake=False)
    world.heartbeat.expect(60.0, 1.5)
    world.now_s = 1.6
    assert not world.heartbeat.is_hung()
    world.is_awake, world.now_s = True, 1.9
    assert not world.heartbeat.is_hung()
    world.is_awake, world.now_s = False, 3.5
    assert not world.heartbeat.is_hung()


def test_one_that_computes_for_ever_is_hung_when_its_time_is_up() -> None:
    world = World(0.0, 1.0)
    world.heartbeat.expect(20.0, 1.5)
    assert 20.0 <= world.seconds_until_hung() < 20.1


def test_one_that_gets_no_processor_is_not() -> None:
    world = World(0.0001, 0.01)
    world.heartbeat.expect(2.0, 1.5)
    assert world.seconds_until_hung(99.0) == math.inf


def test_many_threads_that_share_the_work_of_a_step_are_no_hang() -> None:
    """A step that should take 2 s and may take 20: on a machine that others keep busy, eight threads have not done
    their 2 s each in twice that time."""
    world = World(*[0.04] * 8)
    world.heartbeat.expect(20.0, 1.5)
    assert world.seconds_until_hung(2.0 / 0.04) == math.inf


def test_one_that_computes_for_ever_on_a_busy_machine_is_hung_in_the_end() -> None:
    """What it has used counts from the last word on, however long it took to get it."""
    world = World(0.05, 0.0)
    world.heartbeat.expect(2.0, 1.5)
    assert 1.0 / 0.05 < world.seconds_until_hung() < 1.0 / 0.05 + 1.5 + 2.0 + 0.1
    world.heartbeat.heard()
    assert world.seconds_until_hung(1.0 / 0.05) == math.inf, "a word ends the account"


def test_a_thread_that_is_new_has_used_all_that_it_has() -> None:
    world = World(0.0)
    world.heartbeat.expect(2.0, 1.0)
    world.now_s = 1.01
    assert not world.heartbeat.is_hung()
    world.used_s[7], world.now_s = 1.1, 2.02
    assert world.heartbeat.is_hung()
    world.used_s[7] = 0.9
    assert not world.heartbeat.is_hung()


def test_a_word_begins_anew() -> None:
    world = World(is_told=False)
    world.heartbeat.expect(2.0)
    for _ in range(9):
        world.now_s += 1.9
        assert not world.heartbeat.is_hung()
        world.heartbeat.heard()
    assert 2.0 <= world.seconds_until_hung() < 2.1


def test_steps_are_judged_by_those_of_their_size() -> None:
    allowance = StepAllowance()
    assert (allowance.seconds_for(1.0), allowance.idle_timeout_s) == (FIRST_SECONDS, math.inf)
    allowance.observe(16.0, 0.01)
    assert allowance.seconds_for(1.0) == allowance.seconds_for(16.0) == LEAST_SECONDS
    assert allowance.seconds_for(16 * 1024.0) == SLACK * 0.01 * 1024
    allowance.observe(16 * 1024.0, 4.0)
    assert allowance.seconds_for(16 * 1024.0) == SLACK * 4.0
    assert allowance.seconds_for(16.0) == LEAST_SECONDS


def test_the_longest_step_of_a_size_is_what_counts() -> None:
    """And a longer one of a smaller size: more work takes no less time."""
    allowance = StepAllowance()
    for seconds in (0.3, 2.0, 0.1):
        allowance.observe(1000.0, seconds)
    assert allowance.seconds_for(1000.0) == SLACK * 2.0
    allowance.observe(2000.0, 0.1)
    assert allowance.seconds_for(2000.0) == SLACK * 2.0
    assert allowance.seconds_for(4000.0) == 2 * SLACK * 2.0


def test_first_steps_are_judged_by_the_size_of_the_model() -> None:
    small, large, huge = (StepAllowance(size) for size in (4 * 2**20, 270 * 10**6, 16 * 10**9))
    assert small.seconds_for(1.0) == LEAST_SECONDS and small.seconds_for(512.0) == LEAST_SECONDS
    assert LEAST_SECONDS <= large.seconds_for(1.0) < large.seconds_for(512.0) < 20.0
    assert huge.seconds_for(2048.0) == FIRST_SECONDS
    assert small.idle_timeout_s == LEAST_SECONDS


def test_a_timeout_that_was_asked_for_holds_for_every_step() -> None:
    allowance = StepAllowance(4 * 2**20, 7.0)
    allowance.observe(16.0, 3.0)
    assert [allowance.seconds_for(work) for work in (1.0, 16.0, 1e6)] == [7.0] * 3
    assert allowance.idle_timeout_s == math.inf
