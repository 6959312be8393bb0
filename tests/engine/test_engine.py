"""The engine between text and a core: what it tells the core, the queue and the metrics, output by output."""

from pathlib import Path
from typing import Any

import pytest

from quire import SamplingParams
from quire.compose.served import compose
from quire.config import EngineArgs
from quire.core.plan import Stalled, TokenDelta, TokenLogprobs
from quire.core.request import ResumeState
from quire.engine.channel import CoreHealth, Gauges
from quire.engine.engine import Engine
from quire.engine.inputs import InputProcessor
from quire.engine.observer import Observer
from quire.engine.queue import QueueConfig
from quire.errors import ConfigurationError, OverloadedError
from quire.text.tokenizer import Tokenizer
from tests.engine.scripted import LIMITS, Scripted, final


def outputs_of(engine: Engine) -> list[Any]:
    return [output for _, output in engine.step()]


def test_a_stop_string_ends_the_cores_work_too(tiny_model: Path) -> None:
    """Not only the text: no step is computed after the one that completed it, and the blocks are free."""
    served = compose(EngineArgs(model=str(tiny_model), max_num_seqs=2))
    try:
        engine, core = served.engine, served.engine.channel._core  # type: ignore[attr-defined]
        always_a = {"logit_bias": {ord("a"): 100.0}, "ignore_eos": True, "temperature": 0.0}
        engine.add(served.inputs.parse("x", SamplingParams(max_tokens=60, stop=["aaaa"], **always_a)))
        num_steps, finished = 0, False
        while not finished:
            finished = any(output.finished for output in outputs_of(engine))
            num_steps += 1
        assert num_steps == 4
        assert not core.scheduler.has_work and (core.scheduler.num_running, core.scheduler.num_waiting) == (0, 0)
        assert engine.channel.gauges == Gauges(0, 0, 0.0) and outputs_of(engine) == []
    finally:
        served.close()


def test_a_request_that_repeats_itself_is_dropped_by_the_core() -> None:
    scripted = Scripted()
    parsed = scripted.add(n=2, repetition_detection={"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 3})
    first, second = (new.request_id for new in parsed.sequences)
    scripted.channel.give(TokenDelta(first, (7, 7)), TokenDelta(second, (7, 8)))
    outputs_of(scripted.engine)
    assert scripted.channel.aborted == []
    scripted.channel.give(TokenDelta(first, (7,)), TokenDelta(second, (8,)))
    outputs_of(scripted.engine)
    assert scripted.channel.aborted == [first] and scripted.engine.has_work
    scripted.channel.give(final(second, 9), final(first, reason="abort"))
    (output,) = outputs_of(scripted.engine)
    assert output.finished and not scripted.engine.has_work


def test_what_cannot_be_made_text_is_dropped_by_the_core_with_all_its_sequences() -> None:
    scripted = Scripted()
    parsed = scripted.add(n=3, logprobs=0)
    ids = [new.request_id for new in parsed.sequences]
    scripted.channel.give(final(ids[0], 1))
    outputs_of(scripted.engine)
    broken = TokenLogprobs((1, 2), (-0.5,), (1, 2))
    scripted.channel.give(TokenDelta(ids[1], (5,), (broken,)))
    (output,) = outputs_of(scripted.engine)
    assert output.finished and output.error is not None
    assert [choice.finish_reason for choice in output.outputs] == ["error"] * 3
    assert scripted.channel.aborted == ids[1:]
    assert not scripted.engine.has_work and scripted.queue.num_waiting == 0


def test_an_abort_tells_the_core_once_and_the_caller_the_end() -> None:
    scripted = Scripted()
    parsed = scripted.add(n=2)
    ids = [new.request_id for new in parsed.sequences]
    ((_, output),) = scripted.engine.abort(parsed)
    assert [choice.finish_reason for choice in output.outputs] == ["abort"] * 2 and output.finished
    assert scripted.channel.aborted == ids and scripted.queue.num_waiting == 0
    assert scripted.engine.abort(parsed) == [] and scripted.channel.aborted == ids
    assert scripted.metric("quire:request_success_total", finished_reason="abort").value == 2


def test_the_queue_knows_who_has_left_it() -> None:
    """With the first step, which is progress; or at the end without one, which is none."""
    scripted = Scripted()
    one, two = scripted.add(), scripted.add(1, 2, 3, 4, 5)
    assert (scripted.queue.num_waiting, scripted.queue._total.tokens) == (2, 8)
    scripted.channel.give(record=scripted.record(("0", 0, 3)))
    scripted.engine.step()
    assert (scripted.queue.num_waiting, scripted.queue._total.tokens) == (1, 5)
    assert scripted.queue._requests_rate.read(scripted.clock()) is not None
    rate = scripted.queue._requests_rate._weight
    scripted.channel.give(final("1", reason="error"))
    scripted.engine.step()
    assert scripted.queue.num_waiting == 0 and scripted.queue._requests_rate._weight == rate
    assert (one.number, two.number) == (0, 1)


def test_rows_that_are_free_are_told_to_the_queue() -> None:
    scripted = Scripted(QueueConfig(0, 1000, 4))
    scripted.channel.gauges = Gauges(3, 0, 0.5)
    scripted.engine.step()
    scripted.parse()
    with pytest.raises(OverloadedError):
        scripted.parse()


def test_times_of_tokens_are_counted_for_each_sequence_and_the_prompt_once() -> None:
    scripted = Scripted()
    parsed = scripted.add(1, 2, 3, 4, n=2)
    one, two = (new.request_id for new in parsed.sequences)
    scripted.clock.now_s += 1.0
    scripted.channel.give(record=scripted.record((one, 0, 4), (two, 0, 4)))
    scripted.engine.step()
    scripted.clock.now_s += 0.5
    scripted.channel.give(TokenDelta(one, (5,), num_cached_tokens=1), TokenDelta(two, (6,), num_cached_tokens=3))
    scripted.engine.step()
    scripted.clock.now_s += 0.25
    scripted.channel.give(final(one, 7, 8))
    scripted.engine.step()
    scripted.clock.now_s += 1.0
    scripted.channel.give(final(two))
    (output,) = outputs_of(scripted.engine)
    first = scripted.metric("quire:time_to_first_token_seconds")
    assert (first.value, first.total) == (1, pytest.approx(1.5))
    gap = scripted.metric("quire:inter_token_latency_seconds")
    assert (gap.value, gap.total) == (1, pytest.approx(0.125)), "two tokens came in a quarter of a second"
    assert scripted.metric("quire:generation_tokens_total").value == 4
    assert scripted.metric("quire:prompt_tokens_total").value == 4
    assert scripted.metric("quire:prompt_tokens_cached_total").value == 1
    longest = scripted.metric("quire:request_max_num_generation_tokens")
    assert (longest.value, longest.total) == (1, 3), "of the request, when its last sequence has ended"
    outputs = scripted.metric("quire:request_generation_tokens")
    assert (outputs.value, outputs.total) == (2, 4)
    latency = scripted.metric("quire:e2e_request_latency_seconds")
    assert (latency.value, latency.total) == (2, pytest.approx(1.75 + 2.75))
    times = output.metrics
    assert (times.queued_s, times.prefill_s, times.decode_s, times.total_s) == (1.0, 0.5, 0.25, 2.75)


def test_preemptions_of_a_request_are_those_of_its_sequences() -> None:
    scripted = Scripted()
    scripted.add()
    scripted.channel.give(record=scripted.record(("0", 0, 3)))
    scripted.channel.give(record=scripted.record(stalled=(Stalled("0", "preempted", None),)))
    scripted.channel.give(record=scripted.record(("0", 0, 3)))
    scripted.channel.give(final("0", 5))
    (output,) = outputs_of(scripted.engine)
    assert output.metrics.num_preemptions == 1
    assert scripted.metric("quire:num_preemptions_total").value == 1
    found = scripted.metric("quire:request_num_preemptions")
    assert (found.value, found.total) == (1, 1)


def test_a_replaced_core_is_told_to_those_who_live_then_and_once() -> None:
    """By whatever it was ended."""
    scripted = Scripted()
    scripted.add()
    for health, expected in (
        (CoreHealth("starting", 1, 0), 1),
        (CoreHealth("serving", 1, 0), 1),
        (CoreHealth("serving", 1, 1), 2),
        (CoreHealth("serving", 1, 1), 2),
    ):
        scripted.channel.health = health
        scripted.engine.step()
        (found,) = scripted.engine.observer.explain("0", scripted.clock())
        assert found.num_restarts == expected
    scripted.add()
    scripted.engine.step()
    assert [item.num_restarts for item in scripted.engine.observer.explain("1", scripted.clock())] == [0]


def test_a_core_that_is_gone_for_now_takes_all_requests_with_it() -> None:
    scripted = Scripted()
    scripted.add(n=2)
    scripted.add()
    scripted.channel.raises["collect"] = OverloadedError("gone", retry_after_s=3)
    with pytest.raises(OverloadedError):
        scripted.engine.step()
    assert not scripted.engine.has_work and scripted.queue.num_waiting == 0
    assert scripted.metric("quire:request_success_total", finished_reason="error").value == 3
    assert outputs_of(scripted.engine) == []


def test_news_of_requests_that_are_no_more_are_no_news() -> None:
    scripted = Scripted()
    parsed = scripted.add()
    scripted.engine.abort(parsed)
    scripted.channel.give(TokenDelta("0", (1,)), final("0", reason="abort"), TokenDelta("99", (1,)))
    assert outputs_of(scripted.engine) == []


def test_the_times_of_a_request_and_its_end_need_no_observer() -> None:
    """Also the place in the queue, which the first step frees, and the count of preemptions."""
    scripted = Scripted(observer=Observer())
    parsed = scripted.add(n=2)
    one, two = (new.request_id for new in parsed.sequences)
    scripted.clock.now_s += 1.0
    scripted.channel.give(record=scripted.record((one, 0, 3), stalled=(Stalled(two, "no_row", None),)))
    scripted.channel.give(TokenDelta(one, (5,)), record=scripted.record((one, 3, 1), (two, 0, 3)))
    scripted.engine.step()
    assert scripted.queue.num_waiting == 0
    scripted.channel.give(record=scripted.record((two, 3, 1), stalled=(Stalled(one, "preempted", two),)))
    scripted.clock.now_s += 0.5
    scripted.channel.give(final(one, 6), final(two, 7))
    (output,) = outputs_of(scripted.engine)
    times = output.metrics
    assert output.finished and [choice.token_ids for choice in output.outputs] == [[6], [7]]
    assert (times.queued_s, times.prefill_s, times.total_s, times.num_preemptions) == (1.0, 0.0, 1.5, 1)
    assert scripted.engine.get_metrics() == []
    assert scripted.engine.observer.explain("0", scripted.clock()) == []
    assert scripted.engine.observer.on_sent("0", "", 0.0, 1.0, None) == {}
    with pytest.raises(ConfigurationError) as caught:
        scripted.engine.observer.trace_to("http://127.0.0.1:1", "m")
    assert caught.value.field == "otlp_traces_endpoint"


def test_a_stop_string_in_the_last_token_allowed_is_counted_as_stop(tiny_model: Path) -> None:
    scripted, tokenizer = Scripted(), Tokenizer.from_directory(tiny_model)
    scripted.engine._tokenizer = tokenizer
    scripted.inputs = InputProcessor(tokenizer, LIMITS)
    scripted.add(detokenize=True, stop="b")
    scripted.channel.give(final("0", ord("b")))
    (output,) = outputs_of(scripted.engine)
    assert output.outputs[0].finish_reason == "stop"
    assert scripted.metric("quire:request_success_total", finished_reason="stop").value == 1
    assert scripted.metric("quire:request_success_total", finished_reason="length").value == 0
    assert scripted.channel.aborted == [], "the core knows that it ended"


def test_a_mended_core_is_given_what_is_open_as_far_as_it_came() -> None:
    """Also where the fault came after text was made, and before it was handed on."""
    scripted = Scripted()
    one, two, ended = scripted.add(1, 2, prompt_logprobs=0), scripted.add(n=2), scripted.add()
    logprobs = (TokenLogprobs((2,), (-0.5,), (1,)),)
    scripted.channel.give(TokenDelta("0", (5,), (), logprobs, 2), TokenDelta("1.1", (6,)))
    assert len(outputs_of(scripted.engine)) == 2
    scripted.engine.observer.on_output = _broken  # type: ignore[method-assign]
    scripted.channel.give(TokenDelta("0", (7,)), final("2", 8))
    with pytest.raises(RuntimeError):
        scripted.engine.step()
    left = scripted.add()
    scripted.channel.news.clear()
    made = dict(scripted.engine.mend(range(left.number)))
    assert made[one.number].outputs[0].token_ids == [7] and made[ended.number].finished, "nothing is lost"
    assert scripted.channel.num_cleared == 1 and two.number not in made
    resumed = {new.request_id: new.resume for new in scripted.channel.news}
    assert resumed == {
        "0": ResumeState((5, 7), 1, 2), "1.0": ResumeState(), "1.1": ResumeState((6,)),
    }  # fmt: skip
    assert scripted.engine.step() == []


def test_a_request_that_was_there_in_three_faults_fails() -> None:
    scripted = Scripted()
    parsed = scripted.add(n=2)
    assert scripted.engine.mend(range(9)) == scripted.engine.mend(range(9)) == []
    late = scripted.add()
    ((number, output),) = scripted.engine.mend(range(9))
    assert number == parsed.number and output.finished and output.error is not None
    assert [new.request_id for new in scripted.channel.news][-1] == str(late.number)
    assert scripted.engine.num_open == 1 and scripted.queue.num_waiting == 1


def _broken(*_: object) -> None:
    raise RuntimeError("it broke")
