"""Connections: how many there may be, and how long one may be silent, slow to ask or slow to read.

uvicorn closes a connection that is idle after an answer; one that sends nothing at first, or a request's headers a byte
at a time, or never reads its answer, it keeps for ever, and it takes any number. `bounded_protocol` does not.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from uvicorn.protocols.http.h11_impl import H11Protocol

from quire.server.http import limits
from quire.server.http.context import ServerContext
from quire.server.http.shares import network_of

SILENT_SECONDS = 1.0
"""A connection that has asked for nothing for so long gives way to a new one before any other."""


class Connection(Protocol):
    """As a crowd sees it."""

    network: str


class Crowd:
    """Open connections. Past `most`, one that is not being answered has to go for each that comes.

    The first to go has asked for nothing since it was opened, for a second or more. If there is none, the network
    with the most idle ones gives up its oldest: that may be the newcomer.

    Args:
        most: so many at once.
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._num_open = 0
        self._silent: dict[Connection, float] = {}
        """Those that have asked for nothing -> since when. The oldest is the first."""
        self._idle: dict[str, dict[Connection, None]] = {}
        """Network -> those that are not being answered, in the order in which they became so."""

    def enter(self, connection: Connection) -> Connection | None:
        """Opened. Returns the one that has to go, if one has: it has left."""
        now_s = self._clock()
        self._num_open += 1
        self._silent[connection] = now_s
        self.rest(connection)
        if self._num_open <= self._most:
            return None
        last, since_s = next(iter(self._silent.items()))
        if now_s - since_s < SILENT_SECONDS:
            last = next(iter(self._idle[max(self._idle, key=lambda network: len(self._idle[network]))]))
        self.leave(last)
        return last

    def ask(self, connection: Connection) -> None:
        """It has sent a request, which is being answered."""
        self._silent.pop(connection, None)
        idle = self._idle.get(connection.network)
        if idle is not None:
            idle.pop(connection, None)
            if not idle:
                del self._idle[connection.network]

    def rest(self, connection: Connection) -> None:
        """It is idle."""
        self._idle.setdefault(connection.network, {})[connection] = None

    def leave(self, connection: Connection) -> None:
        """Closed."""
        self.ask(connection)
        self._num_open -= 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of the connections of one server."""

    header_s: float
    refusal: Callable[[bytes], bytes | None]
    """Of a request that begins with these bytes."""
    queued: tuple[bytes, ...]
    """How requests begin that wait in the queue."""
    crowd: Crowd
    crowded: bytes
    """The answer to a connection that there is no place for."""

    def refusal_of(self, data: bytes) -> bytes | None:
        """The answer to a connection that begins with these bytes, if the queue has no place for its request. Under a
        flood most connections bring one such request, and to parse each would take the time of those that have a
        place: so it is given unparsed, and the connection is closed."""
        return self.refusal(data) if data.startswith(self.queued) and b"\r\n\r\n" in data else None


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, closing a connection whose headers are not complete in time, that there is no place for, or
    whose reader takes nothing for `SLOW_READER_SECONDS`."""

    network = ""
    _header_deadline: asyncio.TimerHandle | None = None
    _read_deadline: asyncio.TimerHandle | None = None
    _has_begun = _has_left = False

    def __init__(self, bounds: Bounds, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._bounds = bounds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that all that its reader has not taken is known of
        self.network = network_of(self.client)
        self._start_timer()
        last = self._bounds.crowd.enter(self)
        if last is self:
            transport.write(self._bounds.crowded)
        if isinstance(last, BoundedProtocol):
            last.give_way()

    def give_way(self) -> None:
        """Make room for another one: the crowd knows it no more."""
        self._has_left = True
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        is_first, self._has_begun = not self._has_begun, True
        if is_first and (answer := self._bounds.refusal_of(data)) is not None:
            self.transport.write(answer)
            self.transport.close()
            return
        if self._is_idle() and self._header_deadline is None:
            self._start_timer()
        super().data_received(data)
        if not self._is_idle():
            self._stop_timer()
            if not self._has_left:
                self._bounds.crowd.ask(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_idle() and not self._has_left:  # else the next request was there already
            self._bounds.crowd.rest(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_watching()
        if not self._has_left:
            self._has_left = True
            self._bounds.crowd.leave(self)
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        """No request is being answered. uvicorn's `cycle` is None until the first one."""
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete

    def _start_timer(self) -> None:
        self._header_deadline = self.loop.call_later(self._bounds.header_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _on_timeout(self) -> None:
        self._header_deadline = None
        if self._is_idle():
            self.transport.close()

    def _watch_reader(self, unread: int) -> None:
        self._read_deadline = self.loop.call_later(limits.SLOW_READER_SECONDS, self._check_reader, unread)

    def _stop_watching(self) -> None:
        if self._read_deadline is not None:
            self._read_deadline.cancel()
            self._read_deadline = None

    def _check_reader(self, before: int) -> None:
        """Nothing is added to what lies here: uvicorn waits until it has left."""
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._watch_reader(unread)
        else:
            self.transport.abort()


def bounded_protocol(
    header_s: float, refusal: Callable[[bytes], bytes | None], context: ServerContext
) -> Callable[..., BoundedProtocol]:
    """What makes the protocol of each connection of a server.

    Args:
        header_s: from the opening of a connection to the end of a request's headers.
        refusal: of a request that begins with these bytes; None: it is not refused.
    """
    queued = tuple(f"POST {path} HTTP/1.1\r\n".encode() for path in sorted(context.queued_paths))
    error = context.limits.connections.error()
    crowd, crowded = (
        Crowd(context.limits.connections.value, time.monotonic),
        error.plain(context.error_body("", error)),
    )
    return partial(BoundedProtocol, Bounds(header_s, refusal, queued, crowd, crowded))
