"""Where time goes: the parts of a timeline add up, and each cause is found under its own name."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from quire.core.plan import ScheduledRequest, Stalled, StepRecord
from quire.observe.explain import Explanation, explain
from quire.observe.timelines import RequestTimelines, Timeline
from tests.core.harness import new_request


class Story:
    """Steps with chosen durations, given to the timelines as the core's records give them."""

    def __init__(self, max_remembered: int = 16) -> None:
        self.timelines = RequestTimelines(max_remembered)
        self.now_s = 100.0
        self.step_id = 0

    def arrive(self, name: str, num_prompt_tokens: int = 10, prepared_s: float = 0.0) -> None:
        new = replace(new_request(name, [1] * num_prompt_tokens), arrival_s=self.now_s - prepared_s)
        self.timelines.add(new, f"public-{name}", 0, self.now_s)

    def step(
        self, seconds: float, *scheduled: tuple[str, int, int], stalled: tuple[tuple[str, str, str | None], ...] = ()
    ) -> None:
        """A step that begins now and takes `seconds`."""
        self.timelines.observe(
            StepRecord(
                self.step_id,
                self.now_s,
                tuple(ScheduledRequest(*item) for item in scheduled),
                tuple(Stalled(*item) for item in stalled),
                *(1, 1, 1, 1, 1, 0, 0),
            )
        )
        self.step_id += 1
        self.now_s += seconds

    def end(self, name: str, num_tokens: int = 1) -> Explanation:
        self.timelines.end(name, "length", num_tokens, self.now_s)
        return self.explain(name)

    def explain(self, name: str) -> Explanation:
        (times,) = self.timelines.find(f"public-{name}")
        found = explain(times, self.now_s, self.timelines.name_of)
        assert sum(found.parts.values()) == pytest.approx(found.total_s, abs=1e-9)
        return found


def seconds_of(found: Explanation) -> dict[str, float]:
    return {name: pytest.approx(value, abs=1e-6) for name, value in found.parts.items() if value > 1e-9}


def test_a_request_alone_prefills_and_decodes() -> None:
    story = Story()
    story.arrive("a", prepared_s=0.25)
    story.now_s += 0.5
    story.step(0.2, ("a", 0, 8))
    story.step(0.1, ("a", 8, 2))
    for position in range(10, 15):
        story.step(0.05, ("a", position, 1))
    found = story.end("a", 6)
    assert seconds_of(found) == {"preparing": 0.25, "queued": 0.5, "prefilling": 0.3, "decoding": 0.25}
    assert found.largest == "queued"
    assert found.sentence == "500.0 ms of 1.30 s (38%) was spent in the queue."


def test_the_queue_names_what_the_head_lacked() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    story.arrive("b")
    story.arrive("c")
    for position in range(10, 14):
        story.step(1.0, ("a", position, 1), stalled=(("b", "no_row", None),))
    story.end("a")
    story.step(0.1, ("b", 0, 10), stalled=(("c", "no_blocks", None),))
    found = story.end("b")
    assert found.queued_because == {"no_row": pytest.approx(4.0)}
    assert "max_num_seqs requests were running" in found.sentence
    assert found.parts["queued"] == pytest.approx(4.0)
    story.step(0.1, ("c", 0, 10))
    found = story.end("c")
    assert found.queued_because == {"no_row": pytest.approx(4.0), "no_blocks": pytest.approx(0.1)}
    assert "max_num_seqs requests were running" in found.sentence, "the larger part of it"


def test_a_batch_mates_prompt_is_named() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    for position in range(10, 13):
        story.step(0.1, ("a", position, 1))
    story.arrive("b", 2000)
    for chunk in range(2):
        story.step(1.1, ("a", 13 + chunk, 1), ("b", 1000 * chunk, 1000))
    story.step(0.1, ("b", 2000, 1), stalled=(("a", "budget", "b"),))
    found = story.end("a", 5)
    assert found.largest == "waiting_for_prefill"
    assert found.parts["waiting_for_prefill"] == pytest.approx(2 * 1.0 + 0.1)
    assert found.parts["decoding"] == pytest.approx(0.5)
    assert found.waited_for == {"public-b": pytest.approx(0.1)}
    assert found.sentence.endswith("most of all for public-b.")


def test_prompts_of_one_step_share_it_by_tokens() -> None:
    story = Story()
    story.arrive("a")
    story.arrive("b", 30)
    story.step(1.0, ("a", 0, 10), ("b", 0, 30))
    assert seconds_of(story.end("a")) == {"prefilling": 0.25, "waiting_for_prefill": 0.75}
    assert seconds_of(story.end("b")) == {"prefilling": 0.75, "waiting_for_prefill": 0.25}


def test_preemption_lasts_until_the_way_back() -> None:
    story = Story()
    story.arrive("a")
    story.arrive("b")
    story.step(0.1, ("a", 0, 10), ("b", 0, 10))
    story.step(0.1, ("a", 10, 1), ("b", 10, 1))
    story.step(0.5, ("a", 11, 1), stalled=(("b", "preempted", "a"),))
    story.step(0.5, ("a", 12, 1), stalled=(("b", "no_blocks", None),))
    story.end("a")
    story.step(0.2, ("b", 0, 11))
    story.step(0.1, ("b", 11, 1))
    found = story.end("b")
    assert seconds_of(found) == {
        "preempted": 1.0, "prefilling": 0.25, "waiting_for_prefill": 0.05, "decoding": 0.2,
    }  # fmt: skip
    assert found.num_preemptions == 1
    assert found.waited_for == {"public-a": pytest.approx(1.0)}
    assert "(1 times), most of all for public-a" in found.sentence


def test_a_new_core_is_a_recovery() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    story.step(0.1, ("a", 10, 1))
    story.step(2.0, ("a", 11, 1))
    story.step_id = 0
    story.step(0.1, ("a", 0, 11))
    story.step(0.1, ("a", 11, 1))
    assert seconds_of(story.end("a")) == {"recovering": 2.0, "prefilling": 0.2, "decoding": 0.2}


def test_a_replaced_core_is_named() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    story.timelines.core_replaced()
    story.arrive("b")
    story.step(0.1, ("a", 10, 1), ("b", 0, 10))
    found = story.end("a")
    assert found.num_restarts == 1 and found.sentence.endswith("; the engine's core was replaced once meanwhile.")
    story.timelines.core_replaced()
    story.timelines.core_replaced()
    found = story.end("b")
    assert found.num_restarts == 2 and "2 times" in found.sentence


def test_text_and_socket_come_last() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    story.end("a")
    story.timelines.made("public-a", "", story.now_s + 0.25)
    assert [item.request_id for item in story.timelines.sent("public-a", "", 99.5, story.now_s + 1.25)] == ["public-a"]
    assert seconds_of(story.explain("a")) == {
        "preparing": 0.5, "prefilling": 0.1, "detokenising": 0.25, "sending": 1.0,
    }  # fmt: skip
    assert "reader took the answer slowly" in story.explain("a").sentence


def test_a_request_that_runs_can_be_asked() -> None:
    story = Story()
    story.arrive("a")
    story.now_s += 1.0
    assert seconds_of(story.explain("a")) == {"queued": 1.0}
    story.step(0.5, ("a", 0, 10))
    found = story.explain("a")
    assert not found.finished
    assert seconds_of(found) == {"queued": 1.0, "prefilling": 0.5}


def test_only_so_many_are_remembered() -> None:
    story = Story(max_remembered=4)
    story.arrive("old")
    for number in range(100):
        story.arrive(str(number))
        story.step(0.1, (str(number), 0, 10))
        story.end(str(number))
    assert story.timelines.find("public-0") == []
    assert story.timelines.find("public-99") != []
    assert story.timelines.find("public-old") != [], "one that lives is never forgotten"
    assert len(story.timelines._requests) == 5 and len(story.timelines._names) == 5
    story.end("old")
    assert len(story.timelines._requests) == 4 and len(story.timelines._names) == 4
    assert story.timelines.find("public-old") != [] and story.timelines.find("public-96") == []


def test_one_more_request_costs_the_same_however_many_live() -> None:
    """Counted in lines of Python: 100,000 that wait once cost hours to queue, since each walked past all others."""

    def lines_of(function: Callable[[], object]) -> int:
        count = 0

        def trace(frame: object, event: str, argument: object) -> object:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            function()
        finally:
            sys.settrace(before)
        return count

    story, costs = Story(max_remembered=4), []
    for number in range(2000):
        if number in (20, 1999):
            costs.append(lines_of(lambda: story.arrive("measured-" + str(len(costs)))))
            costs.append(lines_of(lambda: story.timelines.end("measured-" + str(len(costs) - 1), "stop", 1, 1.0)))
        else:
            story.arrive(str(number))
    assert costs[:2] == costs[2:] and costs[0] > 5


def test_an_end_that_was_interrupted_is_repeated() -> None:
    story = Story()
    story.arrive("a")
    timeline = story.timelines._live["a"]
    timeline.ended_s = 1.0  # as far as it came
    story.timelines.end("a", "abort", 0, story.now_s)
    story.timelines.end("a", "abort", 0, story.now_s)
    assert not story.timelines._live and list(story.timelines._ended) == [("", "public-a")]


def test_numbered_requests_of_one_response_are_found_together() -> None:
    timelines = RequestTimelines()
    for number in range(3):
        timelines.add(new_request(str(number), [1]), f"cmpl-x/{number}", 0, 1.0)
    assert [item.request_id for item in timelines.find("cmpl-x")] == [f"cmpl-x/{number}" for number in range(3)]
    assert timelines.find("cmpl") == []


def test_a_name_that_comes_again_is_another_request() -> None:
    """Of the same caller, after the first has ended; of another caller, also at the same time."""
    timelines = RequestTimelines()

    def add(core_id: str, caller: str, number: int) -> None:
        timelines.add(replace(new_request(core_id, [1]), caller=caller), f"cmpl-x/{number}", 0, 1.0)

    for number in range(3):
        add(f"a{number}", "ann", number)
    add("b0", "bob", 0)
    found = [(item.caller, item.request_id, len(item.sequences)) for item in timelines.find("cmpl-x")]
    assert found == [*(("ann", f"cmpl-x/{number}", 1) for number in range(3)), ("bob", "cmpl-x/0", 1)]
    assert [item.caller for item in timelines.sent("cmpl-x", "bob", 1.0, 2.0)] == ["bob"]
    assert [item.sent_s for item in timelines.find("cmpl-x")] == [None, None, None, 2.0]
    for number in range(3):
        timelines.end(f"a{number}", "stop", 1, 2.0)
    add("again", "ann", 0)
    assert [(item.caller, item.has_ended) for item in timelines.find("cmpl-x")] == [("bob", False), ("ann", False)]


def test_a_request_that_waits_for_probes_of_others_recovers() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    story.timelines.core_replaced()
    story.step_id = 0
    story.step(0.2, ("a", 0, 11))
    story.step(0.1, ("a", 11, 1), stalled=(("a", "quarantined", None),))
    story.step(5.0, ("b", 0, 9))
    story.step(0.3, ("a", 0, 12))
    assert seconds_of(story.end("a")) == {"prefilling": 0.5, "recovering": 5.2}


def test_one_that_leaves_the_queue_without_a_step_waited_for_what_the_head_lacked_meanwhile() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    story.arrive("b")
    story.step(4.0, ("a", 10, 1), stalled=(("b", "no_row", None),))
    story.arrive("c")
    story.step(1.5, ("a", 11, 1), stalled=(("b", "no_row", None),))
    story.step(0.5, ("a", 12, 1), stalled=(("b", "no_blocks", None),))
    story.step(0.1, ("a", 13, 1))
    found = story.end("c", 0)
    assert found.queued_because == {"no_row": pytest.approx(1.5), "no_blocks": pytest.approx(0.5)}
    assert seconds_of(found) == {"queued": 2.1}


def test_a_prompt_costs_those_who_decode_the_time_over_the_mean_of_steps_without_one() -> None:
    """The running mean gives the newest step a tenth of its weight."""
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    durations, mean_s = [0.1, 0.3, 0.3, 0.2, 0.05], None
    for position, seconds in enumerate(durations):
        story.step(seconds, ("a", 10 + position, 1))
        mean_s = seconds if mean_s is None else 0.9 * mean_s + 0.1 * seconds
    story.arrive("b", 1000)
    story.step(2.0, ("a", 15, 1), ("b", 0, 1000))
    story.step(0.1, ("a", 16, 1), ("b", 1000, 1))
    found = story.end("a")
    assert mean_s is not None
    assert found.parts["waiting_for_prefill"] == pytest.approx(2.0 - mean_s)
    assert found.parts["decoding"] == pytest.approx(sum(durations) + mean_s + 0.1)


def test_the_way_back_from_a_preemption_is_prefill_also_where_the_cache_has_the_prompt() -> None:
    story = Story()
    story.arrive("a")
    story.step(0.1, ("a", 0, 10))
    for position in range(10, 18):
        story.step(0.1, ("a", position, 1))
    story.step(1.0, stalled=(("a", "preempted", None),))
    story.step(0.5, ("a", 16, 2))
    story.step(0.1, ("a", 18, 1))
    assert seconds_of(story.end("a")) == {"preempted": 1.0, "prefilling": 0.6, "decoding": 0.9}


def test_the_one_that_was_waited_for_longest_is_named_first_by_its_public_name() -> None:
    """Two sequences of one request are one; and no more than eight are kept."""
    story = Story(max_remembered=64)
    story.arrive("a")
    for number in range(12):
        story.arrive(f"b{number}")
    story.timelines.add(replace(new_request("b3.2", [1]), arrival_s=story.now_s), "public-b3", 1, story.now_s)
    story.step(0.1, ("a", 0, 10))
    waits = {"b0": 1.0, "b1": 2.0, "b2": 3.0, "b3": 1.8, "b3.2": 1.9, "b4": 0.5, "b5": 0.4, "b6": 0.3, "b7": 0.2}
    for name, seconds in waits.items():
        story.step(seconds, stalled=(("a", "no_blocks", name),))
    found = story.end("a")
    assert list(found.waited_for.items())[:2] == [
        ("public-b3", pytest.approx(3.7)), ("public-b2", pytest.approx(3.0)),
    ]  # fmt: skip
    assert len(story.timelines.find("public-a")[0].sequences[0].waited_for) == Timeline.MAX_WAITED_FOR
    assert "public-b7" not in found.waited_for and found.parts["waiting_for_blocks"] == pytest.approx(
        sum(waits.values())
    )


def test_a_request_is_explained_by_its_sequence_that_ended_last() -> None:
    story = Story()
    for number in range(2):
        new = replace(new_request(f"a.{number}", [1] * 10), arrival_s=story.now_s)
        story.timelines.add(new, "public-a", number, story.now_s)
    story.step(0.5, ("a.0", 0, 10), ("a.1", 0, 10))
    story.step(1.0, ("a.0", 10, 1), ("a.1", 10, 1))
    story.timelines.end("a.0", "stop", 2, story.now_s)
    story.step(2.0, ("a.1", 11, 1))
    found = story.explain("a")
    assert not found.finished and found.total_s == pytest.approx(3.5), "one still runs"
    story.timelines.end("a.1", "length", 3, story.now_s)
    found = story.explain("a")
    assert (found.finish_reason, found.num_output_tokens, found.total_s) == ("length", 3, pytest.approx(3.5))
