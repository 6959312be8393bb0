"""Connections and signals without a socket: the protocol on a transport that keeps what it is given, and a clock that
is set by hand."""

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from quire.server.doors.openai.routes import OPENAI
from quire.server.http.app import create_app
from quire.server.http.serve import GracefulServer, header_timeout_protocol
from tests.conftest import PATIENCE_S
from tests.server.fake_engine import FakeEngine

HEADER_S = 7.0
PROBE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
ASK = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


class Timers:
    """Of a loop whose clock stands still: what was asked to be called later."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.due: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> Any:
        entry = (delay_s, lambda: callback(*args))
        self.due.append(entry)
        timers = self

        class Handle:
            def cancel(self) -> None:
                if entry in timers.due:
                    timers.due.remove(entry)

        return Handle()

    def pass_time(self) -> None:
        """All that is due happens."""
        due, self.due = self.due, []
        for _, callback in due:
            callback()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.is_closed = b"", False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: Any) -> None: ...


class Connection:
    """One, to an application that answers when it is let."""

    def __init__(self, refusal: Callable[[bytes], bytes | None] = lambda data: None) -> None:
        self.go, self.num_asked = asyncio.Event(), 0
        self.timers, self.transport = Timers(asyncio.get_running_loop()), Transport()
        config = Config(self._answer, interface="asgi3", lifespan="off", log_config=None, timeout_keep_alive=10_000)
        config.load()
        kind = header_timeout_protocol(HEADER_S, refusal, OPENAI.queued_paths)
        self.protocol = kind(config, ServerState(), {}, self.timers)  # type: ignore[arg-type]
        self.protocol.connection_made(self.transport)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_asked += 1
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    @property
    def deadlines(self) -> list[float]:
        return [delay_s for delay_s, _ in self.timers.due if delay_s == HEADER_S]

    async def answered(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.transport.written.count(b"\r\n\r\nok") < count:
                await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_connection_that_sends_no_headers_in_time_is_closed() -> None:
    for sent in (b"", b"G", PROBE[:-2]):
        connection = Connection()
        if sent:
            connection.protocol.data_received(sent)
        assert connection.deadlines == [HEADER_S], "the time begins with the connection, and once"
        connection.timers.pass_time()
        assert connection.transport.is_closed and connection.num_asked == 0


async def test_an_answer_that_takes_longer_than_headers_may_is_not_cut_off() -> None:
    connection = Connection()
    connection.protocol.data_received(PROBE)
    assert connection.deadlines == []
    connection.timers.pass_time()
    connection.protocol._on_timeout()  # type: ignore[attr-defined]
    assert not connection.transport.is_closed
    connection.go.set()
    await connection.answered(1)
    assert not connection.transport.is_closed


async def test_the_headers_of_the_next_request_have_their_time_too() -> None:
    connection = Connection()
    connection.go.set()
    connection.protocol.data_received(PROBE)
    await connection.answered(1)
    assert connection.deadlines == [], "a connection that rests has the time to rest"
    connection.protocol.data_received(PROBE[:4])
    connection.protocol.data_received(PROBE[4:9])
    assert connection.deadlines == [HEADER_S]
    connection.protocol.data_received(PROBE[9:])
    assert connection.deadlines == []
    await connection.answered(2)
    connection.protocol.data_received(PROBE[:4])
    connection.timers.pass_time()
    assert connection.transport.is_closed
    connection.protocol.connection_lost(None)


async def test_a_connection_that_is_gone_has_no_deadline() -> None:
    connection = Connection()
    connection.protocol.connection_lost(None)
    assert connection.deadlines == []


async def test_what_is_refused_from_its_first_bytes_is_never_parsed() -> None:
    seen: list[bytes] = []

    def refuse(data: bytes) -> bytes:
        seen.append(data)
        return b"refused"

    connection = Connection(refuse)
    connection.protocol.data_received(ASK)
    assert seen == [ASK] and connection.transport.written == b"refused" and connection.transport.is_closed
    assert connection.num_asked == 0
    for first in (PROBE, ASK.replace(b"/v1/completions", b"/tokenize"), ASK[:40], ASK.replace(b"1.1", b"1.0")):
        connection = Connection(refuse)
        connection.protocol.data_received(first)
        assert connection.transport.written == b"" and not connection.transport.is_closed and len(seen) == 1
    connection = Connection(refuse)
    connection.go.set()
    connection.protocol.data_received(PROBE)
    await connection.answered(1)
    connection.protocol.data_received(ASK)
    await connection.answered(2)
    assert len(seen) == 1, "a later request of a connection is parsed"


def test_the_first_signal_drains_and_the_second_leaves_at_once() -> None:
    app = create_app(FakeEngine(), apis=[OPENAI], served_model_name="m")  # type: ignore[arg-type]
    server = GracefulServer(app, drain_s=1000.0)
    with app.state.context.gate.inside("one"):
        server.handle_exit(signal.SIGTERM, None)
        assert not app.state.context.gate.is_open and not server.should_exit and not server.force_exit
        asyncio.run(server.on_tick(0))
        assert not server.should_exit, "a request is inside"
        server.handle_exit(signal.SIGINT, None)
        assert server.should_exit and server.force_exit


async def test_it_leaves_with_the_last_request_or_ends_the_rest_when_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for num_inside, passed_s, leaves, is_ended in (
        (0, 0.0, True, False), (1, 9.9, False, False), (2, 9.9, False, False), (1, 10.1, True, True),
    ):  # fmt: skip
        engine = FakeEngine()
        app = create_app(engine, apis=[OPENAI], served_model_name="m")  # type: ignore[arg-type]
        gate, now_s = app.state.context.gate, 100.0
        monkeypatch.setattr("quire.server.http.serve.time.monotonic", lambda now_s=now_s: now_s)
        server = GracefulServer(app, drain_s=10.0)
        server.servers = []
        gate._inside.update(str(number) for number in range(num_inside))
        await server.on_tick(0)
        assert not server.should_exit, "no signal has come"
        server.drain()
        monkeypatch.setattr(
            "quire.server.http.serve.time.monotonic", lambda now_s=now_s, more_s=passed_s: now_s + more_s
        )
        await server.on_tick(0)
        assert (server.should_exit, not engine.is_healthy) == (leaves, is_ended), (num_inside, passed_s)
        monkeypatch.undo()
