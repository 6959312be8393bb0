"""The observer of an engine: it feeds the metrics, the timelines and the traces."""

from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.plan import StepRecord, TokenDelta
from quire.core.request import NewRequest
from quire.engine.channel import CoreHealth, Gauges
from quire.engine.inputs import ParsedRequest
from quire.engine.observer import Observer
from quire.engine.request_state import RequestState
from quire.observe.explain import explain
from quire.observe.live import LiveView
from quire.observe.metrics import EngineMetrics, core_metrics
from quire.observe.timelines import RequestTimelines, Timeline
from quire.observe.traces import Tracer
from quire.outputs import Explanation, Labels, Metric


class EngineObserver(Observer):
    """Counts, explains and traces what one engine does.

    Args:
        cache_config: of the core's cache, as labels of a metric.
    """

    def __init__(self, cache_config: Labels = ()) -> None:
        self.timelines = RequestTimelines()
        labels = dict(cache_config)
        remembers = labels.get("enable_prefix_caching", "True") == "True"
        self._live = LiveView(
            int(labels.get("block_size", "16")),
            remembers=remembers,
            weight_bytes=int(labels.get("read_weight_bytes", "0")),
            token_bytes=int(labels.get("token_bytes", "0")),
        )
        self._metrics = EngineMetrics(cache_config)
        self._tracer: Tracer | None = None

    def on_request(self, parsed: ParsedRequest) -> None:
        """See `Observer.on_request`."""
        self._metrics.observe("request_params_n", len(parsed.sequences))
        self._metrics.observe("request_params_max_tokens", parsed.sequences[0].max_tokens)

    def on_add(self, new: NewRequest, parsed: ParsedRequest, sequence: int, now_s: float) -> None:
        """See `Observer.on_add`."""
        self.timelines.add(new, parsed.request_id, sequence, now_s)
        self._live.add(new, parsed.request_id, sequence)

    def on_step(self, record: StepRecord) -> None:
        """See `Observer.on_step`."""
        self._metrics.observe_step(record)
        self.timelines.observe(record)
        self._live.observe(record)

    def on_tokens(
        self, state: RequestState, delta: TokenDelta, now_s: float, *, is_first: bool, gap_s: float | None
    ) -> None:
        """See `Observer.on_tokens`."""
        count = len(delta.token_ids)
        self._live.tokens(delta.request_id, count, now_s, state.metrics.arrival_s if is_first else None, gap_s)
        if is_first:
            self.timelines.first_token(delta.request_id, now_s)
            self._metrics.observe("time_to_first_token_seconds", now_s - state.metrics.arrival_s)
            self._metrics.observe_prompt(state.num_prompt_tokens, delta.num_cached_tokens)
        if gap_s is not None:
            self._metrics.observe("inter_token_latency_seconds", gap_s / count)
        self._metrics.count("generation_tokens", count)

    def on_end(self, state: RequestState, request_id: str, reason: str, now_s: float) -> None:
        """See `Observer.on_end`."""
        if state.finished:
            self._metrics.observe("request_max_num_generation_tokens", state.longest)
        num_tokens = state.num_tokens(request_id)
        self.timelines.end(request_id, reason, num_tokens, now_s)
        self._live.end(request_id, reason, now_s)
        self._metrics.observe_finished(state.metrics, reason, state.num_prompt_tokens, num_tokens)

    def on_output(self, parsed: ParsedRequest, now_s: float) -> None:
        """See `Observer.on_output`."""
        self.timelines.made(parsed.request_id, parsed.sequences[0].caller, now_s)

    def on_core_replaced(self) -> None:
        """See `Observer.on_core_replaced`."""
        self.timelines.core_replaced()
        self._live.core_replaced()

    def on_sent(
        self, response_id: str, caller: str, received_s: float, sent_s: float, traceparent: bytes | None
    ) -> Mapping[str, Any]:
        """See `Observer.on_sent`."""
        found = self.timelines.sent(response_id, caller, received_s, sent_s)
        if self._tracer is not None:
            for times in found:
                self._tracer.trace(times, traceparent)
        return _log_fields([timeline for times in found for timeline in times.sequences])

    def metrics(self, gauges: Gauges, health: CoreHealth, rejected: Mapping[str, int]) -> list[Metric]:
        """See `Observer.metrics`."""
        return self._metrics.read(gauges, rejected) + core_metrics(health)

    def explain(self, request_id: str, now_s: float) -> list[Explanation]:
        """See `Observer.explain`."""
        return [explain(times, now_s, self.timelines.name_of) for times in self.timelines.find(request_id)]

    def live(self, since: int) -> Mapping[str, Any]:
        """See `Observer.live`."""
        return self._live.frame(since)

    def static_batches(self, max_model_len: int) -> Mapping[str, Any] | None:
        """See `Observer.static_batches`."""
        return self._live.static_batches(max_model_len)

    def trace_to(self, endpoint: str, model_name: str) -> None:
        """See `Observer.trace_to`."""
        self._tracer = Tracer(endpoint, model_name)

    def close(self) -> None:
        """See `Observer.close`."""
        if self._tracer is not None:
            self._tracer.close()


def _log_fields(timelines: Sequence[Timeline]) -> dict[str, Any]:
    if not timelines:
        return {}
    first = timelines[0]
    tokens = [item.first_token_s for item in timelines if item.first_token_s is not None]
    return {
        "prompt_tokens": first.num_prompt_tokens,
        "output_tokens": sum(item.num_output_tokens for item in timelines),
        "finish_reasons": sorted({item.finish_reason or "running" for item in timelines}),
        "time_to_first_token": round(min(tokens) - first.arrival_s, 6) if tokens else None,
    }
