"""What operators see: explanations behind their own key, logs without texts, traces."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from quire.cli import explain as verb
from quire.cli.main import main
from quire.errors import ConfigurationError
from quire.observe.observer import _log_fields
from quire.observe.timelines import Phase, Timeline
from quire.observe.traces import Tracer
from quire.server.http.access import LOG_FORMATS, Access, configure_logs, log_request
from quire.server.http.app import Observability
from quire.server.http.keys import caller_name
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine

SECRET = "a prompt that no log may hold"


def complete(server: Running, **more: Any) -> httpx.Response:
    body = {"prompt": SECRET, "max_tokens": 40, "ignore_eos": True, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body)


@pytest.mark.parametrize("stream", [False, True])
def test_the_parts_add_up_to_what_the_client_saw(real: Running, stream: bool) -> None:
    begun_s = time.monotonic()
    answer = complete(real, stream=stream)
    seen_s = time.monotonic() - begun_s
    url = f"{real.url}/v1/requests/{answer.headers['x-request-id']}/explain"
    assert wait_until(lambda: httpx.get(url).json()["data"][0]["parts"]["sending"] > 0)
    (item,) = httpx.get(url).json()["data"]
    assert sum(item["parts"].values()) == pytest.approx(item["total_s"], rel=0.01)
    assert item["total_s"] <= seen_s
    assert item["finished"] and item["num_output_tokens"] == 40
    assert item["parts"]["decoding"] > 0 and item["parts"]["prefilling"] > 0
    assert item["sentence"].endswith(".") and item["largest"] in item["parts"]


def test_every_prompt_of_a_response_is_explained(real: Running) -> None:
    answer = complete(real, prompt=["one", "two"], n=2)
    url = f"{real.url}/v1/requests/{answer.headers['x-request-id']}/explain"
    assert len(httpx.get(url).json()["data"]) == 2


def test_one_name_under_two_keys_is_two_requests(real: Running) -> None:
    """Under way at the same time, each with its own times."""
    server = start(real.engine, api_key=["ann", "bob"], observability=Observability("boss"))
    address, body = f"{server.url}/v1/completions", {"prompt": "x", "request_id": "mine", "ignore_eos": True}

    def ask(key: str, max_tokens: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(address, json={**body, "max_tokens": max_tokens}, headers=headers)

    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, ("ann", "bob"), (200, 100)))
    assert [item.status_code for item in answers] == [200, 200]
    url, headers = f"{server.url}/v1/requests/cmpl-mine/explain", {"Authorization": "Bearer boss"}
    assert wait_until(lambda: all(one["parts"]["sending"] for one in httpx.get(url, headers=headers).json()["data"]))
    data = httpx.get(url, headers=headers).json()["data"]
    assert {(one["caller"], one["num_output_tokens"]) for one in data} == {
        (caller_name("ann"), 200), (caller_name("bob"), 100),
    }  # fmt: skip
    for one in data:
        assert sum(one["parts"].values()) == pytest.approx(one["total_s"], rel=0.01)
    server.stop()


def test_an_unknown_request_is_404(real: Running) -> None:
    answer = httpx.get(f"{real.url}/v1/requests/cmpl-none/explain")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "request_not_found"


def test_the_verb_prints_parts_and_a_sentence(real: Running, capsys: pytest.CaptureFixture[str]) -> None:
    request_id = complete(real).headers["x-request-id"]
    assert main(["explain", "--url", f"{real.url}/v1", request_id]) == 0
    shown = capsys.readouterr().out
    assert "40 generated, ended with length" in shown and "decoding" in shown and "whole" in shown
    assert main(["explain", "--url", real.url, "--json", request_id]) == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["num_output_tokens"] == 40
    assert main(["explain", "--url", real.url, "cmpl-none"]) == 2
    assert "no request 'cmpl-none'" in capsys.readouterr().err
    assert main(["explain", "--url", "http://127.0.0.1:1", "x"]) == 1
    assert verb.EXAMPLES


@pytest.mark.parametrize(
    ("options", "key", "status"),
    [
        ({}, None, 404),
        ({"api_key": "caller"}, "caller", 403),
        ({"api_key": "caller"}, None, 401),
        ({"observability": Observability("boss")}, None, 403),
        ({"observability": Observability("boss")}, "boss", 404),
        ({"api_key": "caller", "observability": Observability("boss")}, "caller", 403),
        ({"api_key": "caller", "observability": Observability("boss")}, "boss", 404),
        ({"api_key": "caller", "observability": Observability("boss")}, "other", 401),
    ],
)
def test_explanations_are_for_operators(options: dict[str, Any], key: str | None, status: int) -> None:
    """404 says that the key was taken: the request is not known."""
    server = start(FakeEngine(), **options)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.url}/v1/requests/x/explain", headers=headers).status_code == status
    wants_key = "api_key" in options
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
    assert answer.status_code == (401 if wants_key and key in (None, "other") else 200)
    server.stop()


@pytest.mark.parametrize("key", ["", "caller"])
def test_an_admin_key_must_be_one(key: str) -> None:
    with pytest.raises(ConfigurationError, match="admin_api_key"):
        start(FakeEngine(), api_key="caller", observability=Observability(key))


def test_a_record_tells_sizes_and_times_and_no_text(real: Running, caplog: pytest.LogCaptureFixture) -> None:
    server = start(real.engine, api_key="hidden-key", observability=Observability(log_requests=True))
    with caplog.at_level(logging.INFO, "quire.access"):
        body = {"prompt": SECRET, "max_tokens": 5, "ignore_eos": True}
        headers = {"Authorization": "Bearer hidden-key"}
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        httpx.get(f"{server.url}/no/such%0aroute", headers=headers)
        assert wait_until(lambda: len(caplog.records) >= 2)
    server.server.should_exit = True
    server.thread.join(PATIENCE_S)
    shown = [json.loads(LOG_FORMATS["json"]().format(record)) for record in caplog.records]
    assert shown[0]["status"] == 200 and shown[0]["output_tokens"] == 5 and shown[0]["is_complete"]
    assert shown[0]["finish_reasons"] == ["length"] and shown[0]["time_to_first_token"] > 0
    assert shown[1]["status"] == 404 and "\n" not in shown[1]["path"]
    text = json.dumps(shown) + "".join(LOG_FORMATS["text"]().format(record) for record in caplog.records)
    assert SECRET not in text and "hidden-key" not in text and "\n" not in text


def ended(request_id: str, num_tokens: int, first_token_s: float | None, reason: str | None) -> Timeline:
    """A sequence that arrived at 100."""
    return Timeline(
        request_id, 0, 9, 100.0, Phase.QUEUED, 100.0, first_token_s=first_token_s, finish_reason=reason,
        num_output_tokens=num_tokens,
    )  # fmt: skip


def test_a_record_counts_all_sequences_and_the_first_token_of_any(caplog: pytest.LogCaptureFixture) -> None:
    sequences = [ended("r", 5, 103.5, "stop"), ended("r", 7, 101.25, None), ended("r", 0, None, "error")]
    with caplog.at_level(logging.INFO, "quire.access"):
        log_request("POST", "/x", 200, 1.5, found=_log_fields(sequences))
        log_request("GET", "/y", None, 0.5, is_complete=False)
    first, second = (vars(record)["fields"] for record in caplog.records)
    assert (first["prompt_tokens"], first["output_tokens"], first["time_to_first_token"]) == (9, 12, 1.25)
    assert first["finish_reasons"] == ["error", "running", "stop"]
    assert "output_tokens" not in second and second["is_complete"] is False and second["status"] is None


async def test_a_response_is_complete_when_its_last_part_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"r")]})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if scope["path"] == "/cut":
            raise ConnectionError("the caller left")
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None: ...

    engine = FakeEngine()
    access = Access(answer, model_of=lambda _: ("", engine.observer), logs=True, count=lambda *_: None)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, "quire.access"):
        for path in ("/whole", "/cut"):
            with suppress(ConnectionError):
                await access({"type": "http", "method": "GET", "path": path, "headers": []}, send, send)  # type: ignore[arg-type]
    assert [vars(record)["fields"]["is_complete"] for record in caplog.records] == [True, False]
    assert engine.observer.sent == ["r", "r"]


@pytest.mark.parametrize(("requests", "shown"), [(True, ["request", "warning"]), (False, ["warning"])])
def test_requests_are_logged_where_they_are_asked_for(
    capfd: pytest.CaptureFixture[str], requests: bool, shown: list[str]
) -> None:
    root, access = logging.getLogger(), logging.getLogger("quire.access")
    before = root.handlers[:], root.level, access.level
    try:
        configure_logs("json", requests=requests)
        log_request("GET", "/x", 200, 0.5)
        logging.getLogger("quire.test").info("no news")
        access.warning("warning")
    finally:
        root.handlers[:], root.level, access.level = before
    assert [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()] == shown


def test_logs_are_json_objects(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure_logs("json", requests=False)
        try:
            raise ValueError("inside")
        except ValueError:
            logging.getLogger("quire.test").exception("it %s", "broke")
    finally:
        root.handlers[:], root.level = before
    (line,) = capfd.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["message"] == "it broke" and record["level"] == "error" and "ValueError" in record["exception"]


Bodies = list[tuple[str, ExportTraceServiceRequest]]


class Collector(BaseHTTPRequestHandler):
    """Keeps what it is sent."""

    bodies: Bodies

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[tuple[str, Bodies]]:
    kind = type("Kept", (Collector,), {"bodies": []})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", kind.bodies
    server.shutdown()
    server.server_close()


def test_spans_reach_the_collector(real: Running, collector: tuple[str, Bodies]) -> None:
    url, bodies = collector
    server = start(real.engine, observability=Observability(otlp_traces_endpoint=url))
    parent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    body = {"prompt": SECRET, "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=parent)
    server.server.should_exit = True
    server.thread.join(PATIENCE_S)
    real.engine.observer.close()
    assert {path for path, _ in bodies} == {"/v1/traces"}
    spans = {span.name: span for span in spans_of(bodies)}
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"} and len(spans_of(bodies)) == 4
    root = spans["llm_request"]
    assert root.trace_id.hex() == "ab" * 16 and root.parent_span_id.hex() == "cd" * 8
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent_span_id == root.span_id and spans[name].trace_id == root.trace_id
        assert root.start_time_unix_nano <= spans[name].start_time_unix_nano
        assert spans[name].end_time_unix_nano <= root.end_time_unix_nano
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 3600
    values = {item.key: item.value for item in root.attributes}
    assert values["gen_ai.usage.completion_tokens"].int_value == 5
    assert values["gen_ai.request.id"].string_value == f"{answer.json()['id']}/0"
    assert SECRET not in str(bodies)


def spans_of(bodies: Bodies) -> list[Any]:
    return [
        span for _, body in bodies for item in body.resource_spans for scope in item.scope_spans for span in scope.spans
    ]


def test_a_collector_that_is_absent_costs_spans_only(real: Running) -> None:
    server = start(real.engine, observability=Observability(otlp_traces_endpoint="http://127.0.0.1:1"))
    body = {"prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    server.server.should_exit = True
    server.thread.join(PATIENCE_S)
    real.engine.observer.close()
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("endpoint", ["localhost:4317", "ftp://x", "http://", "http://host:99999", "grpc://x:1"])
def test_an_endpoint_must_be_http(endpoint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Tracer(endpoint, "m")
    assert caught.value.field == "otlp_traces_endpoint"
