"""OpenTelemetry spans of requests, sent by OpenTelemetry's SDK as OTLP over HTTP (the extra `quire[otel]`).

One span for a request and one below it for each stage: in the queue, prefill, decode. Names of attributes are those
of the conventions for generative AI, and vLLM's. A caller's `traceparent` header (W3C Trace Context) becomes the
parent. The SDK sends in a thread of its own from a bounded queue: a slow or absent collector costs spans, never
requests. Its environment variables (`OTEL_BSP_*`, `OTEL_EXPORTER_OTLP_*`) hold.
"""

import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import quire
from quire.errors import ConfigurationError
from quire.observe.timelines import RequestTimes, Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

FIELD = "otlp_traces_endpoint"
SEND_SECONDS = 5.0
"""For one export, and for what is unsent at the end."""


class Tracer:
    """Sends spans to an OpenTelemetry collector.

    Args:
        endpoint: `http://host:4318`; without a path, the standard one is taken.
        model_name: for the attribute `gen_ai.response.model`.
        exporter: gets the spans in place of the endpoint.

    Raises:
        ConfigurationError: not an http or https address, or the SDK is not installed.
    """

    def __init__(self, endpoint: str, model_name: str, exporter: "SpanExporter | None" = None) -> None:
        url = _traces_url(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigurationError(f"{FIELD} needs OpenTelemetry: pip install 'quire[otel]'", field=FIELD) from error
        # Not at exit: `close` waits for a bounded time.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "quire"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(url, timeout=SEND_SECONDS)))
        self._tracer = self._provider.get_tracer("quire", quire.__version__)
        self._model_name = model_name
        self._epoch_s = time.time() - time.monotonic()

    def trace(self, times: RequestTimes, traceparent: bytes | None) -> None:
        """Make the spans of a request that has ended. If its caller's trace is not sampled, neither are they."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        timeline = max(times.sequences, key=lambda item: item.ended_s or 0.0)
        if timeline.ended_s is None:
            return
        header = {} if traceparent is None else {"traceparent": traceparent.decode("latin-1").strip()}
        begin_s = timeline.arrival_s if times.received_s is None else times.received_s
        root = self._tracer.start_span(
            "llm_request",
            TraceContextTextMapPropagator().extract(header),
            SpanKind.SERVER,
            _attributes(times, timeline, self._model_name),
            start_time=self._nanoseconds(begin_s),
        )
        below = set_span_in_context(root)
        for name, start_s, stop_s in _stages(timeline):
            stage = self._tracer.start_span(name, below, start_time=self._nanoseconds(start_s))
            stage.end(self._nanoseconds(stop_s))
        if timeline.finish_reason == "error":
            root.set_status(StatusCode.ERROR)
        root.end(self._nanoseconds(times.sent_s or timeline.ended_s))

    def close(self) -> None:
        """Send what is left, for `SEND_SECONDS` at most."""
        sender = threading.Thread(target=self._provider.shutdown, name="quire-traces", daemon=True)
        sender.start()
        sender.join(SEND_SECONDS)

    def _nanoseconds(self, monotonic_s: float) -> int:
        return int((self._epoch_s + monotonic_s) * 1e9)


def _traces_url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ConfigurationError(
            f"{FIELD} must be an http address such as http://localhost:4318, got {endpoint[:200]!r}", field=FIELD
        )
    return urlunsplit(parts._replace(path=parts.path if parts.path not in ("", "/") else "/v1/traces"))


def _stages(timeline: Timeline) -> list[tuple[str, float, float]]:
    end_s = timeline.ended_s or timeline.since_s
    queued_to_s = end_s if timeline.first_scheduled_s is None else timeline.first_scheduled_s
    stages = [("queue", timeline.arrival_s, queued_to_s)]
    if timeline.first_scheduled_s is not None:
        stages.append(("prefill", timeline.first_scheduled_s, timeline.first_token_s or end_s))
    if timeline.first_token_s is not None:
        stages.append(("decode", timeline.first_token_s, end_s))
    return stages


def _attributes(times: RequestTimes, timeline: Timeline, model_name: str) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.response.model": model_name,
        "gen_ai.request.id": times.request_id,
        "gen_ai.request.n": len(times.sequences),
        "gen_ai.usage.prompt_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": sum(item.num_output_tokens for item in times.sequences),
        "gen_ai.response.finish_reason": timeline.finish_reason or "",
        "gen_ai.latency.e2e": (timeline.ended_s or timeline.arrival_s) - timeline.arrival_s,
        "quire.num_preemptions": timeline.num_preemptions,
    }
    if timeline.first_scheduled_s is not None:
        found["gen_ai.latency.time_in_queue"] = timeline.first_scheduled_s - timeline.arrival_s
    if timeline.first_token_s is not None:
        found["gen_ai.latency.time_to_first_token"] = timeline.first_token_s - timeline.arrival_s
    return found
