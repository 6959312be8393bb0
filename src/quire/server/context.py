"""What every route works with: the engine, its names, and the gate that requests come through."""

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.engine.queue_bound import Caller
from quire.errors import InvalidRequestError, ModelNotFoundError, OverloadedError
from quire.server import limits
from quire.server.body import Bodies
from quire.server.errors import as_api_error
from quire.server.keys import cache_namespace, caller_of
from quire.server.limits import Limits
from quire.server.protocol.sampling import check_timeout

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine


class Gate:
    """Knows the requests inside and refuses past a bound, or when the server is stopping."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: set[str] = set()
        self.is_open = True

    def close(self) -> None:
        """Let nobody in any more; those inside go on."""
        self.is_open = False

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Hold a place for as long as the request of this name is worked on.

        Raises:
            OverloadedError: closed or full.
            InvalidRequestError: a request of this name is inside.
        """
        if not self.is_open:
            raise OverloadedError("the server is stopping", retry_after_s=limits.RETRY_AFTER_SECONDS)
        if self.num_inside >= self._most:
            raise OverloadedError(
                f"the server works on {self._most} requests already", retry_after_s=limits.RETRY_AFTER_SECONDS
            )
        if name in self._inside:
            raise InvalidRequestError("a request with this request_id is under way", param="request_id")
        self._inside.add(name)
        try:
            yield
        finally:
            self._inside.discard(name)

    @property
    def num_inside(self) -> int:
        """Requests that are worked on."""
        return len(self._inside)


TIMEOUT_HEADER = "X-Request-Timeout"
"""The same as the field `timeout`, for proxies and clients that set headers."""


def _timeout(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return check_timeout(float(text))
    except (ValueError, InvalidRequestError):
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} must be in (0, {limits.MAX_TIMEOUT_SECONDS}] seconds", param=TIMEOUT_HEADER
        ) from None


class RequestContext(NamedTuple):
    """Who asks, and how long they wait."""

    caller: Caller
    cache_salt: str
    """Names the prefix cache of the request."""
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class ServerContext:
    """One server."""

    engine: "AsyncEngine"
    served_names: tuple[str, ...]
    """Names shown by /v1/models; the first stands for a request that names none."""
    accepted_names: frozenset[str]
    """Names that requests may use: the served ones and the model's own."""
    gate: Gate
    show_cached_tokens: bool
    """Whether usage tells how much of a prompt the cache supplied (others' prompts may be guessed from it)."""
    limits: Limits
    bodies: Bodies
    weights: Mapping[str, int]
    """Caller -> share of the engine; 1 for those who are not named."""
    needs_key: bool = False
    """Whether callers need a key."""
    has_admin_key: bool = False
    """Whether operators have one of their own."""
    shares_prefix_cache: bool = False
    """Whether requests with different API keys may find each other's prefixes."""
    started_s: int = field(default_factory=lambda: int(time.time()))

    def resolve_name(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
            ModelNotFoundError: it is not served here.
        """
        if name is None:
            return self.served_names[0]
        if name not in self.accepted_names:
            served = ", ".join(self.served_names)
            raise ModelNotFoundError(f"the model {name[:256]!r} is not served here; served: {served}", param="model")
        return name

    def request_context(self, request: Request, salt: str, timeout_s: float | None) -> RequestContext:
        """Who asks, before any work is done for them. Of `timeout_s` and the header's, the shorter holds.

        Raises:
            OverloadedError: there is no place in the queue.
            InvalidRequestError: the header is no number of seconds.
        """
        caller = self.caller(request.scope)
        self.engine.check_room(caller)
        timeout_s = min(filter(None, (timeout_s, _timeout(request.headers.get(TIMEOUT_HEADER)))), default=None)
        return RequestContext(caller, cache_namespace("" if self.shares_prefix_cache else caller.name, salt), timeout_s)

    def caller(self, scope: Scope) -> Caller:
        """Who sent a request, with their weight."""
        name = caller_of(scope)
        return Caller(name, self.weights.get(name, 1))

    @property
    def is_ready(self) -> bool:
        """True while new requests are taken."""
        return self.gate.is_open and self.engine.is_ready


class QueueGuard:
    """Refuses, before a body is read or a route is found, what the queue has no place for: under a flood, refusals
    are most of the work."""

    def __init__(self, app: ASGIApp, *, context: ServerContext, paths: frozenset[str]) -> None:
        self._app = app
        self._context = context
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look, then pass on."""
        if scope["type"] == "http" and scope["path"] in self._paths and scope["method"] == "POST":
            try:
                self._context.engine.check_room(self._context.caller(scope))
            except OverloadedError as error:
                await as_api_error(error).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def new_id(prefix: str, asked: str | None = None) -> str:
    """The id that a client asked for, or one that nobody can guess."""
    return f"{prefix}-{asked or secrets.token_hex(16)}"
