"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

400 invalid_request_error    the caller's fault, with the field in `param`
401 403 404 405 408 413 415  invalid_request_error too, told apart by `code` (408: the request's own `timeout` passed)
500 server_error             the engine's fault
429 invalid_request_error    this key has too many requests waiting: with Retry-After
503 server_error             overloaded, stopping: with Retry-After
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
    TooManyRequestsError,
)

logger = logging.getLogger("quire.server")

MAX_TEXT = 1000
FRAMES = 6
"""Calls shown of an unexpected error."""
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
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The JSON object that a response or a stream event carries."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        text = self.message if len(self.message) <= MAX_TEXT else self.message[:MAX_TEXT] + "..."
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}

    def plain(self) -> bytes:
        """The same as the bytes of a response after which the connection is closed."""
        content = msgspec.json.encode(self.body())
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            *(f"{k}: {v}" for k, v in self.headers.items()),
        ]
        lines += ["content-type: application/json", f"content-length: {len(content)}", "connection: close", "", ""]
        return "\r\n".join(lines).encode() + content

    def response(self) -> Response:
        """The same as a whole response."""
        content = msgspec.json.encode(self.body())
        return Response(content, self.status, self.headers, media_type="application/json")


class ClientGoneError(Exception):
    """The caller closed the connection: nobody reads the answer."""


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
    if isinstance(error, DeadlineExceededError):
        return ApiError(408, str(error), param="timeout", code="deadline_exceeded")
    if isinstance(error, NoTokenLeftError):
        return ApiError(400, str(error), code="no_token_left")
    if isinstance(error, RequestFailedError):
        return ApiError(500, str(error), code="request_failed")
    if isinstance(error, EngineDeadError):
        logger.error("the engine is dead: %s", _one_line(error))
        return ApiError(500, "the engine has stopped", code="engine_dead")
    logger.error("unexpected %s at %s", type(error).__name__, _where(error))
    return ApiError(500, "the server failed to answer this request", code="internal_error")


def _where(error: BaseException) -> str:
    """The innermost calls, without the error's own text: it may quote a request, and logs hold none."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return " < ".join(f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _one_line(error: BaseException) -> str:
    return ascii(str(error))[:MAX_TEXT]


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _answer_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _answer_routing(request: Request, error: Exception) -> Response:
    """404 and 405 of the router itself."""
    if not isinstance(error, HTTPException):
        return as_api_error(error).response()
    path, method = ascii(request.scope["path"])[1:-1], ascii(request.method)[1:-1]
    text = {404: f"there is no route {path}", 405: f"{method} is not allowed on {path}"}.get(
        error.status_code, str(error.detail)
    )
    code = _ROUTING_CODES.get(error.status_code)
    return ApiError(error.status_code, text, code=code, headers=error.headers).response()


def install(app: Starlette) -> None:
    """Give every exception its answer."""
    app.add_exception_handler(ClientGoneError, _answer_client_gone)
    app.add_exception_handler(HTTPException, _answer_routing)
    for kind in (ApiError, InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(ErrorMiddleware)


class ErrorMiddleware:
    """Answers what no handler knows. Nothing goes on to the HTTP server, whose log would quote it."""

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
        except Exception as error:  # noqa: BLE001 -- the last word on any error of a request
            refusal = as_api_error(error)
            if not begun:
                await refusal.response()(scope, receive, send)
