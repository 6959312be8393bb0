"""GET /v1/models, /v1/models/{id} and /openapi.json: what is served, and how to ask for it."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quire.server.context import ServerContext
from quire.server.openapi import document


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.started_s,
        "owned_by": "quire",
        "max_model_len": context.engine.max_model_len,
    }


async def list_models(request: Request) -> Response:
    """What is served."""
    context: ServerContext = request.app.state.context
    return JSONResponse({"object": "list", "data": [_card(context, name) for name in context.served_names]})


async def retrieve_model(request: Request) -> Response:
    """One model."""
    context: ServerContext = request.app.state.context
    return JSONResponse(_card(context, context.resolve_name(request.path_params["name"])))


async def describe(request: Request) -> Response:
    """The API's description in OpenAPI."""
    context: ServerContext = request.app.state.context
    return JSONResponse(document(context.limits, needs_key=context.needs_key))


ROUTES = [
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", retrieve_model),
    Route("/openapi.json", describe),
]
