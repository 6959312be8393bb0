"""A reader that stops reading, over a real socket, before a server of two processes: bounded in memory, then aborted,
and of no concern to others."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.engine.stream import MAX_UNREAD, Stream
from quire.llm import AsyncLLM
from quire.outputs import RequestOutput
from quire.server.http import limits
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start, wait_until

CANARY = {"prompt": "hello", "max_tokens": 64, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logprobs": 2}
LOUD = {
    "prompt": "hello", "max_tokens": 480, "n": 20, "ignore_eos": True, "logprobs": 20, "stream": True,
    "return_token_ids": True,
}  # fmt: skip
"""About 12 MB of events, of which the kernel holds the first steps' here."""


@pytest.fixture
def apart(tiny_model: Path) -> Iterator[Running]:
    instance = start(AsyncLLM(str(tiny_model), core_process=True, max_num_seqs=48))
    for listener in instance.server.servers[0].sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # of the connections that it accepts
    yield instance
    instance.stop()
    instance.engine.close()


def asked(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection that asked, and has not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def stalled(server: Running) -> socket.socket:
    """It has seen the first bytes of its stream, and reads no more."""
    connection = asked(server, LOUD)
    assert connection.recv(64).startswith(b"HTTP/1.1 200")
    return connection


def canary(server: Running) -> Any:
    response = httpx.post(f"{server.url}/v1/completions", json=CANARY)
    assert response.status_code == 200
    return response.json()["choices"]


def test_a_reader_that_stalls_is_bounded_then_aborted(apart: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are let go while they still run: they stall with the first steps, and most of their steps come after."""
    unread: list[int] = []

    class Seen(Stream):
        def put(self, output: RequestOutput | Exception) -> None:
            super().put(output)
            unread.append(len(self._unread))

    monkeypatch.setattr("quire.engine.async_engine.Stream", Seen)
    monkeypatch.setattr(limits, "SLOW_READER_SECONDS", 0.5)
    alone, engine = canary(apart), apart.engine
    connections = [stalled(apart) for _ in range(2)]
    try:
        assert canary(apart) == alone  # the others get what they always get
        assert wait_until(lambda: num_aborted(apart) == 2 * LOUD["n"])
        assert 1 < max(unread) <= MAX_UNREAD
        assert wait_until(lambda: not apart.server._context.gate.num_inside)
        for connection in connections:
            assert b"[DONE]" not in everything(connection)[-200:]
        assert canary(apart) == alone
    finally:
        for connection in connections:
            connection.close()
    assert wait_until(lambda: engine._engine.channel.gauges.cache_usage == 0 and not engine._streams)


def test_a_whole_answer_that_nobody_takes_is_cut_off(apart: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds its place until then."""
    places = apart.server._context.places
    monkeypatch.setattr(limits, "SLOW_READER_SECONDS", 0.5)
    with asked(apart, {**LOUD, "stream": False, "max_tokens": 200}) as connection:
        assert wait_until(lambda: places.num_held)
        assert wait_until(lambda: not places.num_held and not apart.server.server_state.connections)
        assert not everything(connection).endswith(b"}")


def num_aborted(server: Running) -> float:
    reason = (("finished_reason", "abort"),)
    return sum(item.value for item in server.engine.get_metrics() if item.labels == reason)


def everything(connection: socket.socket) -> bytes:
    """What still comes, until the server's end of the connection is closed."""
    connection.settimeout(PATIENCE_S)
    found = b""
    try:
        while data := connection.recv(2**16):
            found = (found + data)[-1000:]
    except ConnectionResetError:
        pass
    return found
