"""A reader that stops reading, over a real socket, before a server of two processes: bounded in memory, then aborted,
and of no concern to others."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.engine.stream import MAX_UNREAD
from quire.llm import AsyncLLM
from quire.server import limits
from tests.server.conftest import Running, start, wait_until

CANARY = {"prompt": "hello", "max_tokens": 64, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logprobs": 2}
LOUD = {
    "prompt": "hello", "max_tokens": 480, "n": 32, "ignore_eos": True, "logprobs": 20, "stream": True,
    "return_token_ids": True,
}  # fmt: skip
"""About 20 MB of events: more than the kernel holds for a connection."""


@pytest.fixture
def apart(tiny_model: Path) -> Iterator[Running]:
    instance = start(AsyncLLM(str(tiny_model), core_process=True, max_num_seqs=48))
    yield instance
    instance.stop()
    instance.engine.close()


def stalled(server: Running) -> socket.socket:
    """A connection that asked, has seen the first bytes of its stream, and reads no more."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    data = json.dumps(LOUD).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    assert connection.recv(64).startswith(b"HTTP/1.1 200")
    return connection


def canary(server: Running) -> Any:
    response = httpx.post(f"{server.url}/v1/completions", json=CANARY, timeout=30)
    assert response.status_code == 200
    return response.json()["choices"]


def test_a_reader_that_stalls_is_bounded_then_aborted(apart: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SLOW_READER_SECONDS", 0.5)
    alone, engine = canary(apart), apart.engine
    connections = [stalled(apart) for _ in range(2)]
    try:
        most_unread = 0
        while apart.server._context.gate.num_inside:
            assert canary(apart) == alone  # the others get what they always get
            most_unread = max([most_unread, *(stream.num_unread for stream in list(engine._streams.values()))])
        assert 0 < most_unread <= MAX_UNREAD
        assert wait_until(lambda: num_aborted(apart) >= LOUD["n"]), "they were let go while they still ran"
        for connection in connections:
            assert b"[DONE]" not in everything(connection)[-200:]
        assert canary(apart) == alone
    finally:
        for connection in connections:
            connection.close()
    assert wait_until(lambda: engine._engine._channel.gauges.cache_usage == 0) and not engine._streams


def num_aborted(server: Running) -> float:
    reason = (("finished_reason", "abort"),)
    return sum(item.value for item in server.engine.get_metrics() if item.labels == reason)


def everything(connection: socket.socket) -> bytes:
    """What still comes, until the server's end of the connection is closed."""
    connection.settimeout(20)
    found = b""
    try:
        while data := connection.recv(2**16):
            found = (found + data)[-1000:]
    except ConnectionResetError:
        pass
    return found
