"""A request that an admission rule holds: what `explain` says of it, and that waiting for it is no hang."""

import socket
import threading
from typing import Any

import pytest

from quire.core.engine_core import EngineCore
from quire.core.limits import SchedulerConfig
from quire.core.policy import make_policy
from quire.core.prefix_cache import NullPrefixCache
from quire.core.request import Request
from quire.core.scheduler import Scheduler
from quire.engine.channel import LocalChannel
from quire.executor.fake import FakeExecutor
from quire.isolation.core_server import AnnouncingExecutor
from quire.isolation.heartbeat import StepAllowance
from quire.observe.explain import explain
from quire.observe.timelines import RequestTimelines
from quire.outputs import Explanation
from tests.core.harness import VOCAB_SIZE, new_request


class Holding:
    """A throw-away rule: holds requests named `held` for so many questions."""

    def __init__(self, num_questions: int) -> None:
        self.num_left = num_questions

    def ready(self, request: Request) -> str | None:
        if not request.new.request_id.startswith("held"):
            return None
        self.num_left -= 1
        return None if self.num_left < 0 else "grammar_compiling"


class Clocked:
    """A core whose steps take a second each, and the timelines of its requests."""

    def __init__(self, rule: Holding, max_num_seqs: int = 2) -> None:
        self.now_s = 0.0
        self.timelines = RequestTimelines()
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs, 32, 32, 4, 16), make_policy("fcfs"), NullPrefixCache(), [rule]
        )
        self.executor = FakeExecutor(num_blocks=16, block_size=4, max_num_seqs=max_num_seqs, vocab_size=VOCAB_SIZE)
        self.core = EngineCore(scheduler, self.executor, lambda: self.now_s)

    def add(self, name: str, max_tokens: int) -> None:
        new = new_request(name, [1, 2, 3], max_tokens)
        self.core.scheduler.add(new)
        self.timelines.add(new, name, 0, self.now_s)

    def step(self) -> None:
        deltas = self.core.step()
        self.timelines.observe(self.core.scheduler.last_record)
        self.now_s += 1.0
        for delta in deltas:
            if delta.finish_reason is not None:
                self.timelines.end(delta.request_id, delta.finish_reason, 1, self.now_s)

    def explain(self, name: str) -> Explanation:
        (times,) = self.timelines.find(name)
        return explain(times, self.now_s, self.timelines.name_of)


def test_explain_names_what_held_a_request() -> None:
    """While it waits and afterwards; the row that another one lacked meanwhile is not what it waited for."""
    story = Clocked(Holding(6), max_num_seqs=1)
    story.add("held", 2)
    story.add("runs", 4)
    story.add("lacks a row", 4)
    for _ in range(3):
        story.step()
    waiting = story.explain("held")
    assert (waiting.largest, waiting.queued_because) == ("queued", {"grammar_compiling": pytest.approx(2.0)})
    while story.core.scheduler.has_work:
        story.step()
    found = story.explain("held")
    assert found.queued_because == {"grammar_compiling": pytest.approx(6.0), "no_row": pytest.approx(2.0)}
    assert "since it could not enter before this was ready: grammar compiling" in found.sentence
    assert sum(found.parts.values()) == pytest.approx(found.total_s)
    other = story.explain("lacks a row")
    assert other.queued_because == {"no_row": pytest.approx(4.0)}


def test_an_empty_step_teaches_the_hang_detection_nothing() -> None:
    """Its microseconds would be the measure of the first step that computes something, which would count as hung."""
    ours, theirs = socket.socketpair()
    allowance = StepAllowance(host_weight_bytes=2**34)
    first_s = allowance.seconds_for(500.0)
    story = Clocked(Holding(3))
    story.core._executor = AnnouncingExecutor(story.executor, theirs, allowance)
    story.add("held", 2)
    for _ in range(3):
        story.step()
        assert story.core.scheduler.is_held and allowance.seconds_for(500.0) == first_s > 10.0
    story.step()
    assert not story.core.scheduler.is_held and allowance.seconds_for(500.0) != first_s
    ours.close()
    theirs.close()


class CountedEvent(threading.Event):
    """Notes for how long it is waited for, and waits for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Any] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return False


def test_a_core_whose_requests_are_all_held_does_not_spin() -> None:
    """Between two steps it waits a moment, or until a command comes; where one request runs it does not wait."""
    story, awake = Clocked(Holding(2)), CountedEvent()
    channel = LocalChannel(story.core)
    channel._awake = awake
    story.add("held", 2)
    story.step()
    channel.wait()
    (moment,) = awake.waits
    assert 0 < moment < 0.1
    story.add("runs", 3)
    story.step()
    channel.wait()
    assert len(awake.waits) == 1
    while story.core.scheduler.has_work:
        channel.wait()
        story.step()
    assert len(awake.waits) == 1
