"""Spans as OTLP and W3C Trace Context have them: what is sampled, whose child a span is, when it begins and ends."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from quire.errors import ConfigurationError
from quire.observe.timelines import Phase, RequestTimes, Timeline
from quire.observe.traces import Tracer, _traces_url

Spans = Callable[[], dict[str, ReadableSpan]]
EPOCH_S = 1000.0


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Tracer]:
    found = Tracer("http://127.0.0.1:1", "model", exporter)
    found._epoch_s = EPOCH_S
    yield found
    found.close()


@pytest.fixture
def spans(tracer: Tracer, exporter: InMemorySpanExporter) -> Spans:
    """Those that were made since the last time, by name."""

    def take() -> dict[str, ReadableSpan]:
        tracer._provider.force_flush()
        found = {span.name: span for span in exporter.get_finished_spans()}
        exporter.clear()
        return found

    return take


def sequence(number: int = 0, ended_s: float | None = 20.0, **changes: Any) -> Timeline:
    values = {
        "first_scheduled_s": 11.0, "first_token_s": 14.0, "finish_reason": "stop", "num_output_tokens": 5, **changes,
    }  # fmt: skip
    return Timeline("r", number, 9, 10.0, Phase.DECODING, 10.0, ended_s=ended_s, **values)


def times(*sequences: Timeline, received_s: float | None = 9.0, sent_s: float | None = 21.0) -> RequestTimes:
    return RequestTimes("r", "", list(sequences), received_s, None, sent_s)


def seconds_of(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time / 1e9 - EPOCH_S, span.end_time / 1e9 - EPOCH_S


def test_stages_lie_one_after_another_within_the_request(tracer: Tracer, spans: Spans) -> None:
    tracer.trace(times(sequence()), None)
    found = spans()
    assert {name: seconds_of(span) for name, span in found.items()} == {
        "llm_request": (9.0, 21.0), "queue": (10.0, 11.0), "prefill": (11.0, 14.0), "decode": (14.0, 20.0),
    }  # fmt: skip
    root = found.pop("llm_request")
    assert root.parent is None and root.kind is SpanKind.SERVER and root.status.is_ok
    assert root.resource.attributes["service.name"] == "quire"
    for span in found.values():
        assert span.parent == root.context and span.kind is SpanKind.INTERNAL
        assert span.context.trace_id == root.context.trace_id
    assert len({span.context.span_id for span in [root, *found.values()]}) == 4


def test_stages_that_were_not_reached_have_no_span(tracer: Tracer, spans: Spans) -> None:
    tracer.trace(times(sequence(first_scheduled_s=None, first_token_s=None, finish_reason="abort")), None)
    assert {name: seconds_of(span) for name, span in spans().items()} == {
        "llm_request": (9.0, 21.0), "queue": (10.0, 20.0),
    }  # fmt: skip
    tracer.trace(times(sequence(first_token_s=None, finish_reason="error")), None)
    found = spans()
    assert seconds_of(found["prefill"]) == (11.0, 20.0) and "decode" not in found
    assert found["llm_request"].status.status_code is StatusCode.ERROR
    tracer.trace(times(sequence(ended_s=None)), None)
    assert spans() == {}, "it still runs"


def test_a_request_is_its_longest_sequence_and_all_their_tokens(tracer: Tracer, spans: Spans) -> None:
    tracer.trace(times(sequence(0, 15.0), sequence(1, 20.0, num_output_tokens=11)), None)
    found = spans()["llm_request"].attributes
    assert found is not None
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (9, 16)
    assert (found["gen_ai.request.n"], found["gen_ai.response.finish_reason"]) == (2, "stop")
    assert (found["gen_ai.latency.e2e"], found["gen_ai.latency.time_in_queue"]) == (10.0, 1.0)
    assert (found["gen_ai.latency.time_to_first_token"], found["gen_ai.response.model"]) == (4.0, "model")


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
    tracer: Tracer, spans: Spans, header: str, is_child: bool, is_sent: bool
) -> None:
    """W3C Trace Context: lower-case, version 00, no id of zeros; the last bit of the flags says that it is sampled.
    Another header is as none."""
    tracer.trace(times(sequence()), header.encode())
    found = spans()
    assert bool(found) is is_sent
    if is_sent:
        root = found["llm_request"]
        is_of_trace = root.context.trace_id == int(TRACE, 16)
        is_below = root.parent is not None and root.parent.span_id == int(SPAN, 16)
        assert (is_of_trace, is_below) == (is_child, is_child) and root.context.is_valid


def test_what_is_unsent_is_sent_at_the_end(exporter: InMemorySpanExporter) -> None:
    tracer = Tracer("http://127.0.0.1:1", "model", exporter)
    tracer.trace(times(sequence()), None)
    tracer.close()
    assert len(exporter.get_finished_spans()) == 4


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://host:4318", "http://host:4318/v1/traces"), ("https://host/", "https://host/v1/traces"),
        ("http://[::1]:4318/else?x=1", "http://[::1]:4318/else?x=1"),
    ],
)  # fmt: skip
def test_an_endpoint_without_a_path_has_the_standard_one(endpoint: str, url: str) -> None:
    assert _traces_url(endpoint) == url


def test_without_the_extra_traces_are_refused_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'quire\[otel\]'") as caught:
        Tracer("http://127.0.0.1:1", "m")
    assert caught.value.field == "otlp_traces_endpoint"
