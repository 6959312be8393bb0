"""Spans as OTLP and W3C Trace Context have them: who is sampled, whose child a span is, when it begins and ends."""

import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from quire.engine.timeline import Phase, RequestTimes, Timeline
from quire.server import traces
from quire.server.traces import Tracer
from tests.conftest import PATIENCE_S


class Kept(Tracer):
    """A tracer that sends nothing, and keeps the spans."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", "model")
        self._pending.put(None)
        self._thread.join(PATIENCE_S)

    def spans(self) -> dict[str, dict[str, Any]]:
        found = {}
        try:
            while span := self._pending.get_nowait():
                found[span["name"]] = span
        except queue.Empty:
            pass
        return found


@pytest.fixture
def tracer() -> Kept:
    found = Kept()
    found._epoch_s = 1000.0
    return found


def sequence(number: int = 0, ended_s: float | None = 20.0, **changes: Any) -> Timeline:
    values = {
        "first_scheduled_s": 11.0, "first_token_s": 14.0, "finish_reason": "stop", "num_output_tokens": 5, **changes,
    }  # fmt: skip
    return Timeline("r", number, 9, 10.0, Phase.DECODING, 10.0, ended_s=ended_s, **values)


def times(*sequences: Timeline, received_s: float | None = 9.0, sent_s: float | None = 21.0) -> RequestTimes:
    return RequestTimes("r", "", list(sequences), received_s, None, sent_s)


def seconds_of(span: dict[str, Any]) -> tuple[float, float]:
    return int(span["startTimeUnixNano"]) / 1e9, int(span["endTimeUnixNano"]) / 1e9


def attributes_of(span: dict[str, Any]) -> dict[str, Any]:
    return {item["key"]: next(iter(item["value"].values())) for item in span["attributes"]}


def test_stages_lie_one_after_another_within_the_request(tracer: Kept) -> None:
    tracer.request(times(sequence()), None)
    spans = tracer.spans()
    assert {name: seconds_of(span) for name, span in spans.items()} == {
        "llm_request": (1009.0, 1021.0), "queue": (1010.0, 1011.0), "prefill": (1011.0, 1014.0),
        "decode": (1014.0, 1020.0),
    }  # fmt: skip
    root = spans.pop("llm_request")
    assert "parentSpanId" not in root and root["kind"] == 2
    for span in spans.values():
        assert (span["parentSpanId"], span["traceId"], span["kind"]) == (root["spanId"], root["traceId"], 1)
    assert len({span["spanId"] for span in [root, *spans.values()]}) == 4


def test_stages_that_were_not_reached_have_no_span(tracer: Kept) -> None:
    tracer.request(times(sequence(first_scheduled_s=None, first_token_s=None, finish_reason="abort")), None)
    assert {name: seconds_of(span) for name, span in tracer.spans().items()} == {
        "llm_request": (1009.0, 1021.0), "queue": (1010.0, 1020.0),
    }  # fmt: skip
    tracer.request(times(sequence(first_token_s=None, finish_reason="error")), None)
    spans = tracer.spans()
    assert seconds_of(spans["prefill"]) == (1011.0, 1020.0) and "decode" not in spans
    assert spans["llm_request"]["status"] == {"code": 2}
    tracer.request(times(sequence(ended_s=None)), None)
    assert tracer.spans() == {}, "it still runs"


def test_a_request_is_told_by_its_longest_sequence_and_all_their_tokens(tracer: Kept) -> None:
    tracer.request(times(sequence(0, 15.0), sequence(1, 20.0, num_output_tokens=11)), None)
    root = tracer.spans()["llm_request"]
    found = attributes_of(root)
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == ("9", "16")
    assert (found["gen_ai.request.n"], found["gen_ai.response.finish_reason"]) == ("2", "stop")
    assert (found["gen_ai.latency.e2e"], found["gen_ai.latency.time_in_queue"]) == (10.0, 1.0)
    assert found["gen_ai.latency.time_to_first_token"] == 4.0


TRACE, SPAN = "ab" * 16, "cd" * 8


@pytest.mark.parametrize(
    ("header", "is_child", "is_sent"),
    [
        (f"00-{TRACE}-{SPAN}-01", True, True),
        (f" 00-{TRACE}-{SPAN}-03 ", True, True),
        (f"00-{TRACE}-{SPAN}-00", False, False),
        (f"00-{TRACE}-{SPAN}-02", False, False),
        (f"00-{'0' * 32}-{SPAN}-01", False, True),
        (f"00-{TRACE}-{'0' * 16}-01", False, True),
        (f"00-{TRACE.upper()}-{SPAN}-01", False, True),
        (f"ff-{TRACE}-{SPAN}-01", False, True),
        (f"00-{TRACE}-{SPAN}-01-x", False, True),
        (f"00-{TRACE}-{SPAN}", False, True),
        ("", False, True),
    ],
)
def test_the_callers_trace_goes_on_where_its_header_is_one(
    tracer: Kept, header: str, is_child: bool, is_sent: bool
) -> None:
    """W3C Trace Context: lower-case, version 00, no id of zeros; the last bit of the flags says that it is sampled.
    Another header is as none."""
    tracer.request(times(sequence()), header.encode())
    spans = tracer.spans()
    assert bool(spans) is is_sent
    if is_sent:
        root = spans["llm_request"]
        assert (root["traceId"] == TRACE, root.get("parentSpanId") == SPAN) == (is_child, is_child)
        assert len(root["traceId"]) == 32 and int(root["traceId"], 16)


class Collector(BaseHTTPRequestHandler):
    """Answers with a status, and keeps how many spans each body had."""

    status, counts = 200, list[int]()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.counts.append(len(body["resourceSpans"][0]["scopeSpans"][0]["spans"]))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[tuple[str, type[Collector]]]:
    kind = type("Answering", (Collector,), {"counts": []})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "is_lost"), [(200, False), (204, False), (300, True), (400, True), (503, True)])
def test_spans_that_the_collector_does_not_take_are_counted(
    collector: tuple[str, type[Collector]], monkeypatch: pytest.MonkeyPatch, status: int, is_lost: bool
) -> None:
    monkeypatch.setattr(traces, "SEND_SECONDS", PATIENCE_S)
    url, kind = collector
    kind.status = status
    tracer = Tracer(url, "model")
    tracer.request(times(sequence()), None)
    tracer.close()
    assert sum(kind.counts) == 4 and tracer.num_dropped == (4 if is_lost else 0)


def test_spans_travel_together_up_to_a_number(
    collector: tuple[str, type[Collector]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "MAX_BATCH", 3)
    monkeypatch.setattr(traces, "LINGER_SECONDS", PATIENCE_S)
    monkeypatch.setattr(traces, "SEND_SECONDS", PATIENCE_S)
    url, kind = collector
    tracer = Tracer(url, "model")
    for _ in range(2):
        tracer.request(times(sequence()), None)
    tracer.close()
    assert kind.counts == [3, 3, 2]


def test_spans_that_find_no_room_are_counted_and_cost_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_PENDING", 6)
    tracer = Kept()
    for _ in range(3):
        tracer.request(times(sequence()), None)
    assert len(tracer.spans()) == 4 and tracer.num_dropped == 6
