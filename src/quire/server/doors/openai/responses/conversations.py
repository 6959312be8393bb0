"""/v1/conversations: lists of items that responses go on with and add to."""

import secrets
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quire.server.doors.openai.responses.bodies import (
    CONVERSATION,
    CONVERSATION_ITEMS,
    CONVERSATION_UPDATE,
    InputItem,
)
from quire.server.doors.openai.responses.items import checked_items, with_types
from quire.server.doors.openai.responses.keep import CONVERSATION as KIND
from quire.server.doors.openai.responses.keep import with_references
from quire.server.doors.openai.responses.query import check_query
from quire.server.http.context import ServerContext
from quire.server.http.keys import caller_of
from quire.server.http.schema import RequestSchema
from quire.server.http.stored import (
    AddParts,
    Part,
    Put,
    Remove,
    RemovePart,
    Stored,
    Update,
    listing,
    not_found,
    page_of,
    store_of,
)


async def create_conversation(request: Request) -> Response:
    """Begin one."""
    context, owner = _asked(request)
    body = await _read(request, CONVERSATION)
    items = await _new_items(context, owner, body.items or [])
    name = f"conv_{secrets.token_hex(16)}"
    content = {"id": name, "object": "conversation", "created_at": int(time.time()), "metadata": body.metadata or {}}
    made = Stored(name, KIND, owner, content)
    store = store_of(context.store)
    await store.check_room(owner, sum(len(part.content) for part in items))
    await store.write(Put(made), AddParts(made.id, owner, items))
    return JSONResponse(made.body)


async def retrieve_conversation(request: Request) -> Response:
    """One of them."""
    return JSONResponse((await _found(request)).body)


async def update_conversation(request: Request) -> Response:
    """Give it other labels."""
    body = await _read(request, CONVERSATION_UPDATE)
    context, _ = _asked(request)
    found = await _found(request)
    changed = Stored(found.id, KIND, found.owner, {**found.body, "metadata": body.metadata}, found.created_s)
    await store_of(context.store).write(Update(changed))
    return JSONResponse(changed.body)


async def delete_conversation(request: Request) -> Response:
    """Forget it with its items."""
    found = await _found(request)
    await store_of(_asked(request)[0].store).write(Remove(found.id))
    return JSONResponse({"id": found.id, "object": "conversation.deleted", "deleted": True})


async def create_items(request: Request) -> Response:
    """Add items at its end."""
    body = await _read(request, CONVERSATION_ITEMS)
    (context, owner), found = _asked(request), await _found(request)
    store, limit = store_of(context.store), context.limits.input_items
    items = await _new_items(context, owner, body.items)
    await store.check_room(owner, sum(len(part.content) for part in items))
    await store.write(AddParts(found.id, owner, items, while_there=found.id, limit=limit))
    return _listed(items, len(items))


async def list_items(request: Request) -> Response:
    """Its items."""
    page, found = page_of(request, descending=True), await _found(request)
    return _listed(await store_of(_asked(request)[0].store).part_page(found.id, page), page.limit)


async def retrieve_item(request: Request) -> Response:
    """One of its items."""
    part = (await _found_item(request))[1]
    return Response(part.content, media_type="application/json")


async def delete_item(request: Request) -> Response:
    """Take one out."""
    found, part = await _found_item(request)
    assert part.number is not None
    await store_of(_asked(request)[0].store).write(RemovePart(found.id, part.number))
    return JSONResponse(found.body)


def _asked(request: Request) -> tuple[ServerContext, str]:
    return request.app.state.context, caller_of(request.scope)


async def _read(request: Request, schema: RequestSchema[Any]) -> Any:
    context: ServerContext = request.app.state.context

    def parse(raw: dict[str, Any]) -> Any:
        raw = {**raw, "items": with_types(raw["items"])} if "items" in raw else raw
        return schema.read(raw, context.limits)

    return await context.bodies.read(request, parse)


async def _found(request: Request) -> Stored:
    check_query(request)
    context, owner = _asked(request)
    name = request.path_params["id"]
    found = await store_of(context.store).get(KIND, owner, name)
    if found is None:
        raise not_found("conversation", name)
    return found


async def _found_item(request: Request) -> tuple[Stored, Part]:
    (context, owner), found, name = _asked(request), await _found(request), request.path_params["item"]
    part = await store_of(context.store).find_part(owner, name, found.id)
    if part is None:
        raise not_found("item", name)
    return found, part


async def _new_items(context: ServerContext, owner: str, given: list[InputItem]) -> list[Part]:
    items = await with_references(context, owner, checked_items(given, "items"), "items")
    return [Part(None, msgspec.json.encode(item), item["id"]) for item in items]


def _listed(parts: list[Part], limit: int) -> Response:
    return JSONResponse(listing([msgspec.json.decode(part.content) for part in parts], limit))


_ONE = "/v1/conversations/{id}"
ROUTES = (
    Route("/v1/conversations", create_conversation, methods=["POST"]),
    Route(_ONE, retrieve_conversation, methods=["GET"]),
    Route(_ONE, update_conversation, methods=["POST"]),
    Route(_ONE, delete_conversation, methods=["DELETE"]),
    Route(f"{_ONE}/items", create_items, methods=["POST"]),
    Route(f"{_ONE}/items", list_items, methods=["GET"]),
    Route(f"{_ONE}/items/{{item}}", retrieve_item, methods=["GET"]),
    Route(f"{_ONE}/items/{{item}}", delete_item, methods=["DELETE"]),
)
