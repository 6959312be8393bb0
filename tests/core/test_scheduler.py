"""The scheduler, case by case, with exact expectations."""

import pytest

from quire.core.limits import SchedulerConfig
from quire.core.plan import RowResult, ScheduledRow, Stalled, StepResult, TokenDelta
from quire.core.policy import Fcfs
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.scheduler import Scheduler
from quire.errors import ConfigurationError, InvalidRequestError, PromptTooLongError
from tests.core.harness import Harness, alone, new_request


def stalls(harness: Harness) -> dict[str, tuple[str, str | None]]:
    return {item.request_id: (item.reason, item.by) for item in harness.scheduler.last_record.stalled}


def test_a_prompt_is_computed_in_chunks_and_then_decoded() -> None:
    harness = Harness(budget=4)
    harness.add(new_request("a", range(10), max_tokens=3))
    spans = []
    while harness.scheduler.has_work:
        plan = harness.schedule()
        spans.append([(item.start, item.num_tokens, item.samples) for item in plan.scheduled])
        deltas = harness.update(plan, harness.executor.execute(plan))
        assert bool(deltas) == spans[-1][0][2]
    assert spans == [
        [(0, 4, False)],
        [(4, 4, False)],
        [(8, 2, True)],
        [(10, 1, True)],
        [(11, 1, True)],
    ]
    output = harness.outputs["a"]
    assert (len(output.token_ids), output.finish_reason) == (3, "length")


def test_the_budget_goes_round_in_order() -> None:
    harness = Harness(budget=4)
    for name in "abc":
        harness.add(new_request(name, range(3)))
    plan = harness.schedule()
    assert plan.scheduled == (ScheduledRow(0, 0, 3, (), True), ScheduledRow(1, 0, 1, (), False))
    assert [new.request_id for new in plan.new] == ["a", "b"]
    assert stalls(harness) == {"c": ("budget", "a")}
    harness.update(plan, harness.executor.execute(plan))
    plan = harness.schedule()  # one token decoded, the rest of b, the first of c
    assert [item[:3] for item in plan.scheduled] == [(0, 3, 1), (1, 1, 2), (2, 0, 1)]


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [
        (4, [0, 0, 1, 0, 0, 0]),  # tokens 0-2, 3, then 4 in a new block, 5, 6, 7
        (3, [0, 1, 0, 0, 1, 0]),
        (1, [0, 1, 1, 1, 1, 1]),
    ],
)
def test_blocks_are_taken_at_the_border_and_not_before(block_size: int, expected: list[int]) -> None:
    harness = Harness(block_size=block_size)
    harness.add(new_request("a", range(3), max_tokens=6))
    grown = []
    while harness.scheduler.has_work:
        plan = harness.schedule()
        grown.append(sum(len(item.new_block_ids) for item in plan.scheduled))
        harness.update(plan, harness.executor.execute(plan))
    assert grown == expected


def test_a_full_block_is_found_by_the_next_request() -> None:
    harness = Harness()
    harness.add(new_request("a", range(9), max_tokens=1))
    harness.drain(1)
    harness.add(new_request("b", [*range(8), 99], max_tokens=1))
    plan = harness.schedule()
    assert plan.scheduled == (ScheduledRow(0, 8, 1, (), True),)
    record = harness.scheduler.last_record
    assert (record.num_prefix_queries, record.num_prefix_hits) == (8, 8)
    harness.update(plan, harness.executor.execute(plan))
    assert harness.outputs["b"].num_cached_tokens == 8


def test_the_last_token_is_always_computed() -> None:
    harness = Harness()
    for name in "ab":
        harness.add(new_request(name, range(8), max_tokens=1))
        harness.drain(1)
    assert harness.outputs["b"].num_cached_tokens == 4
    assert harness.outputs["a"].sequence == harness.outputs["b"].sequence


@pytest.mark.parametrize(("salt", "num_cached"), [("", 8), ("other", 0)])
def test_blocks_are_shared_within_one_salt(salt: str, num_cached: int) -> None:
    harness = Harness()
    harness.add(new_request("a", range(9), max_tokens=1))
    harness.drain(1)
    harness.add(new_request("b", range(9), max_tokens=1, salt=salt))
    harness.drain(1)
    assert harness.outputs["b"].num_cached_tokens == num_cached


def test_what_was_sampled_is_found_too() -> None:
    harness = Harness()
    harness.add(new_request("a", range(3), max_tokens=6))
    harness.drain(6)
    text = [*range(3), *harness.outputs["a"].token_ids]
    harness.add(new_request("b", text, max_tokens=1))
    harness.drain(1)
    assert harness.outputs["b"].num_cached_tokens == 8


def test_the_last_one_gives_way_and_comes_back_to_its_place() -> None:
    harness = Harness(num_blocks=6, block_size=2, max_num_seqs=3)
    harness.add(new_request("a", [1, 2, 3], max_tokens=7))
    harness.add(new_request("b", [4, 5, 6], max_tokens=5))
    harness.add(new_request("c", [7], max_tokens=2))
    finals, reasons = [], []
    while harness.scheduler.has_work:
        finals += [delta.request_id for delta in harness.step() if delta.finish_reason]
        reasons.append(harness.scheduler.last_record.stalled)
    assert Stalled("b", "preempted", by="a") in reasons[4]
    assert reasons[5] == (Stalled("b", "no_blocks"),)  # b is the head again, before c
    assert finals == ["a", "b", "c"]
    for output in harness.outputs.values():
        assert output.sequence == alone(output.new, block_size=2).sequence


def test_the_way_back_is_short_because_the_cache_remembers() -> None:
    """When a needs its fourth block it takes the tail of b; then it ends, and b finds the other four."""
    harness = Harness(num_blocks=8, block_size=2)
    harness.add(new_request("a", [1, 2], max_tokens=6))
    harness.add(new_request("b", [3, 4, 5, 6, 7], max_tokens=9))
    while harness.scheduler.num_running or not harness.num_preemptions:
        harness.step()
    plan = harness.schedule()
    assert [(new.request_id, len(new.token_ids), new.num_prompt_tokens) for new in plan.new] == [("b", 10, 5)]
    assert [item[:3] for item in plan.scheduled] == [(0, 8, 2)]
    harness.update(plan, harness.executor.execute(plan))
    harness.drain(10)
    assert harness.outputs["b"].num_cached_tokens == 0  # what it had when it was first admitted


def test_the_last_running_request_waits_with_its_blocks() -> None:
    """Both come to a border in one step and one block is left: b keeps what it has until a ends."""
    harness = Harness(num_blocks=5, block_size=2, prefix_caching=False)
    harness.add(new_request("a", [1], max_tokens=5))
    harness.add(new_request("b", [2], max_tokens=8))
    waits = []
    while harness.scheduler.has_work:
        harness.step()
        waits += harness.scheduler.last_record.stalled
    assert waits == [Stalled("b", "no_blocks")]


def test_admission_keeps_a_block_for_each_that_runs() -> None:
    harness = Harness(num_blocks=4, block_size=4)
    harness.add(new_request("a", range(8), max_tokens=4))
    harness.add(new_request("b", range(20, 28), max_tokens=1))
    plan = harness.schedule()
    assert [new.request_id for new in plan.new] == ["a"]  # b would fit, but a could not grow
    assert stalls(harness) == {"b": ("no_blocks", None)}
    harness.update(plan, harness.executor.execute(plan))
    harness.drain(10)


def test_the_head_is_never_overtaken() -> None:
    harness = Harness(num_blocks=4, block_size=4)
    harness.add(new_request("a", range(5), max_tokens=2))
    harness.add(new_request("big", range(20, 33), max_tokens=1))
    harness.add(new_request("small", [7], max_tokens=1))
    finals = [[delta.request_id for delta in harness.step() if delta.finish_reason] for _ in range(4)]
    assert finals == [[], ["a"], ["big"], ["small"]]


def test_rows_are_reused_within_one_plan() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(new_request("a", [1], max_tokens=1))
    harness.add(new_request("b", [2], max_tokens=1))
    harness.step()
    assert stalls(harness) == {"b": ("no_row", None)}
    plan = harness.schedule()
    assert plan.removed == (0,) and plan.new[0].row == 0
    harness.update(plan, harness.executor.execute(plan))


def test_priority_comes_first_and_ties_go_by_arrival() -> None:
    harness = Harness(max_num_seqs=1, policy="priority")
    for name, priority in [("late", 5), ("first", -1), ("second", -1), ("third", 0)]:
        harness.add(new_request(name, [1], max_tokens=1, priority=priority))
    order = []
    while harness.scheduler.has_work:
        order += [delta.request_id for delta in harness.step()]
    assert order == ["first", "second", "third", "late"]


def test_the_victim_is_the_one_of_least_priority() -> None:
    harness = Harness(num_blocks=6, block_size=2, policy="priority", max_model_len=12)
    harness.add(new_request("low", [1, 2, 3], max_tokens=6, priority=9))
    harness.step()
    harness.add(new_request("high", [4, 5, 6], max_tokens=8, priority=1))
    harness.drain(40)
    assert harness.num_preemptions == 1
    assert harness.outputs["low"].sequence == alone(harness.outputs["low"].new, block_size=2).sequence


def stop_token(prompt: list[int], index: int) -> int:
    """The token that request `prompt` samples as number `index`."""
    return alone(new_request("probe", prompt, max_tokens=index + 1, seed=3)).token_ids[index]


def test_a_stop_token_ends_and_is_reported() -> None:
    token_id = stop_token([1, 2], 2)
    harness = Harness()
    harness.add(new_request("a", [1, 2], max_tokens=9, seed=3, stop_token_ids=(token_id,)))
    harness.drain(9)
    output = harness.outputs["a"]
    assert (output.finish_reason, output.stop_reason) == ("stop", token_id)
    assert output.token_ids[-1] == token_id and output.token_ids.count(token_id) == 1


def test_the_models_own_end_is_an_ordinary_stop() -> None:
    token_id = stop_token([1, 2], 2)
    harness = Harness()
    harness.add(new_request("a", [1, 2], 9, seed=3, stop_token_ids=(token_id,), eos=(token_id,)))
    harness.drain(9)
    assert (harness.outputs["a"].finish_reason, harness.outputs["a"].stop_reason) == ("stop", None)


def test_nothing_stops_before_min_tokens() -> None:
    every = tuple(range(13))
    harness = Harness()
    harness.add(new_request("a", [1, 2], 9, stop_token_ids=every, min_tokens=4))
    harness.drain(9)
    assert len(harness.outputs["a"].token_ids) == 5


def test_a_stop_token_comes_before_the_length() -> None:
    harness = Harness()
    harness.add(new_request("a", [1, 2], 1, stop_token_ids=tuple(range(13))))
    harness.drain(1)
    assert harness.outputs["a"].finish_reason == "stop"


def test_max_model_len_ends_a_request() -> None:
    harness = Harness(num_blocks=4, block_size=4, max_model_len=10)
    harness.add(new_request("a", range(7), max_tokens=100))
    harness.drain(3)
    assert (len(harness.outputs["a"].token_ids), harness.outputs["a"].finish_reason) == (3, "length")


def test_an_error_ends_one_request_and_its_blocks_are_not_found_again() -> None:
    harness = Harness(fails=lambda request_id, position: request_id == "bad" and position == 9)
    harness.add(new_request("good", range(20, 24), max_tokens=4))
    harness.add(new_request("bad", range(9), max_tokens=4))
    harness.drain(4)
    bad = harness.outputs["bad"]
    assert (bad.finish_reason, bad.error, len(bad.token_ids)) == ("error", "injected fault", 1)
    assert harness.outputs["good"].sequence == alone(harness.outputs["good"].new).sequence
    harness.add(new_request("next", range(9), max_tokens=1))
    harness.drain(1)
    assert harness.outputs["next"].num_cached_tokens == 0


def test_abort_while_waiting() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(new_request("a", [1], max_tokens=2))
    harness.add(new_request("b", [2], max_tokens=2))
    harness.step()
    assert harness.abort("b") == [TokenDelta("b", (), finish_reason="abort")]
    harness.drain(1)
    assert harness.outputs["b"].token_ids == []


def test_abort_while_running() -> None:
    harness = Harness()
    harness.add(new_request("a", range(9), max_tokens=5))
    harness.step()
    harness.abort("a")
    harness.check_empty()


def test_abort_in_the_middle_of_a_prompt() -> None:
    harness = Harness(budget=4)
    harness.add(new_request("a", range(9), max_tokens=5))
    harness.step()
    harness.abort("a")
    harness.check_empty()


def test_abort_of_the_preempted() -> None:
    harness = Harness(num_blocks=6, block_size=2, max_num_seqs=3)
    harness.add(new_request("a", [1, 2, 3], max_tokens=7))
    harness.add(new_request("b", [4, 5, 6], max_tokens=5))
    while not harness.num_preemptions:
        harness.step()
    kept = list(harness.outputs["b"].token_ids)
    harness.abort("b")
    assert harness.outputs["b"].token_ids == kept and kept
    harness.drain(10)


def test_abort_between_schedule_and_update_drops_the_result() -> None:
    harness = Harness()
    harness.add(new_request("a", [1, 2], max_tokens=5))
    harness.add(new_request("b", [3, 4], max_tokens=1))
    plan = harness.schedule()
    harness.abort("a")
    deltas = harness.update(plan, harness.executor.execute(plan))
    assert [delta.request_id for delta in deltas] == ["b"]
    harness.check_empty()


def test_abort_is_idempotent_and_ignores_strangers() -> None:
    harness = Harness()
    harness.add(new_request("a", [1], max_tokens=1))
    assert harness.abort("unknown") == []
    assert len(harness.abort("a")) == 1
    assert harness.abort("a") == []
    harness.add(new_request("b", [1], max_tokens=1))
    harness.drain(1)
    assert harness.abort("b") == []


def test_two_steps_in_flight() -> None:
    """A prompt goes on while its first chunk is in flight, a decode while its token is; nothing follows the last."""
    harness = Harness(budget=6)
    harness.add(new_request("a", [1, 2], max_tokens=2))
    harness.add(new_request("b", range(6), max_tokens=1))
    first = harness.schedule()
    second = harness.schedule()
    assert [item[:3] for item in first.scheduled] == [(0, 0, 2), (1, 0, 4)]
    assert [(*item[:3], item.samples) for item in second.scheduled] == [(0, 2, 1, True), (1, 4, 2, True)]
    third = harness.schedule()
    assert third.scheduled == () and stalls(harness) == {"a": ("in_flight", None), "b": ("in_flight", None)}
    for plan in (first, second, third):
        harness.update(plan, harness.executor.execute(plan))
    harness.drain(5)
    for output in harness.outputs.values():
        assert output.sequence == alone(output.new).sequence


def test_a_block_filled_in_flight_is_found_when_its_text_is_known() -> None:
    harness = Harness(overlap=True, block_size=4)
    harness.add(new_request("a", [1, 2, 3], max_tokens=6, seed=3))
    for _ in range(3):
        harness.step()
    known = harness.outputs["a"].token_ids[:2]
    harness.add(new_request("b", [1, 2, 3, *known], max_tokens=2))
    harness.drain(12)
    assert harness.outputs["b"].num_cached_tokens == 4
    assert harness.outputs["a"].sequence == alone(harness.outputs["a"].new).sequence


@pytest.mark.parametrize("fails_at", [2, 3, 4])
def test_what_is_in_flight_for_a_failed_request_is_dropped(fails_at: int) -> None:
    harness = Harness(overlap=True, fails=lambda name, position: name == "a" and position == fails_at)
    for name in "ab":
        harness.add(new_request(name, [1, 2, 3], max_tokens=4))
    harness.drain(8)
    assert [harness.outputs[name].finish_reason for name in "ab"] == ["error", "length"]
    assert harness.outputs["b"].sequence == alone(harness.outputs["b"].new).sequence


def test_prompt_logprobs_do_not_read_the_cache_but_write_it() -> None:
    harness = Harness()
    for name in "ab":
        harness.add(new_request(name, range(9), max_tokens=1, num_prompt_logprobs=0))
        harness.drain(1)
    harness.add(new_request("c", range(9), max_tokens=1))
    harness.drain(1)
    assert [harness.outputs[name].num_cached_tokens for name in "abc"] == [0, 0, 8]
    assert [item.token_ids[0] for item in harness.outputs["b"].prompt_logprobs] == list(range(1, 9))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_prompt_logprobs_are_sent_once_in_spite_of_preemption(prefix_caching: bool) -> None:
    """The second request is preempted in the middle of its prompt."""
    harness = Harness(num_blocks=8, block_size=2, budget=3, prefix_caching=prefix_caching)
    harness.add(new_request("a", [1, 2], max_tokens=13))
    harness.step()
    harness.add(new_request("b", range(20, 29), max_tokens=2, num_prompt_logprobs=0, num_logprobs=0))
    harness.drain(60)
    assert harness.num_preemptions > 0
    output = harness.outputs["b"]
    assert [item.token_ids[0] for item in output.prompt_logprobs] == list(range(21, 29))
    assert output.sequence == alone(output.new, block_size=2).sequence


def test_the_key_of_the_cache_changes_nothing() -> None:
    def run(key: bytes) -> list[object]:
        harness = Harness(num_blocks=8, block_size=2, key=key)
        for index in range(5):
            harness.add(new_request(str(index), [1, 2, 3, 4, index], max_tokens=5))
        plans = []
        while harness.scheduler.has_work:
            plans.append(harness.schedule())
            harness.update(plans[-1], harness.executor.execute(plans[-1]))
        return plans

    assert run(bytes(16)) == run(b"another key, which is longer")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("block_size", 0), ("num_blocks", -1)],
)
def test_limits_are_positive(name: str, value: int) -> None:
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 8, "block_size": 4, "num_blocks": 2}
    with pytest.raises(ConfigurationError, match=f"{name} must be at least 1") as caught:
        SchedulerConfig(**{**limits, name: value})
    assert caught.value.field == name


def test_a_cache_too_small_for_one_request_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"holds 32 tokens \(2 blocks of 16\).*max_model_len 33"):
        SchedulerConfig(1, 1, max_model_len=33, block_size=16, num_blocks=2)


def test_add_refuses_what_would_break_the_core() -> None:
    harness = Harness(num_blocks=2, block_size=4)
    harness.add(new_request("a", [1]))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        harness.scheduler.add(new_request("a", [1]))
    with pytest.raises(InvalidRequestError, match="at least 1"):
        harness.scheduler.add(new_request("b", []))
    with pytest.raises(InvalidRequestError, match="at least 1"):
        harness.scheduler.add(new_request("b", [1], max_tokens=0))
    with pytest.raises(PromptTooLongError, match="8 tokens; max_model_len 8"):
        harness.scheduler.add(new_request("b", range(8)))
    harness.drain(4)


def test_a_result_that_does_not_answer_is_refused() -> None:
    scheduler = Scheduler(SchedulerConfig(1, 8, 8, 4, 2), Fcfs(), NullPrefixCache())
    scheduler.add(new_request("a", [1, 2]))
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="answers its own plan"):
        scheduler.update(plan, StepResult(plan.step_id + 1, ()))
    with pytest.raises(AssertionError, match="does not answer"):
        scheduler.update(plan, StepResult(plan.step_id, (RowResult(0, ()),)))


def test_the_key_has_a_size() -> None:
    with pytest.raises(ValueError, match="8 bytes; it needs 16 to 64"):
        PrefixCache(bytes(8))
