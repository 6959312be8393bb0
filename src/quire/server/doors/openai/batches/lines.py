"""One line of a batch: a request as the routes would read it, and its answer as a line of a result file."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from quire.engine.queue import Caller
from quire.errors import EngineDeadError, OverloadedError
from quire.server.doors.openai.parse import parse_chat, parse_completion
from quire.server.doors.openai.respond import ChatAnswer, CompletionAnswer
from quire.server.doors.openai.responses.keep import keeper_of
from quire.server.doors.openai.responses.parse import in_our_words, parse_response
from quire.server.doors.openai.responses.routes import answer_to
from quire.server.http.context import RequestContext, ServerContext
from quire.server.http.errors import ApiError, as_api_error
from quire.server.http.keys import cache_namespace
from quire.server.http.schema import Field, RequestSchema
from quire.server.http.streams import Deliverable, naming_param


class LineBody(msgspec.Struct, kw_only=True):
    """A line of the file of a batch."""

    custom_id: Annotated[str, Field("names the line in the results", limit="label_characters")]
    method: Annotated[Literal["POST"], Field("of the request", "be POST")] = "POST"
    url: Annotated[str, Field("the route, that of the batch")]
    body: Annotated[dict[str, Any], Field("of the request; stream may not be set", "be an object")]


LINE = RequestSchema(LineBody)
Raw = dict[str, Any]
Maker = Callable[[ServerContext, Caller, Raw], Awaitable[Deliverable]]


def _requested(context: ServerContext, caller: Caller, salt: str, timeout_s: float | None) -> RequestContext:
    """Its own place among the callers: what a batch is given is no debt of its key's other requests."""
    salt = cache_namespace("" if context.shares_prefix_cache else caller.name, salt)
    return RequestContext(Caller(f"{caller.name}/batch", caller.weight), salt, timeout_s, is_background=True)


async def _chat(context: ServerContext, caller: Caller, raw: Raw) -> Deliverable:
    call = parse_chat(raw, context.defaults_of(raw), context.limits)
    context = context.of_model(call.options.model)
    requested = _requested(context, caller, call.options.cache_salt, call.options.timeout)
    return ChatAnswer(context, call, requested)


async def _completion(context: ServerContext, caller: Caller, raw: Raw) -> Deliverable:
    call = parse_completion(raw, context.defaults_of(raw), context.limits)
    context = context.of_model(call.options.model)
    requested = _requested(context, caller, call.options.cache_salt, call.options.timeout)
    return CompletionAnswer(context, call, requested)


async def _response(context: ServerContext, caller: Caller, raw: Raw) -> Deliverable:
    body, items = parse_response(raw, context.limits)
    if body.background:
        raise ApiError(400, "background must be false in a batch", param="background", code="invalid_value")
    requested = _requested(context, caller, body.options.cache_salt, body.options.timeout)
    keeper = await keeper_of(context, caller.name, body)
    return await answer_to(context, requested, caller.name, body, items, keeper)


class Endpoint(NamedTuple):
    """A route that a batch may ask."""

    make: Maker
    prompt_field: str
    """What the engine calls the prompt is this field."""
    words: Callable[[], AbstractContextManager[None]] = nullcontext
    """Refusals in the words of the route."""


ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        "/v1/chat/completions": Endpoint(_chat, "messages"),
        "/v1/completions": Endpoint(_completion, "prompt"),
        "/v1/responses": Endpoint(_response, "input", in_our_words),
    }
)


class Result(NamedTuple):
    """Of one line."""

    is_good: bool
    content: bytes
    """A line of the output or of the error file."""


class LineReader:
    """Reads lines of one batch, and answers them.

    Args:
        url: the route of the batch.
        error_body: an error in its shape.
    """

    def __init__(
        self, context: ServerContext, caller: Caller, url: str, error_body: Callable[[ApiError], object]
    ) -> None:
        self._context, self._caller, self._url, self._error_body = context, caller, url, error_body
        self._seen: set[str] = set()

    def read(self, line: bytes) -> LineBody:
        """The request of a line.

        Raises:
            ApiError, InvalidRequestError: it is none.
        """
        if len(line) > self._context.limits.body_bytes.value:
            raise self._context.limits.body_bytes.error(f"{len(line):,}")
        found = LINE.read(self._context.bodies.object_in(bytearray(line)), self._context.limits)
        if found.custom_id in self._seen:
            text = f"custom_id {found.custom_id!r} is that of an earlier line"
            raise ApiError(400, text, param="custom_id", code="duplicate_custom_id")
        self._seen.add(found.custom_id)
        if found.url != self._url:
            raise ApiError(400, f"url must be {self._url}, that of the batch", param="url", code="mismatched_url")
        if found.body.get("stream"):
            raise ApiError(400, "stream must be false in a batch", param="stream", code="invalid_value")
        return found

    async def answer(self, line: LineBody) -> Result:
        """Compute it. Waits while there is no room for it.

        Raises:
            EngineDeadError: there is no engine any more: the line is not answered.
            OverloadedError: the server is stopping.
        """
        endpoint = ENDPOINTS[self._url]
        while True:
            try:
                with endpoint.words(), naming_param("prompt", endpoint.prompt_field):
                    made = await endpoint.make(self._context, self._caller, line.body)
                    content = await made.whole()
                return _result(line.custom_id, 200, made.headers().get("x-request-id", ""), msgspec.Raw(content))
            except OverloadedError as error:
                if not self._context.gate.is_open:
                    raise
                await asyncio.sleep(error.retry_after_s)
            except EngineDeadError:
                raise
            except Exception as error:  # noqa: BLE001 -- one bad line hurts one line
                refusal = as_api_error(error)
                return _result(line.custom_id, refusal.status, "", self._error_body(refusal))


def _result(custom_id: str, status: int, request_id: str, body: Any) -> Result:
    response = {"status_code": status, "request_id": request_id, "body": body}
    return Result(status == 200, _line(custom_id, response, None))


def refusal_of(custom_id: str | None, error: ApiError) -> Result:
    """Of a line that was not asked."""
    text = error.message.replace("the body", "the line", 1)
    return Result(False, _line(custom_id, None, {"code": error.code, "message": text}))


def _line(custom_id: str | None, response: Any, error: Any) -> bytes:
    name = f"batch_req_{secrets.token_hex(16)}"
    return msgspec.json.encode({"id": name, "custom_id": custom_id, "response": response, "error": error}) + b"\n"
