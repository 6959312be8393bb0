"""Responses, conversations, files and batches in OpenAPI 3.1."""

from typing import Any, cast

from quire.server.doors.openai.batches.routes import BATCH
from quire.server.doors.openai.responses.bodies import (
    CONVERSATION,
    CONVERSATION_ITEMS,
    CONVERSATION_UPDATE,
    INPUT_TOKENS,
    RESPONSE,
)
from quire.server.http.limits import Limits
from quire.server.http.openapi import INTEGER, errors, get, open_object, or_null, post, ref
from quire.server.http.schema import STRING, RequestSchema, Schema, array

EVENTS = "Server-sent events, each named by its type and numbered; the last says how the response ended."
_BODIES = {
    "ResponseRequest": RESPONSE,
    "InputTokensRequest": INPUT_TOKENS,
    "ConversationRequest": CONVERSATION,
    "ConversationUpdateRequest": CONVERSATION_UPDATE,
    "ConversationItemsRequest": CONVERSATION_ITEMS,
    "BatchRequest": BATCH,
}
_FORM: Schema = {
    "type": "object",
    "properties": {"purpose": {"const": "batch"}, "file": {"type": "string", "format": "binary"}},
    "required": ["purpose", "file"],
    "additionalProperties": False,
}
_PAGE: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "order": {"enum": ["asc", "desc"]},
    "after": STRING,
}
_FOLLOW: dict[str, Schema] = {
    "stream": {"type": "boolean"},
    "starting_after": {"type": "integer", "minimum": 0, "maximum": 10**9 - 1},
}


def bodies(limits: Limits) -> dict[str, Schema]:
    """The schema of each body and of what it is made of, by its name."""
    found: dict[str, Schema] = {}
    for name, schema in _BODIES.items():
        found[name], below = cast(RequestSchema[Any], schema).json_schema(limits)
        found |= below
    return found


def paths() -> dict[str, Any]:
    """What can be asked of what is kept."""
    response, conversation = "/v1/responses/{id}", "/v1/conversations/{id}"
    return {
        "/v1/responses": {"post": _kept(post("Response", "Answer items with items.", events=EVENTS))},
        "/v1/responses/input_tokens": {"post": post("InputTokens", "The tokens of what a response would answer.")},
        response: {
            "get": _one("retrieveResponse", "A response that is kept; or its events.", "ResponseResponse", _FOLLOW),
            "delete": _one("deleteResponse", "Forget a response.", "Deleted"),
        },
        f"{response}/cancel": {"post": _one("cancelResponse", "End one in the background.", "ResponseResponse")},
        f"{response}/input_items": {"get": _one("listInputItems", "Items of its input.", "Page", _PAGE)},
        "/v1/conversations": {"post": _kept(post("Conversation", "Begin a conversation."))},
        conversation: {
            "get": _one("retrieveConversation", "A conversation.", "ConversationResponse"),
            "post": _kept(post("ConversationUpdate", "Give it other labels."), of="id"),
            "delete": _one("deleteConversation", "Forget it.", "Deleted"),
        },
        f"{conversation}/items": {
            "get": _one("listItems", "Its items.", "Page", _PAGE),
            "post": _kept(post("ConversationItems", "Add items."), of="id"),
        },
        f"{conversation}/items/{{item}}": {
            "get": _one("retrieveItem", "One item.", "Item", of=("id", "item")),
            "delete": _one("deleteItem", "Take one out.", "ConversationResponse", of=("id", "item")),
        },
        "/v1/files": {
            "get": _one("listFiles", "Files.", "Page", {**_PAGE, "limit": INTEGER, "purpose": STRING}, of=()),
            "post": _file(),
        },
        "/v1/files/{id}": {
            "get": _one("retrieveFile", "A file without its content.", "File"),
            "delete": _one("deleteFile", "Forget a file.", "Deleted"),
        },
        "/v1/files/{id}/content": {"get": _content()},
        "/v1/batches": {
            "get": _one("listBatches", "Batches.", "Page", _PAGE, of=()),
            "post": _kept(post("Batch", "Work on the lines of a file.")),
        },
        "/v1/batches/{id}": {"get": _one("retrieveBatch", "A batch.", "BatchResponse")},
        "/v1/batches/{id}/cancel": {"post": _one("cancelBatch", "End a batch.", "BatchResponse")},
    }


def answers() -> dict[str, Schema]:
    """What is answered."""
    item: Schema = open_object({"type": STRING, "id": STRING})
    head: dict[str, Schema] = {"id": STRING, "object": STRING, "created_at": INTEGER}
    page = {"object": {"const": "list"}, "data": array({"type": "object"}), "has_more": {"type": "boolean"}}
    ends = {"first_id": or_null(STRING), "last_id": or_null(STRING)}
    named: dict[str, Schema] = {**head, "metadata": {"type": ["object", "null"]}}
    response = {**named, "status": STRING, "output": array(item), "usage": {"type": ["object", "null"]}}
    batch = {
        **named,
        "status": STRING,
        "endpoint": STRING,
        "input_file_id": STRING,
        "request_counts": {"type": "object"},
    }
    return {
        "Item": item,
        "Page": open_object({**page, **ends}),
        "Deleted": open_object({"id": STRING, "object": STRING, "deleted": {"const": True}}),
        "ResponseResponse": open_object({**response, "store": {"type": "boolean"}}),
        "InputTokensResponse": open_object({"object": STRING, "input_tokens": INTEGER}),
        "ConversationResponse": open_object(named),
        "ConversationUpdateResponse": ref("ConversationResponse"),
        "ConversationItemsResponse": ref("Page"),
        "File": open_object({**head, "bytes": INTEGER, "filename": STRING, "purpose": STRING}),
        "BatchResponse": open_object(batch),
    }


def _kept(operation: dict[str, Any], of: str | None = None) -> dict[str, Any]:
    """One that may find the store full."""
    if of is not None:
        operation["parameters"] = [_in_path(of)]
    operation["responses"] |= errors(507)
    return operation


def _one(
    name: str, summary: str, answer: str, query: dict[str, Schema] | None = None, of: tuple[str, ...] = ("id",)
) -> dict[str, Any]:
    found = get(name, summary, ref(answer), 400, 404, 503, 507)
    places = [_in_path(item) for item in of]
    found["parameters"] = places + [
        {"name": item, "in": "query", "required": False, "schema": schema} for item, schema in (query or {}).items()
    ]
    if "stream" in (query or ()):
        found["responses"]["200"]["content"]["text/event-stream"] = {"schema": STRING}
    return found


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": STRING}


def _file() -> dict[str, Any]:
    found = _kept(post("File", "Keep a file for a batch."))
    found["requestBody"]["content"] = {"multipart/form-data": {"schema": _FORM}}
    found["responses"]["200"]["content"] = {"application/json": {"schema": ref("File")}}
    return found


def _content() -> dict[str, Any]:
    found = _one("fileContent", "The content of a file.", "File")
    found["responses"]["200"]["content"] = {"application/octet-stream": {"schema": STRING}}
    return found
