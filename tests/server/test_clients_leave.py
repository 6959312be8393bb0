"""A client that goes away cancels its work: on every route that queues, whole and streamed; as each client leaves."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import anthropic
import huggingface_hub.constants
import ollama
import pytest
from huggingface_hub import InferenceClient

from quire.server.doors.all import DOORS
from tests.conftest import PATIENCE_S
from tests.server.conftest import MODEL, Running, start, wait_until
from tests.server.fake_engine import FakeEngine

HELD: Any = [{"role": "user", "content": "held"}]
CHAT = {"model": MODEL, "messages": HELD, "max_tokens": 50}
PARTS = {"model": MODEL, "messages": HELD}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [{"prompt": "held", "stream": stream} for stream in (False, True)],
    "/v1/chat/completions": [{**CHAT, "stream": stream} for stream in (False, True)],
    "/v1/responses": [{"input": "held", "stream": stream} for stream in (False, True)],
    "/v1/messages": [{**CHAT, "stream": stream} for stream in (False, True)],
    "/api/chat": [{**PARTS, "stream": stream} for stream in (False, True)],
    "/api/generate": [{"model": MODEL, "prompt": "held", "stream": stream} for stream in (False, True)],
    "/generate": [{"inputs": "held"}],
    "/generate_stream": [{"inputs": "held"}],
    "/": [{"inputs": "held", "stream": stream} for stream in (False, True)],
}


@pytest.fixture(scope="module")
def holding() -> Iterator[Running]:
    """Of an engine that waits after two tokens."""
    instance = start(FakeEngine())
    yield instance
    instance.stop()


@pytest.fixture
def aborted(holding: Running) -> Iterator[Callable[[], bool]]:
    """Whether the work of one request was aborted, and nothing is left of it."""
    engine, before = holding.engine, holding.engine.num_aborted
    yield lambda: wait_until(lambda: engine.num_aborted == before + 1 and engine.num_running == 0)
    assert wait_until(lambda: holding.server._context.gate.num_inside == 0)


def test_every_route_that_queues_is_here() -> None:
    assert {*BODIES} == {path for door in DOORS for path in door.queued_paths}


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in BODIES.items() for body in bodies])
def test_a_connection_that_closes(
    holding: Running, aborted: Callable[[], bool], path: str, body: dict[str, Any]
) -> None:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(holding.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + data)
        assert wait_until(lambda: holding.engine.num_running == 1)
        if body.get("stream", path == "/generate_stream"):
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
    assert aborted()


def _hub(url: str) -> Iterator[str]:
    client = InferenceClient(url)  # which closes its streams when it is forgotten
    yield from client.text_generation("held", stream=True)


STREAMS: dict[str, Callable[[str, Running], Any]] = {
    "openai": lambda url, running: running.client().chat.completions.create(**CHAT, stream=True),
    "openai responses": lambda url, running: running.client().responses.create(input="held", stream=True),
    "anthropic": lambda url, running: anthropic.Anthropic(base_url=url, api_key="none").messages.create(
        **CHAT, stream=True
    ),
    "ollama": lambda url, running: ollama.Client(url, timeout=PATIENCE_S).chat(**PARTS, stream=True),
    "huggingface_hub": lambda url, running: _hub(url),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_its_client_closes(
    holding: Running, aborted: Callable[[], bool], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with closing(STREAMS[name](holding.url, holding)) as stream:
        assert next(iter(stream))
        assert holding.engine.num_running == 1
    assert aborted()
