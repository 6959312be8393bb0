"""What a live view shows equals what the scheduler holds, after every step."""

import random
from dataclasses import replace

import numpy as np
import pytest

from quire.core.plan import StepRecord
from quire.core.request import NewRequest, SamplingSpec
from quire.observe.live import FEW_SAMPLES, MOST_ENDED, LiveView
from tests.core.harness import Harness


class Watched(Harness):
    """A harness whose events a live view is told."""

    def __init__(self, **limits: object) -> None:
        super().__init__(**limits)  # type: ignore[arg-type]
        caching = limits.get("prefix_caching", True)
        self.view = LiveView(self.scheduler.config.block_size, remembers=bool(caching))
        self.now_s = 0.0
        self.seen_version, self.seen_blocks, self.seen_cached = -1, dict[str, list[int]](), set[int]()

    def follow(self) -> None:
        """A viewer that is sent what has changed since its last frame knows what a new one is sent."""
        frame, whole = self.view.frame(self.seen_version), self.view.frame(-1)
        for item in frame["requests"]:
            self.seen_blocks[item["name"]] = item["blocks"] or (
                [] if item["blocks"] == [] else self.seen_blocks.get(item["name"], [])
            )
        if frame["cached"] is not None:
            self.seen_cached = {*frame["cached"]}
        self.seen_version = frame["version"]
        assert {item["name"]: item["blocks"] or [] for item in whole["requests"]} == {
            item["name"]: self.seen_blocks[item["name"]] for item in whole["requests"]
        }
        assert self.seen_cached == {*whole["cached"]}

    def watch(self) -> None:
        """One step, and what an engine reports of it."""
        plan = self.scheduler.schedule(self.now_s)
        self.view.observe(self.scheduler.last_record)
        self.agree()
        deltas = self.scheduler.update(plan, self.executor.execute(plan))
        self.now_s += 0.5
        for delta in deltas:
            self.view.tokens(delta.request_id, len(delta.token_ids), self.now_s, None, 0.1)
            if delta.finish_reason is not None:
                self.view.end(delta.request_id, delta.finish_reason, self.now_s)
        self.agree()

    def agree(self) -> None:
        frame = self.view.frame(-1)
        self.follow()
        pool = self.scheduler._pool
        shown = {item["name"]: item["blocks"] for item in frame["requests"] if item["blocks"]}
        assert shown == {item.new.request_id: item.block_ids for item in self.scheduler._running}
        assert frame["num_running"] == self.scheduler.num_running
        assert frame["num_waiting"] == self.scheduler.num_waiting
        assert frame["tokens_per_s"] == 0 or self.scheduler.has_work
        known = {block for block, text in enumerate(pool._hash_of) if text is not None and not pool._num_holders[block]}
        assert known <= {*frame["cached"]} if frame["cached"] else not known
        # Of two equal blocks the pool remembers one; the view cannot know that.
        assert len({*frame["cached"]} - known) <= len(frame["cached"]) // 2 + 1


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_are_those_of_the_scheduler(seed: int, caching: bool) -> None:
    rng = random.Random(seed)
    watched = Watched(
        num_blocks=rng.choice([8, 16]), block_size=rng.choice([1, 2, 4]), max_model_len=8, prefix_caching=caching
    )
    preempted = 0
    for number in range(60):
        if rng.random() < 0.6:
            prompt = (*rng.choice([(1, 2, 3, 4), (5, 6), ()]), rng.randrange(9))
            new = NewRequest(str(number), prompt[:6], rng.randint(1, 6), SamplingSpec(seed=number))
            watched.scheduler.add(new)
            watched.view.add(new, new.request_id, 0)
        if watched.scheduler.has_work:
            watched.watch()
            preempted += sum(item.reason == "preempted" for item in watched.scheduler.last_record.stalled)
        if rng.random() < 0.1 and watched.scheduler._running:
            name = rng.choice(watched.scheduler._running).new.request_id
            watched.scheduler.abort(name)
            watched.view.end(name, "abort", watched.now_s)
            watched.agree()
    assert watched.view.frame(-1)["step"] > 20


def test_states_reasons_and_steps() -> None:
    watched = Watched(num_blocks=4, block_size=4, max_num_seqs=2, max_model_len=16)
    for name in ("a", "b", "c"):
        new = NewRequest(name, tuple(range(6)), 8, SamplingSpec(seed=1))
        watched.scheduler.add(new)
        watched.view.add(new, name, 0)
    watched.watch()
    first_version = watched.view.frame(-1)["version"]
    states = {item["name"]: (item["state"], item["reason"]) for item in watched.view.frame(-1)["requests"]}
    assert states["a"] == ("prefill", "") and states["c"][0] == "waiting"
    watched.watch()
    frame = watched.view.frame(-1)
    assert next(item for item in frame["requests"] if item["name"] == "a")["state"] == "decode"
    (_, _, first, _), (_, _, second, waits) = frame["steps"][:2]
    assert first[0][1:] == (6, False) and second[0][1:] == (1, True)
    assert waits, "one waits, and the step says why"
    assert [step[0] for step in watched.view.frame(first_version)["steps"]] == [1]


def test_rows_that_stay_are_sent_once_and_whole_to_who_comes_later() -> None:
    watched = Watched(num_blocks=16, block_size=4, max_model_len=16)
    new = NewRequest("a", (1, 2, 3), 6, SamplingSpec())
    watched.scheduler.add(new)
    watched.view.add(new, "a", 0)
    versions = []
    for _ in range(4):
        watched.watch()
        versions.append(watched.view.frame(-1)["version"])
    rows = [step[2] for step in watched.view.frame(-1)["steps"]]
    assert rows == [[(0, 3, False)], [(0, 1, True)], None, None]
    assert [step[2] for step in watched.view.frame(versions[1])["steps"]] == [[(0, 1, True)], None]


def test_times_of_steps_are_noted_for_a_viewer_and_not_of_every_step() -> None:
    view = LiveView(16, weight_bytes=1000, token_bytes=10)
    view.add(NewRequest("a", (1, 2), 400, SamplingSpec()), "a", 0)

    def step(number: int, tokens: int = 1) -> None:
        view.observe(StepRecord(number, number * 0.01, (("a", 2 + number, tokens),), (), 1, 0, 9, 0, 9, 0, 0))

    step(0)
    step(1)
    assert view.frame(-1)["read_bytes_per_s"] == 0.0, "no viewer has come"
    for number in range(1, 40):
        view.observe(StepRecord(number - 40, number * 0.01 - 1, (("a", 0, 1),), (), 1, 0, 9, 0, 9, 0, 0))
    assert view.frame(-1)["read_bytes_per_s"] == 0.0, "these are a prompt's"
    view._samples.clear()
    step(1)
    for number in range(2, 12):
        step(number)
    # Each step of 10 ms reads the weights and the row's 2 + n tokens, and itself.
    assert view.frame(-1)["read_bytes_per_s"] == pytest.approx((1000 + 10 * (3 + 6)) / 0.01, rel=0.02)
    for number in range(12, 200):
        step(number)
    assert FEW_SAMPLES < len(view._samples) < 100


def test_ended_requests_are_bounded_and_keep_no_blocks() -> None:
    watched = Watched(num_blocks=16, block_size=4, max_model_len=16)
    for number in range(MOST_ENDED + 20):
        new = NewRequest(str(number), (number % 7, 2), 1, SamplingSpec())
        watched.scheduler.add(new)
        watched.view.add(new, str(number), 0)
        watched.watch()
    frame = watched.view.frame(10**9)
    assert len(frame["ended"]) == MOST_ENDED and not frame["requests"] and not frame["steps"]
    assert all(not item["blocks"] and item["state"] == "length" for item in frame["ended"])


def test_the_last_block_is_remembered_where_it_is_full_alone() -> None:
    watched = Watched(num_blocks=16, block_size=4, max_model_len=16)
    for name, prompt in (("five", (1, 2, 3, 4, 5)), ("eight", tuple(range(10, 18)))):
        new = NewRequest(name, prompt, 1, SamplingSpec())
        watched.scheduler.add(new)
        watched.view.add(new, name, 0)
    watched.watch()
    assert len(watched.view.frame(-1)["cached"]) == 1 + 2


def test_rates_and_percentiles() -> None:
    view = LiveView()
    view.add(replace(NewRequest("r", (1,), 9, SamplingSpec())), "r", 0)
    view.tokens("r", 1, 10.0, 9.0, None)
    for step in range(1, 21):
        view.tokens("r", 2, 10.0 + step, None, 0.2)
    view.tokens("r", 1, 31.0, 26.0, None)
    frame = view.frame(-1)
    assert frame["ttft_s"] == {f"p{p}": pytest.approx(np.percentile([1.0, 5.0], p)) for p in (50, 90, 99)} and frame[
        "itl_s"
    ]["p99"] == pytest.approx(0.1)
    assert frame["tokens_per_s"] == pytest.approx(5 / 2.0)  # three events are within two seconds
    assert frame["requests"][0]["num_output"] == 42


def test_another_core_begins_without_blocks() -> None:
    watched = Watched(num_blocks=16, block_size=4, max_model_len=16)
    new = NewRequest("a", (1, 2, 3, 4, 5), 8, SamplingSpec())
    watched.scheduler.add(new)
    watched.view.add(new, "a", 0)
    watched.watch()
    watched.view.core_replaced()
    frame = watched.view.frame(-1)
    assert frame["requests"][0]["blocks"] == [] and frame["requests"][0]["state"] == "waiting" and not frame["cached"]
