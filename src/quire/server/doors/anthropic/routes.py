"""Anthropic's Messages API: the routes, the shape of errors, the framing of streams.

A request names its version in the header `anthropic-version`; with it, /v1/models answers in this API's shape. What a
beta (`anthropic-beta`) adds is a field or a route, and is refused as such where it is not known.
"""

import secrets
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quire.errors import InvalidRequestError
from quire.server.doors.anthropic.describe import describe
from quire.server.doors.anthropic.models import list_models, retrieve_model
from quire.server.doors.anthropic.parse import in_own_names, parse_count, parse_messages
from quire.server.doors.anthropic.respond import MessageAnswer
from quire.server.http.context import Api, MarkedRoute, ServerContext, new_id
from quire.server.http.errors import ApiError
from quire.server.http.streams import Framing, deliver, naming_unfit

VERSIONS = ("2023-06-01", "2026-10-21")
MARKER = "anthropic-version"
UNTHREADED = {"error_code": "thread_unsupported_request", "unsupported": []}
"""Clients that read it send the whole conversation from then on."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By status; others are the request's fault below 500, and ours from there on."""


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message"}, "request_id"}`, with the id in the header `request-id` too."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    name = error.headers.setdefault("request-id", f"req_{secrets.token_hex(12)}")
    found: dict[str, Any] = {"type": kind, "message": error.message}
    if error.param == "thread":
        found["details"] = UNTHREADED
    return {"type": "error", "error": found, "request_id": name}


def frame(content: bytes) -> bytes:
    """One server-sent event, named by its type, which stands first in it."""
    return b"event: " + content.split(b'"', 4)[3] + b"\ndata: " + content + b"\n\n"


FRAMING = Framing("text/event-stream", frame, b"", error_body)


async def create_message(request: Request) -> Response:
    """Go on with a conversation."""
    check_version(request)
    context: ServerContext = request.app.state.context
    parse = parse_messages
    call = await context.bodies.read(request, lambda body: parse(body, context.defaults_of(body), context.limits))
    context = context.of_model(call.model, request.scope)
    requested = context.request_context(request, "", None)
    with naming_unfit("output_config.format" if call.chat.params.structured_outputs else "tools"), in_own_names():
        return await deliver(request, MessageAnswer(context, call, requested), FRAMING if call.stream else None)


async def count_tokens(request: Request) -> Response:
    """The tokens of a conversation under the model's template."""
    check_version(request)
    context: ServerContext = request.app.state.context
    parse = parse_count
    name, chat = await context.bodies.read(request, lambda body: parse(body, context.defaults_of(body), context.limits))
    context = context.of_model(name, request.scope)
    with in_own_names(), context.gate.inside(new_id("count")):
        token_ids = await chat.encode(context, context.caller(request.scope))
    return JSONResponse({"input_tokens": len(token_ids)}, headers={"request-id": f"req_{secrets.token_hex(12)}"})


async def refuse_files(request: Request) -> Response:
    """A route that is known and not honoured; without the header of this API it is OpenAI's.

    Raises:
        ApiError: always.
    """
    text = "files are not supported by this API here: write texts into messages, as blocks of type text"
    raise ApiError(400, text, code="unsupported_route")


def check_version(request: Request) -> None:
    """Refuse a version that is not known; none at all is taken for the newest.

    Raises:
        InvalidRequestError: naming the header.
    """
    version = request.headers.get(MARKER, VERSIONS[-1])
    if version not in VERSIONS:
        text = f"{MARKER} must be {' or '.join(VERSIONS)}, got {version[:32]!r}"
        raise InvalidRequestError(text, param=MARKER)


ANTHROPIC = Api(
    prefix="/v1/messages",
    routes=(
        Route("/v1/messages", create_message, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
        MarkedRoute("/v1/models", list_models, marker=MARKER),
        MarkedRoute("/v1/models/{name:path}", retrieve_model, marker=MARKER),
        MarkedRoute("/v1/files", refuse_files, methods=["GET", "POST"], marker=MARKER),
        MarkedRoute("/v1/files/{name:path}", refuse_files, methods=["GET", "DELETE"], marker=MARKER),
    ),
    queued_paths=frozenset({"/v1/messages"}),
    error_body=error_body,
    describe=describe,
    name="anthropic",
    marker=MARKER,
)
