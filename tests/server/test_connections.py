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
from quire.server.http.connections import SILENT_SECONDS, Crowd, bounded_protocol
from quire.server.http.limits import SLOW_READER_SECONDS, Limits
from quire.server.http.serve import GracefulServer
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
        self.written, self.is_closed, self.is_aborted = b"", False, False
        self.num_unread, self.most_unread = 0, -1

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.most_unread = high

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: Any) -> None: ...


def protocol(refusal: Callable[[bytes], bytes | None] = lambda data: None, most: int = 100) -> Callable[..., Any]:
    limits = Limits().with_values({"connections": most})
    app = create_app(FakeEngine(), apis=[OPENAI], served_model_name="m", limits=limits)  # type: ignore[arg-type]
    return bounded_protocol(HEADER_S, refusal, app.state.context)


class Connection:
    """One, to an application that answers when it is let."""

    def __init__(
        self, refusal: Callable[[bytes], bytes | None] = lambda data: None, kind: Callable[..., Any] | None = None
    ) -> None:
        self.go, self.num_asked = asyncio.Event(), 0
        self.timers, self.transport = Timers(asyncio.get_running_loop()), Transport()
        config = Config(self._answer, interface="asgi3", lifespan="off", log_config=None, timeout_keep_alive=10_000)
        config.load()
        self.protocol = (kind or protocol(refusal))(config, ServerState(), {}, self.timers)
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


async def test_an_answer_that_is_not_read_is_cut_off_and_one_that_is_read_slowly_is_not() -> None:
    connection = Connection()
    assert connection.transport.most_unread == 0, "all that is not taken is known of"
    connection.transport.num_unread = 1000
    connection.protocol.pause_writing()
    for num_unread in (999, 400):
        assert [delay_s for delay_s, _ in connection.timers.due if delay_s == SLOW_READER_SECONDS]
        connection.transport.num_unread = num_unread
        connection.timers.pass_time()
        assert not connection.transport.is_aborted
    connection.protocol.resume_writing()
    assert SLOW_READER_SECONDS not in [delay_s for delay_s, _ in connection.timers.due]
    connection.protocol.pause_writing()
    connection.timers.pass_time()
    assert connection.transport.is_aborted
    connection.protocol.connection_lost(None)


async def test_the_connection_past_the_bound_takes_an_idle_ones_place_and_is_refused_where_none_is() -> None:
    kind = protocol(most=2)
    first, second = Connection(kind=kind), Connection(kind=kind)
    for connection in (first, second):
        connection.protocol.data_received(PROBE)
    third = Connection(kind=kind)
    assert third.transport.written.startswith(b"HTTP/1.1 503 ") and third.transport.is_aborted
    assert b"limited to 2 connections" in third.transport.written
    third.protocol.connection_lost(None)
    second.go.set()
    await second.answered(1)
    fourth = Connection(kind=kind)
    assert second.transport.is_aborted and not fourth.transport.is_closed and not first.transport.is_closed
    second.protocol.connection_lost(None)
    assert Connection(kind=kind).transport.is_aborted is False and fourth.transport.is_aborted


class Visitor:
    """A connection, as a crowd sees it."""

    def __init__(self, network: str) -> None:
        self.network = network


def test_those_that_asked_for_nothing_for_a_second_go_first_then_the_fullest_networks_oldest() -> None:
    now_s = [0.0]
    crowd = Crowd(7, lambda: now_s[0])
    silent, asks, early, rest = Visitor("a"), Visitor("a"), Visitor("z"), [Visitor("b") for _ in range(3)]
    for visitor in (silent, asks, early, *rest):
        assert crowd.enter(visitor) is None
    for visitor in (asks, early, *rest):
        crowd.ask(visitor)
    for visitor in (early, *rest):
        crowd.rest(visitor)
    now_s[0] = SILENT_SECONDS
    young = Visitor("c")
    assert crowd.enter(young) is None
    assert crowd.enter(Visitor("d")) is silent
    assert crowd.enter(Visitor("e")) is rest[0], "of the fullest network, not the oldest of all"
    crowd.leave(asks)
    assert crowd.enter(Visitor("f")) is None
    now_s[0] += SILENT_SECONDS
    assert crowd.enter(Visitor("g")) is young


def test_a_crowd_remembers_nothing_of_those_that_left() -> None:
    crowd = Crowd(2, lambda: 0.0)
    for number in range(100):
        visitor = Visitor(str(number))
        crowd.enter(visitor)
        crowd.ask(visitor)
        crowd.rest(visitor)
        crowd.leave(visitor)
    assert not crowd._idle and not crowd._silent and crowd._num_open == 0


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
