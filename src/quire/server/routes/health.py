"""Probes, metrics and the version.

/livez    200 unless the engine is dead for good: restart this process
/readyz   200 while new requests are computed at once; 503 when stopping or dead, and while a core is being replaced
/health   the same as /readyz, under vLLM's name
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import quire
from quire.server.context import ServerContext
from quire.server.metrics import CONTENT_TYPE, render_metrics

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
"""The only routes that need no key."""


async def is_alive(request: Request) -> Response:
    """For the supervisor."""
    context: ServerContext = request.app.state.context
    return _answer(context.engine.is_healthy, "alive", "the engine has stopped")


async def is_ready(request: Request) -> Response:
    """For the load balancer."""
    context: ServerContext = request.app.state.context
    return _answer(context.is_ready, "ready", "not ready")


def _answer(good: bool, yes: str, no: str) -> Response:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)


async def metrics(request: Request) -> Response:
    """Prometheus text."""
    context: ServerContext = request.app.state.context
    found = context.engine.get_metrics()
    return Response(
        render_metrics(found, context.served_names[0], request.app.state.metrics_prefix), media_type=CONTENT_TYPE
    )


async def version(request: Request) -> Response:
    """The version of Quire."""
    return JSONResponse({"version": quire.__version__})


ROUTES = [
    Route("/livez", is_alive),
    Route("/readyz", is_ready),
    Route("/health", is_ready),
    Route("/metrics", metrics),
    Route("/version", version),
]
