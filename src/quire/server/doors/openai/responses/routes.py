"""/v1/responses: create, retrieve, follow, cancel, delete, and the items of the input."""

from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quire.errors import InvalidRequestError
from quire.server.doors.openai.responses.answer import ResponseAnswer
from quire.server.doors.openai.responses.background import Following, Run, job_name
from quire.server.doors.openai.responses.bodies import ResponseBody
from quire.server.doors.openai.responses.items import Item
from quire.server.doors.openai.responses.keep import (
    EVENTS,
    Keeper,
    closed,
    items_before,
    keeper_of,
    load_response,
    with_references,
)
from quire.server.doors.openai.responses.parse import chat_of, in_our_words, parse_input, parse_response
from quire.server.doors.openai.responses.query import check_query
from quire.server.http.context import RequestContext, ServerContext
from quire.server.http.errors import ApiError
from quire.server.http.keys import caller_of
from quire.server.http.stored import Put, Remove, listing, page_of, store_of
from quire.server.http.streams import Framing, deliver, naming_param

_TYPE = len(b'{"type":"')


def frame(content: bytes) -> bytes:
    """One server-sent event, whose name is its type: the first field."""
    return b"event: " + content[_TYPE : content.index(b'"', _TYPE)] + b"\ndata: " + content + b"\n\n"


def _error_event(error: ApiError) -> dict[str, Any]:
    return {
        "type": "error",
        "sequence_number": 0,
        "code": error.code,
        "message": error.message,
        "param": error.param,
    }


FRAMING = Framing("text/event-stream", frame, b"", _error_event)


async def answer_to(
    context: ServerContext,
    requested: RequestContext,
    owner: str,
    body: ResponseBody,
    items: list[Item],
    keeper: Keeper | None,
) -> ResponseAnswer:
    """What computes a response; nothing has begun.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: what it goes on from is not stored here.
    """
    context = context.of_model(body.options.model)
    before = await items_before(context, owner, body, keeper)
    items = await with_references(context, owner, items)
    make = partial(chat_of, body, [*before, *items], context.engine.get_default_sampling_params(), context.limits)
    call = await context.engine.beside(make, sum(len(str(item)) for item in before), requested.caller)
    return ResponseAnswer(context, call, requested, body=body, before=before, items=items, keeper=keeper)


async def create_response(request: Request) -> Response:
    """Answer items with items."""
    context: ServerContext = request.app.state.context
    body, items = await context.bodies.read(request, lambda raw: parse_response(raw, context.limits))
    context = context.of_model(body.options.model, request.scope)
    with in_our_words(), naming_param("prompt", "input"):
        requested = context.request_context(request, body.options.cache_salt, body.options.timeout)
        keeper = await keeper_of(context, requested.caller.name, body)
        answer = await answer_to(context, requested, requested.caller.name, body, items, keeper)
        if body.background:
            assert keeper is not None
            return await _begin(context, request, answer, keeper, streams=body.options.stream)
        return await deliver(request, answer, FRAMING if body.options.stream else None)


async def count_input_tokens(request: Request) -> Response:
    """The tokens of what a response would be an answer to."""
    context: ServerContext = request.app.state.context
    body, items = await context.bodies.read(request, lambda raw: parse_input(raw, context.limits))
    context = context.of_model(body.options.model, request.scope)
    with in_our_words(), naming_param("prompt", "input"):
        requested = context.request_context(request, "", None)
        keeper = await keeper_of(context, requested.caller.name, body)
        answer = await answer_to(context, requested, requested.caller.name, body, items, keeper)
        count = await answer.num_input_tokens()
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


async def _begin(
    context: ServerContext, request: Request, answer: ResponseAnswer, keeper: Keeper, *, streams: bool
) -> Response:
    owner, response = caller_of(request.scope), answer.queued()
    await keeper.open(response, answer.items, context.limits.background_responses)
    run = Run(answer, keeper, keeps_events=streams)
    context.jobs.start(job_name(owner, answer.id), run.work(), run)
    if streams:
        return await deliver(request, Following(run.events(-1), answer.id), FRAMING)
    return JSONResponse(response, headers={"x-request-id": answer.id})


async def retrieve_response(request: Request) -> Response:
    """A response that is stored; with `stream` its events from `starting_after` on."""
    check_query(request)
    context: ServerContext = request.app.state.context
    owner, name = caller_of(request.scope), request.path_params["id"]
    found, response = await load_response(context, owner, name)
    stream, after = request.query_params.get("stream", "false"), request.query_params.get("starting_after")
    if stream not in ("true", "false"):
        raise InvalidRequestError("stream must be true or false", param="stream")
    if stream == "false":
        if after is not None:
            raise InvalidRequestError("starting_after needs stream=true", param="starting_after")
        return JSONResponse(response)
    if after is not None and not (after.isascii() and after.isdecimal() and len(after) < 10):
        raise InvalidRequestError("starting_after must be the number of an event", param="starting_after")
    first = -1 if after is None else int(after)
    run = context.jobs.subject(job_name(owner, name))
    if isinstance(run, Run) and run.keeps_events:
        return await deliver(request, Following(run.events(first), name), FRAMING)
    events = await store_of(context.store).parts(found.id + EVENTS, start=first + 1)
    if not events:
        text = "this response has no events to stream: they are kept of one made with background and stream"
        raise InvalidRequestError(text, param="stream")
    return Response(b"".join(frame(part.content) for part in events), media_type=FRAMING.media_type)


async def cancel_response(request: Request) -> Response:
    """End the work on a response in the background."""
    context: ServerContext = request.app.state.context
    owner, name = caller_of(request.scope), request.path_params["id"]
    found, _ = await load_response(context, owner, name)
    if not found.body["background"]:
        raise InvalidRequestError("only a response in the background can be cancelled", param="id")
    await context.jobs.cancel(job_name(owner, name))
    found, response = await load_response(context, owner, name)
    if found.is_open:
        ended = closed(found, status="cancelled")
        await store_of(context.store).write(Put(ended))
        response |= ended.body
    return JSONResponse(response)


async def delete_response(request: Request) -> Response:
    """Forget a response."""
    context: ServerContext = request.app.state.context
    owner, name = caller_of(request.scope), request.path_params["id"]
    await load_response(context, owner, name)
    await context.jobs.cancel(job_name(owner, name))
    await store_of(context.store).write(Remove(name))
    return JSONResponse({"id": name, "object": "response", "deleted": True})


async def list_input_items(request: Request) -> Response:
    """The items of a response's own input."""
    check_query(request)
    context: ServerContext = request.app.state.context
    page, name = page_of(request, descending=True), request.path_params["id"]
    await load_response(context, caller_of(request.scope), name)
    parts = await store_of(context.store).part_page(name, page)
    return JSONResponse(listing([msgspec.json.decode(part.content) for part in parts], page.limit))


ROUTES = (
    Route("/v1/responses", create_response, methods=["POST"]),
    Route("/v1/responses/input_tokens", count_input_tokens, methods=["POST"]),
    Route("/v1/responses/{id}", retrieve_response, methods=["GET"]),
    Route("/v1/responses/{id}", delete_response, methods=["DELETE"]),
    Route("/v1/responses/{id}/cancel", cancel_response, methods=["POST"]),
    Route("/v1/responses/{id}/input_items", list_input_items, methods=["GET"]),
)
