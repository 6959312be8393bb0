"""The wire: framing of streams, closed connections, keys, probes, metrics, stopping."""

import json
import socket
import threading
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from quire.errors import OverloadedError
from quire.server.http.app import Observability
from quire.server.http.limits import Limits
from quire.server.http.listen import bind
from quire.server.http.probes import OPEN_PATHS
from tests.conftest import PATIENCE_S
from tests.server.conftest import MODEL, Running, start, wait_until
from tests.server.fake_engine import FakeEngine

HELD_CHAT = {"messages": [{"role": "user", "content": "held"}], "max_tokens": 400}
HELD_TEXT = {"prompt": ["held", "held too"], "n": 2, "max_tokens": 400}


def test_event_framing(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    events = [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
    assert [event["choices"][0]["text"] for event in events] == ["a", "b"]
    assert {event["id"] for event in events} == {response.headers["x-request-id"]}


def test_error_event_ends_the_stream_without_done(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "fail", "max_tokens": 9, "stream": True})
    assert response.status_code == 200
    parts = [part for part in response.text.split("\n\n") if part]
    error = json.loads(parts[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("request_failed", "the row broke")
    assert "[DONE]" not in response.text


def test_error_before_the_first_token_is_a_status(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "x" * 600, "stream": True})
    assert response.status_code == 400


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("route", "body"), [("chat/completions", HELD_CHAT), ("completions", HELD_TEXT)])
def test_closed_connection_aborts(running: Running, route: str, body: dict[str, Any], stream: bool) -> None:
    engine: FakeEngine = running.engine
    before, wanted = engine.num_aborted, len(body.get("prompt", [1]))
    data = json.dumps({**body, "stream": stream}).encode()
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert wait_until(lambda: engine.num_running == wanted)
        if stream:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
    assert wait_until(lambda: engine.num_aborted == before + wanted)
    assert engine.num_running == 0
    assert wait_until(lambda: running.server._context.gate.num_inside == 0)


def test_one_failing_prompt_aborts_its_siblings(running: Running, http: httpx.Client) -> None:
    before = running.engine.num_aborted
    response = http.post("/v1/completions", json={"prompt": ["held", [256]], "max_tokens": 400})
    assert response.status_code == 400
    assert running.engine.num_running == 0
    assert running.engine.num_aborted == before + 1


def test_probes_version_and_metrics(http: httpx.Client) -> None:
    for path in sorted(OPEN_PATHS):
        assert http.get(path).status_code == 200
    assert set(http.get("/version").json()) == {"version"}
    text = http.get("/metrics").text
    assert 'quire:num_requests_running{engine="0",model_name="tiny"} 0.0' in text
    assert 'quire:generation_tokens_total{engine="0",model_name="tiny"} 7.0' in text
    assert 'quire:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 3.0' in text
    assert 'quire:time_to_first_token_seconds_bucket{engine="0",le="1",model_name="tiny"} 2.0' in text
    assert 'quire:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="tiny"} 3.0' in text
    assert 'quire:time_to_first_token_seconds_sum{engine="0",model_name="tiny"} 1.5' in text


def _paths(app: Any) -> list[str]:
    """Of every route: newer releases of FastAPI keep included routers as they are, older ones flatten them."""
    nested = [getattr(route, "original_router", None) for route in app.routes]
    routers = [app, *(router for router in nested if router is not None)]
    return [route.path for router in routers for route in router.routes if isinstance(route, Route)]


def test_key_guards_every_route_but_the_probes() -> None:
    locked = start(FakeEngine(), api_key="secret", metrics_prefix="vllm")
    paths = _paths(locked.server.config.app)
    try:
        with httpx.Client(base_url=locked.url) as http:
            assert {path for path in paths if http.get(path).status_code != 401} == OPEN_PATHS
            assert {"/v1/completions", "/v1/chat/completions", "/metrics", "/version"} <= set(paths)
            assert len(paths) == 68
            bad = ["secret", "Bearer", "Bearer secre", "Bearer secretx", "Basic secret", "bearer\tsecret"]
            for value in bad:
                assert http.get("/version", headers={"authorization": value}).status_code == 401, value
            twice = [("authorization", "Bearer secret"), ("authorization", "Bearer x")]
            assert http.get("/version", headers=twice).status_code == 401
            assert "www-authenticate" in http.get("/nowhere").headers
            http.headers["authorization"] = "Bearer secret"
            assert http.get("/version").status_code == 200
            refused = http.get("/metrics")
            assert refused.status_code == 403 and "--metrics-open" in refused.json()["error"]["message"]
    finally:
        locked.stop()


@pytest.mark.parametrize(
    ("options", "statuses"),
    [
        ({}, {"": 200}),
        ({"api_key": "caller"}, {"": 401, "caller": 403, "admin": 401}),
        (
            {"api_key": "caller", "observability": Observability(admin_api_key="admin")},
            {"": 401, "caller": 403, "admin": 200},
        ),
        ({"observability": Observability(admin_api_key="admin")}, {"": 200, "admin": 200}),
        (
            {"api_key": "caller", "observability": Observability(opens_metrics=True)},
            {"": 200, "caller": 200, "unknown": 200},
        ),
    ],
)
def test_metrics_are_the_operators_where_callers_need_keys(options: dict[str, Any], statuses: dict[str, int]) -> None:
    server = start(FakeEngine(), metrics_prefix="vllm", **options)
    try:
        for key, status in statuses.items():
            answer = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {key}"} if key else {})
            assert answer.status_code == status, key
            assert ("vllm:num_requests_running" in answer.text) is (status == 200)
    finally:
        server.stop()


def test_full_house_is_503_with_retry_after() -> None:
    small = start(FakeEngine(), limits=Limits().with_values({"requests": 1}))
    try:
        with httpx.Client(base_url=small.url) as http:
            with http.stream("POST", "/v1/chat/completions", json={**HELD_CHAT, "stream": True}):
                response = http.post("/v1/completions", json={"prompt": "x"})
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "overloaded"
            assert wait_until(lambda: small.server._context.gate.num_inside == 0)
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    finally:
        small.stop()


def test_overload_of_the_engine_keeps_its_retry_after() -> None:
    class Full(FakeEngine):
        async def generate(self, *args: Any, **kwargs: Any) -> Any:
            if not self.calls:  # always; the generator form is what the server needs
                raise OverloadedError("the queue is full", retry_after_s=7)
            yield

    full = start(Full())
    try:
        response = httpx.post(f"{full.url}/v1/completions", json={"prompt": "x"})
        assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    finally:
        full.stop()


def test_unexpected_exception_is_a_500_that_tells_nothing() -> None:
    class Broken(FakeEngine):
        async def encode_chat(self, messages: Any, **options: Any) -> list[int]:
            raise KeyError("/home/secret/path")

    broken = start(Broken())
    try:
        response = httpx.post(f"{broken.url}/v1/chat/completions", json=HELD_CHAT)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert httpx.post(f"{broken.url}/v1/completions", json={"prompt": "x"}).status_code == 200
    finally:
        broken.stop()


@pytest.mark.parametrize(
    ("is_healthy", "is_ready", "statuses"),
    [(True, True, (200, 200, 200)), (True, False, (200, 503, 503)), (False, False, (503, 503, 503))],
)
def test_probes_tell_a_core_that_is_replaced_from_an_engine_that_is_dead(
    is_healthy: bool, is_ready: bool, statuses: tuple[int, ...]
) -> None:
    """The first takes no new traffic and is left alone; the second is started again."""

    class Engine(FakeEngine):
        @property
        def is_ready(self) -> bool:
            return is_ready

    engine = Engine()
    engine.is_healthy = is_healthy
    probed = start(engine)
    try:
        paths = ("/livez", "/readyz", "/health")
        assert tuple(httpx.get(probed.url + path).status_code for path in paths) == statuses
    finally:
        probed.stop()


def test_dead_engine_is_not_alive() -> None:
    dying = start(FakeEngine())
    try:
        response = httpx.post(f"{dying.url}/v1/completions", json={"prompt": "die", "max_tokens": 9})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_dead"
        assert {path: httpx.get(dying.url + path).status_code for path in OPEN_PATHS} == dict.fromkeys(OPEN_PATHS, 503)
    finally:
        dying.stop()


def _read_stream(url: str, lines: list[str]) -> None:
    body = {"prompt": "held", "max_tokens": 25, "stream": True, "model": MODEL}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines.extend(line for line in response.iter_lines() if line)


def test_stopping_lets_requests_finish() -> None:
    stopping = start(FakeEngine(), drain_s=PATIENCE_S)
    lines: list[str] = []
    reader = threading.Thread(target=_read_stream, args=(stopping.url, lines))
    reader.start()
    assert wait_until(lambda: stopping.engine.num_running == 1)
    stopping.server.drain()
    assert httpx.get(f"{stopping.url}/readyz").status_code == 503
    assert httpx.get(f"{stopping.url}/livez").status_code == 200
    refused = httpx.post(f"{stopping.url}/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    stopping.engine.released.set()
    reader.join(PATIENCE_S)
    stopping.thread.join(PATIENCE_S)
    assert not stopping.thread.is_alive()
    assert lines[-1] == "data: [DONE]"
    assert len(lines) == 26


def test_stopping_ends_what_does_not_finish_with_an_error() -> None:
    stopping = start(FakeEngine(), drain_s=0.1)
    lines: list[str] = []
    reader = threading.Thread(target=_read_stream, args=(stopping.url, lines))
    reader.start()
    assert wait_until(lambda: stopping.engine.num_running == 1)
    stopping.stop()
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"


def test_answers_do_not_wait_for_an_acknowledgement() -> None:
    """asyncio sets TCP_NODELAY on what it accepts only where the listening socket names its protocol."""
    listener = bind("127.0.0.1", 0)
    assert listener.proto == socket.IPPROTO_TCP
    listener.close()
