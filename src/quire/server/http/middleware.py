"""Refusals before a route is found: two framings in one request, and what the queue has no place for."""

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.errors import OverloadedError
from quire.server.http.context import ServerContext
from quire.server.http.errors import ApiError, error_response


class QueueGuard:
    """Refuses, before a body is read or a route is found, what the queue has no place for: under a flood, refusals
    are most of the work."""

    def __init__(self, app: ASGIApp, *, context: ServerContext) -> None:
        self._app = app
        self._context = context
        self._paths = context.queued_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look, then pass on."""
        if scope["type"] == "http" and scope["path"] in self._paths and scope["method"] == "POST":
            try:
                self._context.engine.check_room(self._context.caller(scope))
            except OverloadedError as error:
                await error_response(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


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
        await error_response(scope, refusal)(scope, receive, send)
