"""Refusals before a route is found: two framings in one request, pages of others, and what there is no place for.

A request that waits in the queue is checked against it up to three times: from its first bytes, unparsed, where one
opens a connection; when its head is parsed, before any work; and by the engine, which knows its prompt.
"""

import ipaddress
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.engine.queue import Caller
from quire.errors import OverloadedError
from quire.server.http.access import log_request
from quire.server.http.context import ServerContext
from quire.server.http.errors import ApiError, as_api_error, error_response
from quire.server.http.keys import KeyRequired, credentials
from quire.server.http.shares import sharer_of

LARGE_BODY_BYTES = 2**16
"""Smaller answers fit into what the system holds for a connection."""


class QueueGuard:
    """Refuses, before a body is read or a route is found, what the queue has no place for, or what would take more than
    its caller's share of the places in the server. Under a flood, refusals are most of the work."""

    def __init__(self, app: ASGIApp, *, context: ServerContext, open_paths: frozenset[str]) -> None:
        self._app = app
        self._context = context
        self._paths = context.queued_paths
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look, then pass on."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        places, sharer = self._context.places, sharer_of(scope)
        try:
            if scope["path"] in self._paths and scope["method"] == "POST":
                self._context.models.check_room(self._context.caller(scope))
            if not places.take(sharer):
                raise self._context.limits.requests.error()
        except (OverloadedError, ApiError) as error:
            await error_response(scope, error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, _ending_last(send))
        finally:
            places.give(sharer)


def _ending_last(send: Send) -> Send:
    """What sends the end of a large answer apart: it waits until the answer has left, and so does the place."""

    async def sending(message: Message) -> None:
        if not message.get("more_body", False) and len(message.get("body", b"")) > LARGE_BODY_BYTES:
            await send({**message, "more_body": True})
            message = {"type": message["type"], "body": b""}
        await send(message)

    return sending


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


class ForeignPages:
    """Refuses what a page of an origin that is not allowed sends without asking first, as browsers let it: forms, and
    requests without a body. Before JSON they ask, and get no answer.

    Args:
        origins: of pages that may; `*`: all.
        hosts: names under which this server is known, besides addresses and localhost; `*`: any. A page elsewhere can
            let its own name point here (DNS rebinding), and is then of this server's origin.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str], hosts: Sequence[str] = ("*",)) -> None:
        self._app, self._origins = app, {origin.encode() for origin in origins}
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        headers = dict(scope.get("headers", ()))
        if "*" not in self._hosts and not self._is_known(headers.get(b"host", b"").decode("latin-1")):
            text = "this server is not known under that name (--allowed-hosts)"
            await error_response(scope, ApiError(403, text, code="unknown_host"))(scope, receive, send)
            return
        is_foreign = headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
        kind = headers.get(b"content-type", b"")
        is_simple = scope.get("method") == "POST" and not kind.startswith(b"application/json")
        if not (is_foreign and is_simple and self._origins.isdisjoint((b"*", headers.get(b"origin", b"")))):
            await self._app(scope, receive, send)
            return
        text = "pages of other origins may not use this server (--allowed-origins)"
        await error_response(scope, ApiError(403, text, code="foreign_page"))(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        name = name.lower()
        if not name or name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False


class EarlyRefusal:
    """Refuses from a request's first bytes, unparsed, when the queue has no place for its caller. What can be read in
    more than one way, and a key that is none, is left to the parser.

    Args:
        keys: the callers' keys; None: all requests are one caller's.
        logs: write a record for each request that is refused.
        leaves_pages: leave requests of pages in a browser to the parser, whose refusal they may read (CORS).
    """

    def __init__(
        self, context: ServerContext, keys: KeyRequired | None, *, logs: bool, leaves_pages: bool = False
    ) -> None:
        self._leaves_pages = leaves_pages
        self._context = context
        self._keys = keys
        self._logs = logs

    def __call__(self, data: bytes) -> bytes | None:
        """The whole response to a request with these first bytes, its head complete, if the queue has no place for
        it; None while it has."""
        begun_s = time.monotonic()
        lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")
        if self._leaves_pages and any(line[:7].lower() == b"origin:" for line in lines):
            return None
        name = "" if self._keys is None else self._caller(self._keys, lines[1:])
        if name is None:
            return None
        try:
            self._context.models.check_room(Caller(name, self._context.weights.get(name, 1)))
        except OverloadedError as error:
            refusal = as_api_error(error)
            method, path, _ = lines[0].decode().split(" ")
            body = self._context.error_body(path, refusal)
            self._context.counts.count(self._context.door_of(path), refusal.status)
            if self._logs:
                log_request(method, path, refusal.status, time.monotonic() - begun_s)
            return refusal.plain(body)
        return None

    def _caller(self, keys: KeyRequired, lines: list[bytes]) -> str | None:
        if any(line[:1] in (b" ", b"\t") for line in lines):  # the line before goes on
            return None
        named = [line.partition(b":") for line in lines]
        return keys.identify(credentials((name.lower(), value.strip()) for name, _, value in named))[0]
