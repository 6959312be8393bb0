"""Counters and histograms against sums that are done by hand."""

import math
import random
from typing import Any

import pytest

from quire.core.plan import ScheduledRequest, Stalled, StepRecord
from quire.engine.channel import CoreHealth, Gauges
from quire.observe.metrics import EngineMetrics, Histogram, core_metrics
from quire.outputs import Metric, RequestMetrics


def reading(found: list[Metric], name: str, **labels: str) -> Any:
    (item,) = (item for item in found if item.name == name and dict(item.labels) == labels)
    return item


def read(metrics: EngineMetrics) -> list[Metric]:
    return metrics.read(Gauges(2, 3, 0.25), {"requests": 4, "tokens": 5})


def test_a_bucket_holds_all_up_to_its_bound_and_the_bound_itself() -> None:
    """As Prometheus defines `le`: less or equal, and each bucket holds those before it."""
    bounds = (0.5, 1.0, 2.0)
    values = [0.1, 0.5, 0.5, 0.7, 1.0, 1.5, 2.0, 2.0001, 99.0]
    histogram = Histogram("name", "text", bounds)
    for value in values:
        histogram.observe(value)
    found = histogram.read()
    assert found.buckets == tuple((bound, sum(value <= bound for value in values)) for bound in bounds)
    assert (found.value, found.total) == (len(values), pytest.approx(math.fsum(values)))


def test_random_values_are_counted_as_a_sum_would() -> None:
    dice = random.Random(3)
    bounds = tuple(sorted(dice.uniform(0, 10) for _ in range(12)))
    values = [dice.choice([dice.uniform(0, 12), dice.choice(bounds)]) for _ in range(500)]
    histogram = Histogram("name", "text", bounds)
    for value in values:
        histogram.observe(value)
    assert [count for _, count in histogram.read().buckets] == [sum(v <= b for v in values) for b in bounds]


def record(*num_tokens: int, stalled: tuple[str, ...] = (), queries: int = 0, hits: int = 0) -> StepRecord:
    rows = tuple(ScheduledRequest(str(number), 0, count) for number, count in enumerate(num_tokens))
    return StepRecord(
        0, 0.0, rows, tuple(Stalled("x", reason, None) for reason in stalled), 1, 1, 1, 1, 1, queries, hits
    )


def test_steps_are_counted_by_their_tokens_their_hits_and_their_victims() -> None:
    metrics = EngineMetrics()
    metrics.observe_step(record(5, 1, 1, stalled=("preempted", "no_row", "preempted", "budget"), queries=20, hits=16))
    metrics.observe_step(record(1, stalled=("no_blocks",), queries=1))
    found = read(metrics)
    tokens = reading(found, "quire:iteration_tokens_total")
    assert (tokens.value, tokens.total) == (2, 8)
    assert reading(found, "quire:num_preemptions_total").value == 2
    assert reading(found, "quire:prefix_cache_queries_total").value == 21
    assert reading(found, "quire:prefix_cache_hits_total").value == 16


def test_a_prompt_is_what_was_computed_and_what_was_cached() -> None:
    metrics = EngineMetrics()
    for num_tokens, num_cached in ((100, 64), (10, 0)):
        metrics.observe_prompt(num_tokens, num_cached)
    metrics.count("generation_tokens", 3)
    metrics.count("generation_tokens", 1)
    found = read(metrics)
    source = "quire:prompt_tokens_by_source_total"
    assert reading(found, "quire:prompt_tokens_total").value == 110
    assert reading(found, "quire:prompt_tokens_cached_total").value == 64
    assert reading(found, source, source="local_compute").value == 46
    assert reading(found, source, source="local_cache_hit").value == 64
    computed = reading(found, "quire:request_prefill_kv_computed_tokens")
    assert (computed.value, computed.total) == (2, 46)
    assert reading(found, "quire:generation_tokens_total").value == 4


def test_each_time_of_a_sequence_lies_between_its_own_readings() -> None:
    metrics = EngineMetrics()
    times = RequestMetrics(10.0, 11.0, 13.0, 17.0, 25.0, num_preemptions=3)
    metrics.observe_finished(times, "stop", 7, 5)
    found = read(metrics)
    totals = {
        "e2e_request_latency_seconds": 15.0, "request_queue_time_seconds": 1.0, "request_prefill_time_seconds": 2.0,
        "request_inference_time_seconds": 6.0, "request_decode_time_seconds": 4.0,
        "request_time_per_output_token_seconds": 4.0 / 4, "request_prompt_tokens": 7, "request_generation_tokens": 5,
        "request_num_preemptions": 3,
    }  # fmt: skip
    for name, total in totals.items():
        item = reading(found, f"quire:{name}")
        assert (item.value, item.total) == (1, pytest.approx(total)), name
    ended = {item.labels[0][1]: item.value for item in found if item.name == "quire:request_success_total"}
    assert ended == {"stop": 1, "length": 0, "repetition": 0, "abort": 0, "error": 0}


@pytest.mark.parametrize(
    ("times", "num_tokens", "counted"),
    [
        (RequestMetrics(1.0, finished_s=2.0), 0, {"e2e_request_latency_seconds"}),
        (RequestMetrics(1.0, 1.5, finished_s=2.0), 0, {"e2e_request_latency_seconds", "request_queue_time_seconds"}),
        (
            RequestMetrics(1.0, 1.5, 1.75, 1.75, 2.0), 1,
            {"e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
             "request_inference_time_seconds", "request_decode_time_seconds"},
        ),
    ],
)  # fmt: skip
def test_what_was_not_reached_is_not_counted(times: RequestMetrics, num_tokens: int, counted: set[str]) -> None:
    """One token has no time after it."""
    metrics = EngineMetrics()
    metrics.observe_finished(times, "abort", 3, num_tokens)
    of_times = [item for item in read(metrics) if item.kind == "histogram" and item.name.endswith("_seconds")]
    assert {item.name.removeprefix("quire:") for item in of_times if item.value} == counted


def test_gauges_and_refusals_are_as_they_were_given() -> None:
    state = Gauges(2, 9, 0.25, (("grammar", 4), ("adapter_slot", 2)))
    found = EngineMetrics((("block_size", "16"),)).read(state, {"requests": 4, "tokens": 5})
    assert reading(found, "quire:num_requests_running").value == 2
    assert reading(found, "quire:num_requests_waiting").value == 9
    by_reason = {"capacity": 3, "grammar": 4, "deferred": 2}
    for reason, value in by_reason.items():
        assert reading(found, "quire:num_requests_waiting_by_reason", reason=reason).value == value
    assert reading(found, "quire:kv_cache_usage_perc").value == 0.25
    assert reading(found, "quire:cache_config_info", block_size="16").value == 1
    assert reading(found, "quire:admission_rejections_total", reason="requests").value == 4
    assert reading(found, "quire:admission_rejections_total", reason="tokens").value == 5


def test_what_was_asked_for_is_counted_once_for_a_request() -> None:
    metrics = EngineMetrics()
    metrics.observe("request_params_n", 3)
    metrics.observe("request_params_max_tokens", 100)
    found = read(metrics)
    assert reading(found, "quire:request_params_n").total == 3
    assert reading(found, "quire:request_params_max_tokens").total == 100
    assert reading(found, "quire:request_params_n").value == 1


def test_the_core_is_in_one_state_and_its_deaths_are_told_apart() -> None:
    found = core_metrics(CoreHealth("paused", 3, 2))
    assert reading(found, "quire:engine_core_restarts_total", reason="died").value == 3
    assert reading(found, "quire:engine_core_restarts_total", reason="hung").value == 2
    states = {item.labels[0][1]: item.value for item in found if item.name == "quire:engine_core_state"}
    assert states == {"serving": 0, "starting": 0, "paused": 1}
