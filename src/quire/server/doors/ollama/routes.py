"""Ollama's API: the routes, the shape of errors, the framing of streams."""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quire.sampling_params import SamplingParams
from quire.server.doors.ollama import local_models, models
from quire.server.doors.ollama.describe import describe
from quire.server.doors.ollama.parse import Call, in_own_names, parse_chat, parse_generate
from quire.server.doors.ollama.respond import OllamaAnswer, OllamaChatAnswer, defaults_of, nothing_asked, serving
from quire.server.http.context import Api, ServerContext
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from quire.server.http.streams import Framing, deliver, naming_param, naming_unfit

Parse = Callable[[dict[str, Any], SamplingParams, Limits], Call]


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"error"}`."""
    return {"error": error.message}


FRAMING = Framing("application/x-ndjson", lambda content: content + b"\n", b"", error_body)


async def chat(request: Request) -> Response:
    """Go on with a conversation."""
    with naming_param("prompt", "messages"):
        return await _create(request, parse_chat, OllamaChatAnswer)


async def generate(request: Request) -> Response:
    """Answer a prompt."""
    return await _create(request, parse_generate, OllamaAnswer)


async def _create(request: Request, parse: Parse, answer: type[OllamaAnswer]) -> Response:
    context: ServerContext = request.app.state.context
    call = await context.bodies.read(request, lambda body: parse(body, defaults_of(context, body), context.limits))
    context = serving(context, call.model, request.scope)
    if call.chat is None and call.raw is None:
        return JSONResponse(nothing_asked(context, call, is_chat=answer.is_chat))
    requested = context.request_context(request, "", None)
    with naming_unfit("format" if call.params.structured_outputs else "tools"), in_own_names():
        return await deliver(request, answer(context, call, requested), FRAMING if call.stream else None)


async def pull(request: Request) -> Response:
    """Fetch a model to this machine."""
    return await local_models.pull(request, FRAMING)


_METHODS = {"/api/blobs/{digest}": ["POST", "HEAD"]}

OLLAMA = Api(
    prefix="/api/",
    routes=(
        Route("/api/chat", chat, methods=["POST"]),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/tags", models.list_models),
        Route("/api/ps", models.list_running),
        Route("/api/version", models.version),
        Route("/api/show", models.show, methods=["POST"]),
        Route("/api/pull", pull, methods=["POST"]),
        Route("/api/delete", local_models.delete, methods=["DELETE"]),
        Route("/api/copy", local_models.copy, methods=["POST"]),
        *(Route(path, models.refuse, methods=_METHODS.get(path, ["POST"])) for path in models.REFUSED),
    ),
    queued_paths=frozenset({"/api/chat", "/api/generate"}),
    error_body=error_body,
    describe=describe,
    name="ollama",
)
