"""What every route works with: the models and their names, the APIs, and the gate that requests come through."""

import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Scope

from quire.engine.queue import Caller
from quire.errors import InvalidRequestError, ModelNotFoundError, OverloadedError
from quire.outputs import Metric
from quire.sampling_params import SamplingParams
from quire.server.http import limits
from quire.server.http.body import Bodies
from quire.server.http.errors import ApiError
from quire.server.http.jobs import Jobs
from quire.server.http.keys import cache_namespace, caller_of
from quire.server.http.limits import Limits
from quire.server.http.local_models import LocalState
from quire.server.http.metrics import RequestCounts
from quire.server.http.models import ServedModel, ServedModels
from quire.server.http.shares import Shares, network_of
from quire.server.http.stored import Store

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine

logger = logging.getLogger("quire.server")


@dataclass(frozen=True, slots=True)
class Api:
    """One HTTP API over the engine."""

    prefix: str
    """Of its paths. Where those of several APIs fit, the longest decides whose shape an error has."""
    routes: tuple[Route, ...]
    queued_paths: frozenset[str]
    """Routes whose requests wait in the queue: a POST there is refused at once while the queue is full."""
    error_body: Callable[[ApiError], object]
    """An error in the API's shape."""
    describe: Callable[[Limits], tuple[dict[str, Any], dict[str, dict[str, Any]]]]
    """Its paths in OpenAPI, and the schemas they name."""
    begin: "Callable[[ServerContext], Coroutine[Any, Any, None]] | None" = None
    """Its work beside requests, such as what was left undone when the server last stopped; it runs once the server
    listens."""
    marker: str = ""
    """A header that its requests bear, in small letters: with it, an error has its shape on paths of others too."""
    name: str = ""
    """In metrics."""
    paths: frozenset[str] = frozenset()
    """Further paths whose errors have its shape."""
    status_of: Callable[[ApiError], int] = attrgetter("status")
    """The status that it gives an error."""
    metrics: Mapping[str, Callable[[Sequence[Metric]], Sequence[Metric]]] = field(default_factory=dict)
    """By a value of `--metrics-prefix`: the engine's metrics under its own names."""
    stand_ins: frozenset[str] = frozenset()
    """Names that its clients send where they name no model: they stand for the first one."""


class MarkedRoute(Route):
    """A route on a path that another API has too, for requests with a header of this one's.

    Args:
        marker: the header's name, in small letters.
    """

    def __init__(self, *route: Any, marker: str, methods: Sequence[str] = ("GET",)) -> None:
        super().__init__(*route, methods=list(methods))
        self._marker = marker.encode()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Nothing without the header."""
        is_marked = any(name == self._marker for name, _ in scope.get("headers", ()))
        return super().matches(scope) if is_marked else (Match.NONE, {})


@dataclass(frozen=True, slots=True)
class Pages:
    """Files for a browser, and the routes that they read from."""

    routes: tuple[Route, ...] = ()
    open_paths: frozenset[str] = frozenset()
    """Of files that hold nothing: they need no key."""


MODEL = "quire.model"
"""The entry of an ASGI scope that holds the model that a request chose."""


class Gate:
    """Knows the requests inside by name, and refuses when the server is stopping."""

    def __init__(self) -> None:
        self._inside: set[str] = set()
        self.is_open = True

    def close(self) -> None:
        """Let no request in any more; those inside go on."""
        self.is_open = False

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Know of the request of this name for as long as it is worked on.

        Raises:
            OverloadedError: closed.
            InvalidRequestError: a request of this name is inside.
        """
        if not self.is_open:
            raise OverloadedError("the server is stopping", retry_after_s=limits.RETRY_AFTER_SECONDS)
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
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= limits.MAX_TIMEOUT_SECONDS:
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} must be in (0, {limits.MAX_TIMEOUT_SECONDS}] seconds", param=TIMEOUT_HEADER
        )
    return seconds


class RequestContext(NamedTuple):
    """The caller, and how long they wait."""

    caller: Caller
    cache_salt: str
    """Names the prefix cache of the request."""
    timeout_s: float | None
    is_background: bool = False
    """Everything else is computed first."""


@dataclass(frozen=True, slots=True)
class ServerContext:
    """One server; or, of one with several models, the part that serves one of them (`of_model`)."""

    models: ServedModels
    model: ServedModel | None
    """The one that is worked with; None: a request has still to choose."""
    served_names: tuple[str, ...]
    """Names shown by /v1/models; the first stands for a request that names none."""
    accepted_names: frozenset[str]
    """Names that requests may use: the served ones and the models' own."""
    places: Shares
    """Requests that are read or answered."""
    show_cached_tokens: bool
    """Whether usage tells how much of a prompt the cache supplied (others' prompts may be guessed from it)."""
    limits: Limits
    bodies: Bodies
    weights: Mapping[str, int]
    """Caller -> share of the engine; 1 for those that are not named."""
    apis: tuple[Api, ...]
    needs_key: bool = False
    """Whether callers need a key."""
    has_admin_key: bool = False
    """Whether operators have one of their own."""
    opens_metrics: bool = False
    """Whether /metrics answers to everyone."""
    shares_prefix_cache: bool = False
    """Whether requests with different API keys may find each other's prefixes."""
    store: Store | None = None
    """Keeps things between requests; None: nothing is kept."""
    local: LocalState = field(default_factory=LocalState)
    jobs: Jobs = field(default_factory=Jobs)
    gate: Gate = field(default_factory=Gate)
    started_s: int = field(default_factory=lambda: int(time.time()))
    counts: RequestCounts = field(default_factory=RequestCounts)
    logged: set[str] = field(default_factory=set)
    """Deprecated fields that the log has named."""
    parts: Mapping[str, "ServerContext"] = field(default_factory=dict)
    """Of a server of several models: any of their names -> the part that serves it."""

    @property
    def engine(self) -> "AsyncEngine":
        """Of the model that is worked with. Raises as `require_engine` does."""
        return self.require_engine()

    def require_engine(self) -> "AsyncEngine":
        """The engine of the model that is worked with.

        Raises:
            OverloadedError, ApiError: see `ServedModel.require_engine`.
        """
        assert self.model is not None, "a request has chosen its model"
        return self.model.require_engine()

    def of_model(self, name: str | None, scope: Scope | None = None) -> "ServerContext":
        """What serves a request that names this model. The one constructor of requests is given this.

        Args:
            scope: of the request; its model is noted there, for metrics and logs.

        Raises:
            ModelNotFoundError: it is not served here; the text lists what is.
            OverloadedError: it is being loaded.
            ApiError: 503 `model_failed`, it could not be loaded.
        """
        found = self
        if self.parts:
            found = self.parts[self.resolve_name(name)]
            found.require_engine()
        elif name is not None:
            self.resolve_name(name)
        if scope is not None:
            scope[MODEL] = found.model
        return found

    def defaults_of(self, body: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters of the model that a body names, which is not checked yet.

        Raises:
            ModelNotFoundError, OverloadedError, ApiError: see `of_model`.
        """
        found = self
        if self.parts:
            name = body.get("model")
            found = self.of_model(name if isinstance(name, str) else None)
        return found.engine.get_default_sampling_params()

    def shown(self) -> list[tuple[str, "ServerContext"]]:
        """Each name that is shown, and what serves it: of the models that are there."""
        found = [(name, self.parts.get(name, self)) for name in self.served_names]
        return [(name, part) for name, part in found if part.model is not None and part.model.engine is not None]

    def with_parts(self, stand_ins: frozenset[str]) -> "ServerContext":
        """Another one like this, with a part for each of several models. `stand_ins` are further names of the first."""
        parts: dict[str, ServerContext] = {}
        for number, model in enumerate(self.models if len(self.models) > 1 else ()):
            names = model.accepted | (frozenset() if number else stand_ins)
            part = replace(self, model=model, served_names=model.names, accepted_names=names)
            parts.update(dict.fromkeys(names, part))
        return replace(self, parts=parts)

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

    def log_deprecated(self, names: Sequence[str], note: Callable[[Sequence[str]], str]) -> None:
        """Say once of each deprecated field what to send instead."""
        fresh = [name for name in names if name not in self.logged]
        if fresh:
            self.logged.update(fresh)
            logger.warning("%s", note(fresh))

    def request_context(self, request: Request, salt: str, timeout_s: float | None) -> RequestContext:
        """The caller of a request. Of `timeout_s` and the header's, the shorter holds.

        Raises:
            InvalidRequestError: the header is no number of seconds.
        """
        caller = self.caller(request.scope)
        if len(self.models) > 1:
            self.engine.check_room(caller)  # the whole server was asked before: this model's queue may be full
        timeout_s = min(filter(None, (timeout_s, _timeout(request.headers.get(TIMEOUT_HEADER)))), default=None)
        return RequestContext(caller, cache_namespace("" if self.shares_prefix_cache else caller.name, salt), timeout_s)

    def caller(self, scope: Scope) -> Caller:
        """The caller of a request, with its weight."""
        name = caller_of(scope)
        return Caller(name, self.weights.get(name, 1), network_of(scope.get("client")))

    def error_body(self, path: str, error: ApiError, headers: Sequence[tuple[bytes, bytes]] = ()) -> object:
        """An error in the shape of the API that a request belongs to, whose status it takes."""
        api = self.api_of(path, headers)
        error.status = api.status_of(error)
        return api.error_body(error)

    def door_of(self, path: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> str:
        """The name of the API that a request was of; `server` for what is no route of one."""
        api = self.api_of(path, headers)
        return api.name if any(route.path_regex.match(path) for route in api.routes) else "server"

    def api_of(self, path: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> Api:
        """The API whose marker is among the headers, or that a path belongs to; the first one has what belongs to
        none."""
        names = {name for name, _ in headers}
        marked = [api for api in self.apis if api.marker.encode() in names]
        named = marked or [api for api in self.apis if path in api.paths]
        fitting = named or [api for api in self.apis if path.startswith(api.prefix)]
        return max(fitting or self.apis[:1], key=lambda api: len(api.prefix))

    @property
    def queued_paths(self) -> frozenset[str]:
        """Routes whose requests wait in the queue."""
        return frozenset().union(*(api.queued_paths for api in self.apis))

    @property
    def is_ready(self) -> bool:
        """True while new requests are taken."""
        if self.model is not None:
            return self.gate.is_open and self.model.state == "ready"
        return self.gate.is_open and self.models.is_ready


def new_id(prefix: str, asked: str | None = None) -> str:
    """The id that a client gave its request, or one that cannot be guessed."""
    return f"{prefix}-{asked or secrets.token_hex(16)}"
