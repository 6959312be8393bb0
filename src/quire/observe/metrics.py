"""Counters and histograms under vLLM's stems, read from step records and finished requests.

Names begin with `quire:`; buckets are vLLM's, so that its boards work unchanged.
"""

from bisect import bisect_left
from collections.abc import Mapping
from types import MappingProxyType

from quire.core.plan import StepRecord
from quire.engine.channel import CORE_STATES, CoreHealth, Gauges
from quire.outputs import Labels, Metric, RequestMetrics

FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_GAP_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STEP_TOKEN_BUCKETS = (1.0, *(float(2**power) for power in range(3, 15)))
COUNT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
LENGTH_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
COUNTERS = MappingProxyType(
    {
        "prompt_tokens": "Prompt tokens of admitted requests.",
        "prompt_tokens_cached": "Prompt tokens that the prefix cache supplied.",
        "generation_tokens": "Tokens generated.",
        "num_preemptions": "Requests that gave their blocks back to run again later.",
        "prefix_cache_queries": "Tokens looked up in the prefix cache.",
        "prefix_cache_hits": "Tokens found in the prefix cache.",
    }
)
"""Stem -> help text."""
HISTOGRAMS = MappingProxyType(
    {
        "time_to_first_token_seconds": ("Arrival to first token.", FIRST_TOKEN_BUCKETS_S),
        "inter_token_latency_seconds": ("Time between two tokens of a sequence.", TOKEN_GAP_BUCKETS_S),
        "request_time_per_output_token_seconds": ("Mean time per token after the first.", TOKEN_GAP_BUCKETS_S),
        "e2e_request_latency_seconds": ("Arrival to end.", LATENCY_BUCKETS_S),
        "request_queue_time_seconds": ("Arrival to first step.", LATENCY_BUCKETS_S),
        "request_prefill_time_seconds": ("First step to first token.", LATENCY_BUCKETS_S),
        "request_decode_time_seconds": ("First token to last.", LATENCY_BUCKETS_S),
        "request_prompt_tokens": ("Tokens in a prompt.", LENGTH_BUCKETS),
        "request_generation_tokens": ("Tokens generated.", LENGTH_BUCKETS),
        "request_max_num_generation_tokens": ("Tokens of a request's longest sequence.", LENGTH_BUCKETS),
        "request_inference_time_seconds": ("First step to last token.", LATENCY_BUCKETS_S),
        "request_prefill_kv_computed_tokens": ("Prompt tokens that the cache did not supply.", LENGTH_BUCKETS),
        "request_num_preemptions": ("Preemptions of a request.", COUNT_BUCKETS),
        "request_params_n": ("The parameter n.", COUNT_BUCKETS),
        "request_params_max_tokens": ("The parameter max_tokens.", LENGTH_BUCKETS),
        "iteration_tokens_total": ("Tokens computed in a step.", STEP_TOKEN_BUCKETS),
    }
)
"""Stem -> help text and buckets."""
FINISH_REASONS = ("stop", "length", "repetition", "abort", "error")


class Histogram:
    """Observations counted by upper bounds."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def read(self) -> Metric:
        """The histogram now."""
        buckets, seen = [], 0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            seen += count
            buckets.append((bound, seen))
        return Metric(self._name, "histogram", float(sum(self._counts)), self._total, tuple(buckets), self._text)


class EngineMetrics:
    """Everything that is counted about an engine. One thread writes; readers may see a step half counted."""

    def __init__(self, cache_config: Labels = ()) -> None:
        self._cache_config = cache_config
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._histograms = {name: Histogram(f"quire:{name}", *found) for name, found in HISTOGRAMS.items()}

    def count(self, name: str, amount: int) -> None:
        """Add to one of `COUNTERS`."""
        self._counters[name] += amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to one of `HISTOGRAMS`."""
        self._histograms[name].observe(value)

    def observe_step(self, record: StepRecord) -> None:
        """Count a step."""
        self.observe("iteration_tokens_total", sum(item.num_tokens for item in record.scheduled))
        self.count("prefix_cache_queries", record.num_prefix_queries)
        self.count("prefix_cache_hits", record.num_prefix_hits)
        self.count("num_preemptions", sum(item.reason == "preempted" for item in record.stalled))

    def observe_prompt(self, num_tokens: int, num_cached: int) -> None:
        """Count a prompt whose first token has come."""
        self.count("prompt_tokens", num_tokens)
        self.count("prompt_tokens_cached", num_cached)
        self.observe("request_prefill_kv_computed_tokens", num_tokens - num_cached)

    def observe_finished(
        self, times: RequestMetrics, finish_reason: str, num_prompt_tokens: int, num_output_tokens: int
    ) -> None:
        """Count a sequence that ended; its times that were reached."""
        self._finished[finish_reason] += 1
        self.observe("request_prompt_tokens", num_prompt_tokens)
        self.observe("request_generation_tokens", num_output_tokens)
        self.observe("request_num_preemptions", times.num_preemptions)
        for name, spent_s in {
            "e2e_request_latency_seconds": times.total_s,
            "request_queue_time_seconds": times.queued_s,
            "request_prefill_time_seconds": times.prefill_s,
            "request_decode_time_seconds": times.decode_s,
        }.items():
            if spent_s is not None:
                self.observe(name, spent_s)
        if times.first_scheduled_s is not None and times.last_token_s is not None:
            self.observe("request_inference_time_seconds", times.last_token_s - times.first_scheduled_s)
        if times.decode_s is not None and num_output_tokens > 1:
            self.observe("request_time_per_output_token_seconds", times.decode_s / (num_output_tokens - 1))

    def read(self, state: Gauges, rejected: Mapping[str, int]) -> list[Metric]:
        """All metrics now; `rejected` counts refusals by the bound met."""
        num_running, num_waiting, usage, held = state
        gauges = [
            Metric("quire:num_requests_running", "gauge", num_running, help="Requests that hold a row."),
            Metric("quire:num_requests_waiting", "gauge", num_waiting, help="Requests in the queue."),
            Metric("quire:kv_cache_usage_perc", "gauge", usage, help="Share of cache blocks held; 1 is all."),
            Metric("quire:cache_config_info", "gauge", 1, help="The cache, in labels.", labels=self._cache_config),
            *_labelled(
                "quire:num_requests_waiting_by_reason", "gauge",
                "Requests in the queue: for a row or blocks, for a grammar to be compiled, for anything else.",
                "reason", _by_reason(num_waiting, dict(held)),
            ),
        ]  # fmt: skip
        counters = [
            Metric(f"quire:{name}_total", "counter", value, help=COUNTERS[name])
            for name, value in self._counters.items()
        ]
        prompt, cached = self._counters["prompt_tokens"], self._counters["prompt_tokens_cached"]
        counters += _labelled(
            "quire:prompt_tokens_by_source_total", "counter", "Prompt tokens, by where they came from.",
            "source", {"local_compute": prompt - cached, "local_cache_hit": cached},
        ) + _labelled(
            "quire:request_success_total", "counter", "Sequences that ended, by reason.", "finished_reason",
            self._finished,
        ) + _labelled(
            "quire:admission_rejections_total", "counter", "Requests refused, by the queue's bound.", "reason", rejected
        )  # fmt: skip
        histograms = [item.read() for item in self._histograms.values()]
        return [*gauges, *counters, *histograms]


def core_metrics(health: CoreHealth) -> list[Metric]:
    """Of the core's process."""
    replaced = {"died": health.num_died, "hung": health.num_hung}
    return _labelled(
        "quire:engine_core_restarts_total", "counter", "Cores that were replaced, by what befell them.", "reason",
        replaced,
    ) + _labelled(
        "quire:engine_core_state", "gauge", "1 for what the core is doing.", "state",
        {state: state == health.state for state in CORE_STATES},
    )  # fmt: skip


def _by_reason(num_waiting: int, held: dict[str, int]) -> dict[str, int]:
    """Its values add up to `num_waiting`."""
    grammar, all_held = held.get("grammar", 0), sum(held.values())
    return {"capacity": max(0, num_waiting - all_held), "grammar": grammar, "deferred": all_held - grammar}


def _labelled(name: str, kind: str, text: str, label: str, values: Mapping[str, float]) -> list[Metric]:
    """One metric for each value of a label."""
    return [Metric(name, kind, float(value), help=text, labels=((label, key),)) for key, value in values.items()]
