"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from quire.server.context import ServerContext

router = APIRouter()


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.started_s,
        "owned_by": "quire",
        "max_model_len": context.engine.max_model_len,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """What is served."""
    context: ServerContext = request.app.state.context
    return JSONResponse({"object": "list", "data": [_card(context, name) for name in context.served_names]})


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    """One model."""
    context: ServerContext = request.app.state.context
    return JSONResponse(_card(context, context.resolve_name(name)))
