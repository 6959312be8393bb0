"""Responses and conversations in the store: what came before an input, and what is kept of an answer."""

from collections.abc import Sequence
from typing import Any

import msgspec

from quire.errors import InvalidRequestError
from quire.server.doors.openai.responses.bodies import ResponseBody
from quire.server.doors.openai.responses.items import Item
from quire.server.http.context import ServerContext
from quire.server.http.limits import Limit
from quire.server.http.stored import AddParts, Change, Part, Put, Store, Stored, not_found, store_of

RESPONSE, CONVERSATION = "response", "conversation"
OUTPUT, EVENTS = "/output", "/events"
ANSWER_BYTES = 2**16
"""Room that must be there for a response before it is computed."""


class Keeper:
    """Keeps one response of one caller.

    Args:
        conversation: the one that its items are added to.
        keeps_response: whether the response itself is kept.
    """

    def __init__(self, store: Store, owner: str, conversation: str | None, *, keeps_response: bool) -> None:
        self._store, self._owner = store, owner
        self.conversation, self.keeps_response = conversation, keeps_response

    async def open(self, response: dict[str, Any], items: Sequence[Item], most: Limit) -> None:
        """One that is worked on in the background; its owner has so many at most."""
        await self._store.write(self._put(response, most), self._items(response["id"], items))

    async def finish(self, response: dict[str, Any], items: Sequence[Item]) -> None:
        """One that has ended, with what was said."""
        name, output = response["id"], response["output"]
        changes: list[Change] = []
        if self.keeps_response:
            changes += [
                self._put(response),
                self._items(name, items),
                self._items(name + OUTPUT, output),
            ]
        if self.conversation is not None:
            parts = [Part(None, msgspec.json.encode(item), item["id"]) for item in [*items, *output]]
            changes.append(AddParts(self.conversation, self._owner, parts, while_there=self.conversation))
        await self._store.write(*changes)

    async def keep_events(self, name: str, events: Sequence[bytes]) -> None:
        """The events of one that was streamed in the background."""
        parts = [Part(number, content) for number, content in enumerate(events)]
        await self._store.write(AddParts(name + EVENTS, self._owner, parts, while_there=name))

    async def end(self, name: str, **fields: Any) -> None:
        """One that ended without an answer; of one that is kept as it ended, or was deleted, nothing changes."""
        found = await self._store.get(RESPONSE, self._owner, name)
        if found is not None and found.is_open:
            await self._store.write(Put(closed(found, **fields)))

    def _put(self, response: dict[str, Any], most_open: Limit | None = None) -> Put:
        """With a limit: as one that is worked on."""
        body = {name: value for name, value in response.items() if name != "output"}
        is_open = most_open is not None
        return Put(Stored(response["id"], RESPONSE, self._owner, body, response["created_at"], is_open), most_open)

    def _items(self, place: str, items: Sequence[Item]) -> AddParts:
        parts = [Part(number, msgspec.json.encode(item), item["id"]) for number, item in enumerate(items)]
        return AddParts(place, self._owner, parts)


def closed(found: Stored, **fields: Any) -> Stored:
    """The same, ended."""
    return Stored(found.id, found.kind, found.owner, {**found.body, **fields}, found.created_s)


async def keeper_of(context: ServerContext, owner: str, body: ResponseBody) -> Keeper | None:
    """What keeps the response that is asked for; None: it is not to be kept.

    Raises:
        ApiError: the store has no room, cannot be used, or is not there; or the conversation is not.
    """
    named = body.conversation if isinstance(body.conversation, str | None) else body.conversation.id
    if not body.store and named is None:
        return None
    if context.store is None and not body.background and named is None:
        return None  # the answer says so: store is false
    store = store_of(context.store)
    await store.check_room(owner, ANSWER_BYTES)
    if named is not None and await store.get(CONVERSATION, owner, named) is None:
        raise not_found("conversation", named)
    return Keeper(store, owner, named, keeps_response=body.store)


async def items_before(context: ServerContext, owner: str, body: ResponseBody, keeper: Keeper | None) -> list[Item]:
    """Items of earlier turns.

    Raises:
        ApiError: they are not stored here, or there are too many.
    """
    limits = context.limits
    if keeper is not None and keeper.conversation is not None:
        await _check_bytes(context, 0, keeper.conversation)
        return await _items_at(context, keeper.conversation)
    found: list[Item] = []
    name, turns, num_bytes = body.previous_response_id, 0, 0
    while name is not None:
        if (turns := turns + 1) > limits.chained_responses.value:
            raise limits.chained_responses.error()
        store = store_of(context.store)
        response = await store.get(RESPONSE, owner, name)
        if response is None:
            error = not_found("response", name)
            error.param, error.code = "previous_response_id", "previous_response_not_found"
            raise error
        if response.is_open:
            text = f"previous_response_id names a response that is still worked on: {name[:128]!r}"
            raise InvalidRequestError(text, param="previous_response_id")
        num_bytes = await _check_bytes(context, num_bytes, name, name + OUTPUT)
        found = [*await _items_at(context, name), *await _items_at(context, name + OUTPUT), *found]
        if len(found) > limits.input_items.value:
            raise limits.input_items.error(f"{len(found):,}")
        name = response.body["previous_response_id"]
        if response.body["conversation"] is not None:  # what came before that one was not its alone
            name = None
    return found


async def with_references(
    context: ServerContext, owner: str, items: Sequence[Item], place: str = "input"
) -> list[Item]:
    """Items, with those in the place of references that they name.

    Raises:
        InvalidRequestError: one is not stored here.
        ApiError: they are too large together.
    """
    found, num_bytes, limit = [], 0, context.limits.input_bytes
    for number, item in enumerate(items):
        if item["type"] == "item_reference":
            part = await store_of(context.store).find_part(owner, item["id"])
            if part is None:
                where = f"{place}[{number}].id"
                raise InvalidRequestError(f"{where}: no item {item['id'][:128]!r} is stored here", param=where)
            num_bytes += len(part.content)
            if num_bytes > limit.value:
                raise limit.error()
            item = msgspec.json.decode(part.content)
        found.append(item)
    return found


async def _check_bytes(context: ServerContext, num_bytes: int, *places: str) -> int:
    """So many and those of the parts at these places, before they are read."""
    for place in places:
        num_bytes += sum((await store_of(context.store).sizes(place)).values())
    if num_bytes > context.limits.input_bytes.value:
        raise context.limits.input_bytes.error(f"{num_bytes:,}")
    return num_bytes


async def _items_at(context: ServerContext, place: str) -> list[Item]:
    most = context.limits.input_items.value + 1
    return [msgspec.json.decode(part.content) for part in await store_of(context.store).parts(place, limit=most)]


async def load_response(context: ServerContext, owner: str, name: str) -> tuple[Stored, dict[str, Any]]:
    """A response, and the same as it is sent.

    Raises:
        ApiError: it is not stored here.
    """
    found = await store_of(context.store).get(RESPONSE, owner, name)
    if found is None:
        raise not_found("response", name)
    return found, {**found.body, "output": await _items_at(context, name + OUTPUT)}
