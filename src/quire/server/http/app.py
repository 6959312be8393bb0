"""The server's application: APIs, errors and the key, put together around an engine, or one for each model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from quire.engine.observer import Observer
from quire.errors import ConfigurationError
from quire.server.http import errors, probes
from quire.server.http.access import Access
from quire.server.http.body import Bodies
from quire.server.http.context import MODEL, Api, Pages, ServerContext
from quire.server.http.cors import EXPOSED, Cors
from quire.server.http.jobs import Jobs
from quire.server.http.keys import KeyRequired, caller_name
from quire.server.http.limits import Limits
from quire.server.http.local_models import LocalModels, LocalState
from quire.server.http.middleware import EarlyRefusal, ForeignPages, QueueGuard, RejectAmbiguousFraming
from quire.server.http.models import ServedModel, ServedModels
from quire.server.http.shares import Shares
from quire.server.http.stored import Store

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine

DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Observability:
    """What operators see of a server."""

    admin_api_key: str | None = None
    """Opens /v1/requests/{id}/explain; without one it answers to this machine alone, and only where callers need no
    key."""
    otlp_traces_endpoint: str | None = None
    """Where spans of requests are sent."""
    log_requests: bool = False
    """A log record for each request."""
    opens_metrics: bool = False
    """/metrics answers to everyone; else, where callers need a key, to the admin key alone."""


NO_OBSERVABILITY = Observability()
NO_PAGES = Cors()
NO_VIEW = Pages()


def create_app(
    engine: "AsyncEngine | ServedModels",
    *,
    apis: Sequence[Api],
    served_model_name: str | Sequence[str] = (),
    model_names: Sequence[str] = (),
    api_key: str | Sequence[str] | Mapping[str, int] = (),
    metrics_prefix: str = "quire",
    show_cached_tokens: bool | None = None,
    share_prefix_cache: bool = False,
    observability: Observability = NO_OBSERVABILITY,
    limits: Limits = DEFAULT_LIMITS,
    cors: Cors = NO_PAGES,
    store: Store | None = None,
    local_models: LocalModels | None = None,
    pages: Pages = NO_VIEW,
) -> Starlette:
    """An ASGI application. The caller keeps the engine and shuts it down.

    Args:
        engine: or several models, with their names: they may still be loading (see `welcome`).
        apis: what it speaks, as `quire.server.doors.all` orders them; errors outside of all are of the first.
        served_model_name: names shown by /v1/models; the first stands for requests that name none.
        model_names: further names that requests may use (the model's directory, its id on the hub).
        api_key: keys, or keys with weights; with one, every route but the probes needs it, as `Authorization:
            Bearer KEY` or `x-api-key: KEY`. Callers with different keys share the engine fairly, by weight (usually 1).
        metrics_prefix: stands before the colon of every metric's name.
        show_cached_tokens: usage tells how many prompt tokens the prefix cache supplied; None: unless callers with
            different keys share it: they could learn from it what others ask.
        observability: what operators see.
        limits: of what is open and answered at one time, of bodies and of the fields in them.
        share_prefix_cache: requests with different keys may find each other's prefixes.
        cors: which pages in a browser may use it.
        store: keeps responses, conversations, files and batches; the server closes it. None: nothing is kept.
        local_models: which an operator may fetch and remove; None: nothing is.
        pages: its own ones.

    Raises: ConfigurationError: no name, or an empty key.
    """
    models = _models(engine, served_model_name, model_names)
    api_keys = _weighted(api_key)
    may_guess = share_prefix_cache and len(api_keys) > 1
    app = _routed(apis, pages, metrics_prefix)
    app.state.context = context = _context(
        models,
        apis,
        limits,
        observability,
        api_keys,
        show_cached_tokens=not may_guess if show_cached_tokens is None else show_cached_tokens,
        shares_prefix_cache=share_prefix_cache,
        store=store,
        local=LocalState(local_models),
    )
    app.state.welcome = partial(_welcome, context, observability)
    _surround(app, list(api_keys), observability, cors, pages)
    for model in models:
        if model.engine is not None:
            app.state.welcome(model, model.engine)
    return app


def _context(
    models: ServedModels,
    apis: Sequence[Api],
    limits: Limits,
    observability: Observability,
    api_keys: Mapping[str, int],
    **settings: Any,
) -> ServerContext:
    stand_ins = frozenset[str]().union(*(api.stand_ins for api in apis))
    context = ServerContext(
        models=models,
        model=models.only,
        apis=tuple(apis),
        served_names=tuple(name for model in models for name in model.names),
        accepted_names=stand_ins.union(*(model.accepted for model in models)),
        places=Shares(limits.requests.value),
        limits=limits,
        bodies=Bodies(limits, models),
        needs_key=bool(api_keys),
        has_admin_key=observability.admin_api_key is not None,
        opens_metrics=observability.opens_metrics,
        weights={caller_name(key): weight for key, weight in api_keys.items()},
        jobs=Jobs(limits.batch_lines_at_once.value),
        **settings,
    )
    return context.with_parts(stand_ins)


def _models(engine: "AsyncEngine | ServedModels", served: str | Sequence[str], others: Sequence[str]) -> ServedModels:
    if isinstance(engine, ServedModels):
        return engine
    names = (served,) if isinstance(served, str) else tuple(served)
    return ServedModels([ServedModel(names, frozenset((*names, *others)), engine)])


def _welcome(context: ServerContext, observability: Observability, model: ServedModel, engine: "AsyncEngine") -> None:
    """Let requests choose a model whose engine has come."""
    engine.expect_callers(context.weights)
    if observability.otlp_traces_endpoint is not None:
        engine.observer.trace_to(observability.otlp_traces_endpoint, model.name)
    model.engine = engine


def _routed(apis: Sequence[Api], pages: Pages, metrics_prefix: str) -> Starlette:
    """An application with all routes. Of two for one path the last has it."""
    doors = (route for api in reversed(apis) for route in api.routes)
    app = Starlette(routes=[*doors, *probes.ROUTES, *pages.routes])
    app.router.redirect_slashes = False
    app.state.viewers, app.state.metrics_prefix = set(), metrics_prefix
    return app


def _weighted(api_key: str | Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    if isinstance(api_key, str):
        api_key = [api_key]
    if not all(key.strip() for key in api_key):
        raise ConfigurationError("api_key must not be empty", field="api_key")
    return dict(api_key) if isinstance(api_key, Mapping) else dict.fromkeys(api_key, 1)


def _surround(
    app: Starlette,
    api_keys: Sequence[str],
    observability: Observability,
    cors: Cors,
    pages: Pages,
) -> None:
    """Errors, the queue and keys, and around them what takes notes of every request."""
    admin_key = observability.admin_api_key
    if admin_key is not None and (not admin_key.strip() or admin_key in api_keys):
        raise ConfigurationError("admin_api_key must not be empty, nor a caller's key", field="admin_api_key")
    open_paths = probes.OPEN_PATHS | pages.open_paths
    if observability.opens_metrics:
        open_paths |= {"/metrics"}
    errors.install(app)
    app.add_middleware(QueueGuard, context=app.state.context, open_paths=open_paths)
    keys = None
    if api_keys or admin_key is not None:
        keys = KeyRequired(app, api_keys=api_keys, open_paths=open_paths, admin_key=admin_key)
        app.add_middleware(KeyRequired, api_keys=api_keys, open_paths=open_paths, admin_key=admin_key)
    app.add_middleware(ForeignPages, origins=cors.origins, hosts=cors.hosts)
    if cors.origins:  # around the keys: a preflight carries none, and a page may read why its request was refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            allow_methods=cors.methods,
            allow_headers=cors.headers,
            allow_credentials=cors.credentials,
            expose_headers=EXPOSED,
        )
    app.add_middleware(RejectAmbiguousFraming)
    context: ServerContext = app.state.context

    def count(scope: Scope, status: int | None) -> None:
        context.counts.count(
            context.door_of(scope["path"], scope["headers"]), status, None if context.model else scope.get(MODEL)
        )

    def model_of(scope: Scope) -> tuple[str, Observer | None]:
        model = scope.get(MODEL, context.model)
        if model is None or model.engine is None:
            return "", None
        return "" if context.model is model else model.name, model.engine.observer

    app.add_middleware(Access, model_of=model_of, logs=observability.log_requests, count=count)
    app.state.early_refusal = EarlyRefusal(
        app.state.context, keys, logs=observability.log_requests, leaves_pages=bool(cors.origins)
    )
