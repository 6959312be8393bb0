"""Running the application under uvicorn, and stopping it without cutting a request off.

On SIGTERM or SIGINT: /readyz says 503 and new requests are refused; those that run have `drain_s` seconds to finish,
then the engine ends them with an error; then the process leaves with status 0. A second signal leaves at once.

uvicorn closes a connection that is idle after an answer; one that sends nothing at first, or a request's headers a byte
at a time, it keeps for ever: `header_timeout_protocol` does not.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from quire.server.http import limits
from quire.server.http.context import ServerContext

FLUSH_SECONDS = 3
"""For bytes on their way after the last request ended."""


class GracefulServer(uvicorn.Server):
    """uvicorn that drains before it closes its sockets, and that does not die of the signal it handled."""

    def __init__(
        self,
        app: Starlette,
        *,
        drain_s: float = limits.DRAIN_SECONDS,
        header_s: float = limits.HEADER_SECONDS,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._context: ServerContext = app.state.context
        super().__init__(
            uvicorn.Config(
                app,
                http=header_timeout_protocol(header_s, app.state.early_refusal, self._context.queued_paths),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=limits.HEADER_BYTES,
                timeout_keep_alive=limits.KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._drain_s = drain_s
        self._deadline_s: float | None = None
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins to drain, the second leaves at once."""
        if self._deadline_s is None:
            self.drain()
        else:
            self.force_exit = self.should_exit = True

    def drain(self) -> None:
        """Begin to stop."""
        self._context.gate.close()
        self._deadline_s = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: leave when the last request has, or when time is up."""
        if self._deadline_s is not None and not self.should_exit:
            if self._context.gate.num_inside == 0:
                self.should_exit = True
            elif time.monotonic() > self._deadline_s:
                await self._context.engine.shutdown()
                await asyncio.sleep(0)
                self.should_exit = True
        return await super().on_tick(counter)


def header_timeout_protocol(
    header_s: float, refusal: Callable[[bytes], bytes | None], queued_paths: frozenset[str]
) -> type[H11Protocol]:
    """uvicorn's protocol, closing a connection whose headers are not complete after `header_s` seconds.

    Under a flood most connections bring one request that there is no place for, and to parse each would take the time
    of those that have a place: where `refusal` gives an answer, a connection whose first bytes post to one of
    `queued_paths` gets it, unparsed, and is closed.
    """
    queued = tuple(f"POST {path} HTTP/1.1\r\n".encode() for path in sorted(queued_paths))

    class HeaderTimeoutProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _has_begun = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            is_first, self._has_begun = not self._has_begun, True
            if is_first and data.startswith(queued) and b"\r\n\r\n" in data and (answer := refusal(data)) is not None:
                self.transport.write(answer)
                self.transport.close()
                return
            if self._is_idle() and self._deadline is None:
                self._start_timer()
            super().data_received(data)
            if not self._is_idle():
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _is_idle(self) -> bool:
            """No request is being answered. uvicorn's `cycle` is None until the first one."""
            cycle: Any = self.cycle
            return cycle is None or cycle.response_complete

        def _start_timer(self) -> None:
            self._deadline = self.loop.call_later(header_s, self._on_timeout)

        def _stop_timer(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _on_timeout(self) -> None:
            self._deadline = None
            if self._is_idle():
                self.transport.close()

    return HeaderTimeoutProtocol
