"""The server's own routes: probes, metrics, the version, its description, and what operators see.

/livez    200 unless the engine is dead for good: restart this process
/readyz   200 while new requests are computed at once; 503 when stopping or dead, and while a core is being replaced
/health   the same as /readyz, under vLLM's name

Several models are ready once none is being loaded, while one of them is ready: else one that failed, or whose core is
being replaced, would take those that serve from their callers. They are alive while one answers or will. The body has
the state of each; `?model=NAME` asks for one of them.

/v1/requests/{id}/explain is apart from the routes of callers: it answers to the admin key alone, and where there is
none, to requests from this machine's own loopback, provided that callers need no key either. /metrics counts what all
callers do: where they need keys it answers to the admin key alone, or to everyone (`--metrics-open`).
"""

import dataclasses
import ipaddress

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import quire
from quire.errors import ModelNotFoundError
from quire.server.http.context import ServerContext
from quire.server.http.errors import ApiError
from quire.server.http.keys import is_admin
from quire.server.http.metrics import CONTENT_TYPE, metrics_of, render_metrics, state_metrics, stored_metrics
from quire.server.http.models import GONE
from quire.server.http.openapi import document
from quire.server.http.root import index

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
"""The only routes that need no key, but for /metrics with `--metrics-open`."""


async def is_alive(request: Request) -> Response:
    """For the supervisor."""
    context = _asked(request)
    alive = context.models.is_healthy if context.model is None else context.model.state not in GONE
    return _answer(context, alive, "alive", "nothing can be served")


async def is_ready(request: Request) -> Response:
    """For the load balancer."""
    context = _asked(request)
    return _answer(context, context.is_ready, "ready", "not ready")


def _asked(request: Request) -> ServerContext:
    """The whole, or the part of the model that is asked for. These routes need no key: with keys, they name none."""
    context: ServerContext = request.app.state.context
    name = request.query_params.get("model")
    if name is None:
        return context
    if name not in context.accepted_names and context.needs_key:
        raise ModelNotFoundError("this model is not served here", param="model")
    return context.parts.get(context.resolve_name(name), context)


def _answer(context: ServerContext, good: bool, yes: str, no: str) -> Response:
    states = {model.name: model.state for model in context.models}
    named = {"models": states} if context.model is None and not context.needs_key else {}
    return JSONResponse({"status": yes if good else no, **named}, 200 if good else 503)


async def metrics(request: Request) -> Response:
    """Prometheus text."""
    context: ServerContext = request.app.state.context
    if context.needs_key and not context.opens_metrics and not is_admin(request):
        text = "/metrics answers to the admin key alone (--admin-api-key), or to everyone with --metrics-open"
        raise ApiError(403, text, code="admin_only")
    prefix = request.app.state.metrics_prefix
    own = next((api.metrics[prefix] for api in context.apis if prefix in api.metrics), None)
    shown = metrics_of(context.models, own)
    if own is None:
        stored = None if context.store is None else context.store.num_bytes
        shown += state_metrics(context.models) + context.counts.metrics() + stored_metrics(context.jobs.kinds(), stored)
    name = "" if context.model is None else context.served_names[0]
    content = render_metrics(shown, name, prefix if own is None else "")
    return Response(content, media_type=CONTENT_TYPE)


async def version(request: Request) -> Response:
    """The version of Quire."""
    return JSONResponse({"version": quire.__version__})


async def describe(request: Request) -> Response:
    """The server's description in OpenAPI."""
    context: ServerContext = request.app.state.context
    return JSONResponse(document(context.apis, context.limits, needs_key=context.needs_key))


def require_admin(request: Request) -> None:
    """Refuse every request but an operator's.

    Raises:
        ApiError: 403.
    """
    context: ServerContext = request.app.state.context
    if is_admin(request):
        return
    if context.has_admin_key:
        raise ApiError(403, "this route needs the admin key (--admin-api-key)", code="admin_only")
    host = request.client.host if request.client is not None else ""
    if context.weights or not _is_loopback(host):
        text = "this route answers to the admin key alone: start the server with --admin-api-key"
        raise ApiError(403, text, code="admin_only")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def explain_request(request: Request) -> Response:
    """Where the time of a request went, and why: one entry for each prompt of it."""
    require_admin(request)
    context: ServerContext = request.app.state.context
    request_id = request.path_params["request_id"][:128]
    data = [
        {**dataclasses.asdict(item), **({} if context.model is model else {"model": model.name})}
        for model in context.models
        if model.engine is not None
        for item in model.engine.explain(request_id)
    ]
    if not data:
        raise ApiError(404, f"no request {request_id!r} is remembered", code="request_not_found")
    content = {"object": "list", "data": data}
    return Response(msgspec.json.encode(content), media_type="application/json")


ROUTES = [
    Route("/", index),
    Route("/livez", is_alive),
    Route("/readyz", is_ready),
    Route("/health", is_ready),
    Route("/metrics", metrics),
    Route("/version", version),
    Route("/openapi.json", describe),
    Route("/v1/requests/{request_id}/explain", explain_request),
]
