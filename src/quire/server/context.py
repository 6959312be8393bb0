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
from quire.errors import ModelNotFoundError, OverloadedError
from quire.server import limits
from quire.server.body import Bodies
from quire.server.errors import as_api_error
from quire.server.keys import cache_namespace, caller_of
from quire.server.limits import Limits

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine


class Gate:
    """Counts the requests inside and refuses past a bound, or when the server is stopping."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.num_inside = 0
        self.is_open = True

    def close(self) -> None:
        """Let nobody in any more; those inside go on."""
        self.is_open = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hold a place for as long as the request is worked on.

        Raises:
            OverloadedError: closed or full.
        """
        if not self.is_open:
            raise OverloadedError("the server is stopping", retry_after_s=limits.RETRY_AFTER_SECONDS)
        if self.num_inside >= self._most:
            raise OverloadedError(
                f"the server works on {self._most} requests already", retry_after_s=limits.RETRY_AFTER_SECONDS
            )
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1


class Asker(NamedTuple):
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

    def asker(self, request: Request, salt: str, timeout_s: float | None) -> Asker:
        """Who asks, before any work is done for them.

        Raises:
            OverloadedError: there is no place in the queue.
        """
        caller = self.caller(request.scope)
        self.engine.check_room(caller)
        return Asker(caller, cache_namespace("" if self.shares_prefix_cache else caller.name, salt), timeout_s)

    def caller(self, scope: Scope) -> Caller:
        """Who sent a request, with their weight."""
        name = caller_of(scope)
        return Caller(name, self.weights.get(name, 1))

    @property
    def is_ready(self) -> bool:
        """True while new requests are taken."""
        return self.gate.is_open and self.engine.is_ready


class Doorkeeper:
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


def new_id(prefix: str) -> str:
    """An id that no client can choose or guess."""
    return f"{prefix}-{secrets.token_hex(16)}"
