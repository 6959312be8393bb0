"""Connections that must ask within a time, and in a way that can be read in one way only.

uvicorn closes a connection that is idle after an answer; one that sends nothing at first, or a request's headers a byte
at a time, it keeps for ever.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from quire.server.errors import ApiError

QUEUED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Routes whose requests wait in the queue."""
_QUEUED = tuple(f"POST {path} HTTP/1.1\r\n".encode() for path in sorted(QUEUED_PATHS))


class RejectAmbiguousFraming:
    """Refuses a request with both a length and chunks, and closes the connection: a proxy in front may have read it
    otherwise, and then what follows is smuggled past it (RFC 9112, 6.3)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        names = {name for name, _ in scope.get("headers", ())}
        if not names >= {b"content-length", b"transfer-encoding"}:
            await self._app(scope, receive, send)
            return
        text = "a request has a Content-Length or a Transfer-Encoding, not both"
        refusal = ApiError(400, text, code="malformed_request", headers={"Connection": "close"})
        await refusal.response()(scope, receive, send)


def header_timeout_protocol(header_s: float, refusal: Callable[[bytes], bytes | None]) -> type[H11Protocol]:
    """uvicorn's protocol, closing a connection whose headers are not complete after `header_s` seconds.

    Under a flood most connections bring one request that there is no place for, and to parse each would take the time
    of those who have a place: where `refusal` gives an answer, a connection whose first bytes ask one of `QUEUED_PATHS`
    gets it, unparsed, and is closed.
    """

    class HeaderTimeoutProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _has_begun = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            is_first, self._has_begun = not self._has_begun, True
            if is_first and data.startswith(_QUEUED) and b"\r\n\r\n" in data and (answer := refusal(data)) is not None:
                self.transport.write(answer)
                self.transport.close()
                return
            if self._is_idle() and self._deadline is None:
                self._expect()
            super().data_received(data)
            if not self._is_idle():
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _is_idle(self) -> bool:
            """No request is being answered. uvicorn's `cycle` is None until the first one."""
            cycle: Any = self.cycle
            return cycle is None or cycle.response_complete

        def _expect(self) -> None:
            self._deadline = self.loop.call_later(header_s, self._give_up)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self._is_idle():
                self.transport.close()

    return HeaderTimeoutProtocol
