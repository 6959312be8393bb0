"""Every exception as a status, a text, the field at fault and a code; each API gives them its own shape.

400                          the caller's fault, with the field in `param`
401 403 404 405 408 413 415  the caller's fault too, told apart by `code` (408: the request's own `timeout` passed)
500                          the engine's fault
429                          this key has too many requests waiting: with Retry-After
507                          the store has no room
503                          overloaded, stopping: with Retry-After
"""

import logging
import math
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import PurePath

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    NoTokenLeftError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
    ShapeError,
    TooManyRequestsError,
)

logger = logging.getLogger("quire.server")

MAX_TEXT = 1000
FRAMES = 6
"""Calls shown of an unexpected error."""
_KINDS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (DeadlineExceededError, 408, "deadline_exceeded", "timeout"),
    (NoTokenLeftError, 400, "no_token_left", None),
    (ShapeError, 400, "invalid_shape", "structured_outputs"),
    (RequestFailedError, 500, "request_failed", None),
)
_ROUTING_CODES = {404: "unknown_route", 405: "method_not_allowed"}


class ApiError(Exception):
    """A refusal with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_TEXT else message[:MAX_TEXT] + "..."
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def plain(self, body: object) -> bytes:
        """The bytes of a response with this body, after which the connection is closed."""
        content = msgspec.json.encode(body)
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            *(f"{k}: {v}" for k, v in self.headers.items()),
        ]
        lines += ["content-type: application/json", f"content-length: {len(content)}", "connection: close", "", ""]
        return "\r\n".join(lines).encode() + content


ERRORS_AS = "quire.errors_as"
"""The entry of an ASGI scope that holds another path, where a body says whose shape its errors have."""


def error_response(scope: Scope, error: BaseException) -> Response:
    """The response to a request that an exception ended, in the shape of the API that its path belongs to."""
    found = as_api_error(error)
    context, path = scope["app"].state.context, scope.get(ERRORS_AS, scope["path"])
    content = msgspec.json.encode(context.error_body(path, found, scope["headers"]))
    return Response(content, found.status, found.headers, media_type="application/json")


class ClientGoneError(Exception):
    """The caller closed the connection: no answer is read."""


def as_api_error(error: BaseException) -> ApiError:
    """Classify any exception. What is not known is the engine's fault, and its text stays inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelNotFoundError):
        return ApiError(404, error.message, param=error.param or "model", code="model_not_found")
    if isinstance(error, PromptTooLongError):
        return ApiError(400, error.message, param=error.param, code="context_length_exceeded")
    if isinstance(error, InvalidRequestError):
        return ApiError(400, error.message, param=error.param, code="invalid_value")
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        if isinstance(error, TooManyRequestsError):
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
        return ApiError(503, str(error), code="overloaded", headers=headers)
    for kind, status, code, param in _KINDS:
        if isinstance(error, kind):
            return ApiError(status, str(error), param=param, code=code)
    if isinstance(error, EngineDeadError):
        logger.error("the engine is dead: %s", ascii(str(error))[:MAX_TEXT])
        return ApiError(500, "the engine has stopped", code="engine_dead")
    logger.error("unexpected %s at %s", type(error).__name__, _where(error))
    return ApiError(500, "the server failed to answer this request", code="internal_error")


def _where(error: BaseException) -> str:
    """The innermost calls, without the error's own text: it may quote a request, and logs hold none."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return " < ".join(f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))


async def _answer_routing(request: Request, error: Exception) -> Response:
    """404 and 405 of the router itself."""
    if not isinstance(error, HTTPException):
        return error_response(request.scope, error)
    path, method = ascii(request.scope["path"])[1:-1], ascii(request.method)[1:-1]
    text = {404: f"there is no route {path}", 405: f"{method} is not allowed on {path}"}.get(
        error.status_code, str(error.detail)
    )
    if error.status_code == 404 and _allowed(request.scope, "/v1"):
        text += f": did you mean /v1{path}? A base URL of OpenAI's clients ends with /v1"
    code, headers = _ROUTING_CODES.get(error.status_code), dict(error.headers or {})
    if error.status_code == 405:  # the router names the methods of one route of several
        headers["Allow"] = ", ".join(_allowed(request.scope))
    return error_response(request.scope, ApiError(error.status_code, text, code=code, headers=headers))


def _allowed(scope: Scope, before: str = "") -> list[str]:
    """Methods of all routes of a path, or of the one with something before it."""
    fitting = [route for route in scope["app"].routes if route.path_regex.match(before + scope["path"])]
    return sorted({method for route in fitting for method in route.methods})


def install(app: Starlette) -> None:
    """Give every exception its answer."""
    app.add_exception_handler(HTTPException, _answer_routing)
    app.add_middleware(ErrorMiddleware)


class ErrorMiddleware:
    """Answers every exception of a route. Nothing goes on to the HTTP server, whose log would quote it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; an answer that has begun is cut off."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientGoneError:
            await Response(status_code=499)(scope, receive, send)
        except Exception as error:  # noqa: BLE001 -- the last word on any error of a request
            refusal = as_api_error(error)
            if not begun:
                await error_response(scope, refusal)(scope, receive, send)
