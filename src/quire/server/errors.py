"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

400 invalid_request_error    the caller's fault, with the field in `param`
401 403 404 405 408 413 415  invalid_request_error too, told apart by `code`
500 server_error             the engine's fault
503 server_error             overloaded, stopping: with Retry-After
"""

import logging
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from quire.errors import (
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
)

logger = logging.getLogger("quire.server")

MAX_TEXT = 1000
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
        headers = {"Retry-After": str(max(1, int(error.retry_after_s)))}
        return ApiError(503, str(error), code="overloaded", headers=headers)
    if isinstance(error, RequestFailedError):
        return ApiError(500, str(error), code="request_failed")
    if isinstance(error, EngineDeadError):
        logger.error("the engine is dead: %s", _one_line(error))
        return ApiError(500, "the engine has stopped", code="engine_dead")
    logger.error("unexpected %s: %s", type(error).__name__, _one_line(error), exc_info=error)
    return ApiError(500, "the server failed to answer this request", code="internal_error")


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


def install(app: FastAPI) -> None:
    """Give every exception its answer."""
    app.add_exception_handler(ClientGoneError, _answer_client_gone)
    app.add_exception_handler(HTTPException, _answer_routing)
    for kind in (ApiError, InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError, Exception):
        app.add_exception_handler(kind, _answer_error)
