"""OpenTelemetry spans of requests, sent to a collector as OTLP over HTTP in JSON (opentelemetry-proto 1.x).

One span for a request and one below it for each stage: in the queue, prefill, decode. Names of attributes are those
of the conventions for generative AI, and vLLM's. A caller's `traceparent` header (W3C Trace Context) becomes the
parent. Sending happens in a thread of its own from a bounded queue: a collector that is slow or gone costs spans,
never requests.
"""

import http.client
import json
import logging
import queue
import re
import secrets
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import quire
from quire.engine.timeline import RequestTimes, Timeline
from quire.errors import ConfigurationError

MAX_PENDING = 2048
MAX_BATCH = 256
SEND_SECONDS = 5.0
LINGER_SECONDS = 1.0
"""A span waits this long for others to travel with."""
_PARENT = re.compile(r"^00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})$")

logger = logging.getLogger("quire.traces")


class Tracer:
    """Sends spans to `endpoint`.

    Args:
        endpoint: `http://host:4318`; without a path, the standard one is taken.

    Raises:
        ConfigurationError: not an http or https address.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        parts = urlsplit(endpoint)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigurationError(
                f"otlp_traces_endpoint must be an http address such as http://localhost:4318, got {endpoint[:200]!r}",
                field="otlp_traces_endpoint",
            )
        self._host, self._port, self._is_tls = parts.hostname, port, parts.scheme == "https"
        self._path = parts.path if parts.path not in ("", "/") else "/v1/traces"
        self._model_name = model_name
        self._pending: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_PENDING)
        self._epoch_s = time.time() - time.monotonic()
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="quire-traces", daemon=True)
        self._thread.start()

    def request(self, times: RequestTimes, traceparent: bytes | None) -> None:
        """Spans of a request that is over. A caller who asked not to be sampled is not."""
        parent = _PARENT.match(traceparent.decode("latin-1").strip()) if traceparent is not None else None
        if parent is not None and not int(parent[3], 16) & 1:
            return
        trace_id = parent[1] if parent is not None else secrets.token_hex(16)
        timeline = max(times.sequences, key=lambda item: item.ended_s or 0.0)
        if timeline.ended_s is None:
            return
        begin_s = timeline.arrival_s if times.received_s is None else times.received_s
        end_s = times.sent_s or timeline.ended_s
        root = self._span("llm_request", trace_id, begin_s, end_s, parent[2] if parent is not None else "", kind=2)
        root["attributes"] = _attributes(times, timeline, self._model_name)
        if timeline.finish_reason == "error":
            root["status"] = {"code": 2}
        for name, start_s, stop_s in _stages(timeline):
            self._put(self._span(name, trace_id, start_s, stop_s, root["spanId"], kind=1))
        self._put(root)

    def close(self) -> None:
        """Send what is left, for `SEND_SECONDS` at most."""
        try:
            self._pending.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(SEND_SECONDS)

    def _span(
        self, name: str, trace_id: str, from_s: float, to_s: float, parent_id: str, *, kind: int
    ) -> dict[str, Any]:
        span = {"traceId": trace_id, "spanId": secrets.token_hex(8), "name": name, "kind": kind}
        if parent_id:
            span["parentSpanId"] = parent_id
        return {**span, "startTimeUnixNano": self._nanoseconds(from_s), "endTimeUnixNano": self._nanoseconds(to_s)}

    def _nanoseconds(self, monotonic_s: float) -> str:
        return str(int((self._epoch_s + monotonic_s) * 1e9))

    def _put(self, span: dict[str, Any]) -> None:
        try:
            self._pending.put_nowait(span)
        except queue.Full:
            self.num_dropped += 1

    def _run(self) -> None:
        while (first := self._pending.get()) is not None:
            batch, is_last = [first], False
            end_s = time.monotonic() + LINGER_SECONDS
            while len(batch) < MAX_BATCH:
                try:
                    span = self._pending.get(timeout=max(0.0, end_s - time.monotonic()))
                except queue.Empty:
                    break
                if span is None:
                    is_last = True
                    break
                batch.append(span)
            self._send(batch)
            if is_last:
                return

    def _send(self, batch: list[dict[str, Any]]) -> None:
        scope = {"scope": {"name": "quire", "version": quire.__version__}, "spans": batch}
        resource = {"attributes": [_attribute("service.name", "quire")]}
        body = json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]})
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=SEND_SECONDS)
        try:
            connection.request("POST", self._path, body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
            if status >= 300:
                logger.warning("the collector of traces answered %d; %d spans are lost", status, len(batch))
                self.num_dropped += len(batch)
        except (OSError, http.client.HTTPException) as error:
            logger.warning("no collector of traces (%s); %d spans are lost", type(error).__name__, len(batch))
            self.num_dropped += len(batch)
        finally:
            connection.close()


def _stages(timeline: Timeline) -> list[tuple[str, float, float]]:
    end_s = timeline.ended_s or timeline.since_s
    queued_to_s = end_s if timeline.first_scheduled_s is None else timeline.first_scheduled_s
    stages = [("queue", timeline.arrival_s, queued_to_s)]
    if timeline.first_scheduled_s is not None:
        stages.append(("prefill", timeline.first_scheduled_s, timeline.first_token_s or end_s))
    if timeline.first_token_s is not None:
        stages.append(("decode", timeline.first_token_s, end_s))
    return stages


def _attributes(times: RequestTimes, timeline: Timeline, model_name: str) -> list[dict[str, Any]]:
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
    return [_attribute(name, value) for name, value in found.items()]


def _attribute(name: str, value: str | int | float) -> dict[str, Any]:
    if isinstance(value, str):
        return {"key": name, "value": {"stringValue": value}}
    if isinstance(value, int):
        return {"key": name, "value": {"intValue": str(value)}}
    return {"key": name, "value": {"doubleValue": value}}
