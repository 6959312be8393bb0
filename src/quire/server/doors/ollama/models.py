"""What Ollama's API tells of the models that are served, and what it does nothing about."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import quire
from quire.engine.channel import UNKNOWN_MODEL, ModelDescription
from quire.server.answers.capabilities import capabilities_of
from quire.server.doors.ollama.bodies import SHOW
from quire.server.doors.ollama.respond import serving
from quire.server.http.context import ServerContext
from quire.server.http.errors import ApiError

Body = dict[str, Any]
FOR_EVER = "9999-12-31T23:59:59Z"
"""A model stays for as long as the server runs."""
LEVELS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Ollama's words for how weights are kept, where they are not ours in capitals."""
REFUSED = {
    "/api/create": "models are made by `quire build`, not by a server",
    "/api/push": "models are not sent anywhere",
    "/api/embed": "this version makes no vectors",
    "/api/embeddings": "this version makes no vectors",
    "/api/blobs/{digest}": "models are made by `quire build`, not by a server",
}
"""Routes that are known and not honoured."""


async def list_models(request: Request) -> Response:
    """The models that are there, under each of their names."""
    context: ServerContext = request.app.state.context
    return JSONResponse({"models": [_card(part, name) for name, part in _shown(context)]})


async def list_running(request: Request) -> Response:
    """The same: what is served is loaded."""
    context: ServerContext = request.app.state.context
    found = [
        {**_card(part, name), "expires_at": FOR_EVER, "size_vram": 0, "context_length": part.engine.max_model_len}
        for name, part in _shown(context)
    ]
    return JSONResponse({"models": found})


async def version(request: Request) -> Response:
    """Quire's."""
    return JSONResponse({"version": quire.__version__})


async def show(request: Request) -> Response:
    """One model."""
    context: ServerContext = request.app.state.context
    body = await context.bodies.read(request, lambda raw: SHOW.read(raw, context.limits))
    name, context = body.model, serving(context, body.model, request.scope)
    engine = context.engine
    template, card, described = engine.get_tokenizer().tools_template or "", _card(context, name), _described(context)
    family = described.family or "quire"
    stated = "\n".join(f"{name} {value}" for name, value in engine.stated_sampling.items())
    content = {
        "modelfile": f"FROM {name}\n",
        "parameters": stated,
        "template": template,
        "license": "",
        "details": card["details"],
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": described.num_parameters,
            f"{family}.context_length": engine.max_model_len,
        },
        "capabilities": capabilities_of(engine),
        "modified_at": card["modified_at"],
    }
    return JSONResponse(content)


async def refuse(request: Request) -> Response:
    """A route that is known and not honoured.

    Raises:
        ApiError: always.
    """
    path = request.scope["path"]
    reason = REFUSED[path if path in REFUSED else "/api/blobs/{digest}"]
    raise ApiError(400, f"{path[:64]} is not supported: {reason}", code="unsupported_route")


def _shown(context: ServerContext) -> list[tuple[str, ServerContext]]:
    """With names that were copied."""
    found = context.shown()
    copied = [(name, part) for name, of in context.local.aliases.items() for known, part in found if known == of]
    return [*found, *copied]


def _card(context: ServerContext, name: str) -> Body:
    files, described = context.engine.model_files, _described(context)
    modified = datetime.fromtimestamp(context.started_s if files is None else files.modified_s, UTC)
    details = {
        "parent_model": "",
        "format": "" if files is None else files.format,
        "family": described.family,
        "families": [described.family] if described.family else [],
        "parameter_size": in_short(described.num_parameters),
        "quantization_level": LEVELS.get(described.weight_format, described.weight_format.upper()),
    }
    return {
        "name": name,
        "model": name,
        "modified_at": modified.isoformat().replace("+00:00", "Z"),
        "size": 0 if files is None else files.num_bytes,
        "digest": "" if files is None else files.fingerprint,
        "details": details,
    }


def _described(context: ServerContext) -> ModelDescription:
    files = context.engine.model_files
    return UNKNOWN_MODEL if files is None else files.model


def in_short(number: int) -> str:
    """A number of parameters as Ollama writes it: `134.52M`, `1.2B`; empty for none."""
    for size, unit, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 2)):
        if number >= size:
            return f"{number / size:.{digits}f}{unit}"
    return str(number or "")
