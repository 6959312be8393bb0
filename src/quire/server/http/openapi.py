"""The server's own description, in OpenAPI 3.1: each API describes its routes, and the server those of its own."""

from collections.abc import Sequence
from typing import Any

import quire
from quire.server.http.context import Api
from quire.server.http.limits import Limits
from quire.server.http.schema import STRING, Schema, array

INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
CHOSEN: dict[str, Any] = {"name": "model", "in": "query", "required": False, "schema": STRING}
"""Which of several models, on routes whose bodies name none."""
EXPLAIN = "Where the time of a request went, for operators: one entry for each prompt of it."


def document(apis: Sequence[Api], limits: Limits, *, needs_key: bool) -> dict[str, Any]:
    """The description of a server with these APIs and limits."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Schema] = {}
    for api in apis:
        described = api.describe(limits)
        for path, methods in described[0].items():
            paths[path] = paths.get(path, {}) | methods
        schemas |= described[1]
    own: dict[str, Any] = {
        "/v1/requests/{request_id}/explain": {
            "get": get("explain", EXPLAIN, ref("Explanations"), 403, 404, of="request_id")
        },
        "/": {"get": get("index", "What this is, and links on; a page where Accept asks for HTML.", _index())},
        "/version": {"get": get("version", "The version of Quire.", open_object({"version": STRING}))},
        "/metrics": {"get": get("metrics", "Prometheus metrics.", STRING, 403, media="text/plain")},
        "/openapi.json": {"get": get("openapi", "This document.", {"type": "object"})},
        **{
            path: {"get": get(path[1:], "Probe.", ref("Status"), probe=True)}
            for path in ("/livez", "/readyz", "/health")
        },
    }
    paths |= {path: paths.get(path, {}) | methods for path, methods in own.items()}
    schemas |= {
        "Explanations": open_object({"object": {"const": "list"}, "data": array(ref("Explanation"))}),
        "Explanation": _explanation(),
        "Status": open_object({"status": STRING, "models": {"type": "object"}}, optional=("models",)),
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Quire",
            "version": quire.__version__,
            "description": "What is not honoured is refused by name.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if needs_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def ref(name: str) -> Schema:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def open_object(properties: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    """An object of an answer: later versions may add fields."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def _content(schema: Schema, media: str = "application/json") -> dict[str, Any]:
    return {media: {"schema": schema}}


_ERRORS = {
    400: "The request is refused; `param` names the field.",
    401: "A key is needed.",
    403: "The admin key is needed.",
    404: "No such model or route.",
    405: "The method is not allowed here.",
    408: "The body took too long, or the request's own timeout passed.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests; see Retry-After.",
    500: "This request failed.",
    503: "Overloaded or stopping, or the store cannot be used; see Retry-After.",
    507: "The store has no room.",
}


def errors(*statuses: int, error: str = "Error") -> dict[str, Any]:
    """What these statuses mean, and their shape."""
    return {str(status): {"description": _ERRORS[status], "content": _content(ref(error))} for status in statuses}


def post(
    name: str,
    summary: str,
    *more: int,
    events: str = "",
    media: str = "text/event-stream",
    error: str = "Error",
) -> dict[str, Any]:
    """A route that reads a body `NAMERequest` and answers with a `NAMEResponse`, or with a stream of events, which
    `events` tells of. `more` are statuses that others do not have."""
    content = _content(ref(f"{name}Response"))
    if events:
        event = {"type": "object", "properties": {"data": STRING}, "required": ["data"], "description": events}
        content |= _content(event, media)
    return {
        "operationId": f"create{name}",
        "summary": summary,
        "requestBody": {"required": True, "content": _content(ref(f"{name}Request"))},
        "responses": {
            "200": {"description": "Done.", "content": content},
            **errors(*sorted({*(_ERRORS.keys() - {403, 507}), *more}), error=error),
        },
    }


def get(
    name: str,
    summary: str,
    schema: Schema,
    *more: int,
    media: str = "application/json",
    of: str | None = None,
    probe: bool = False,
    error: str = "Error",
) -> dict[str, Any]:
    """A route without a body, with the statuses of its errors."""
    found: dict[str, Any] = {"operationId": name, "summary": summary}
    responses = {"200": {"description": "Done.", "content": _content(schema, media)}}
    if of is not None:
        found["parameters"] = [{"name": of, "in": "path", "required": True, "schema": STRING}]
    if probe:
        found["security"], found["parameters"] = [], [CHOSEN]
        responses |= errors(404)
        responses["503"] = {"description": "Not so.", "content": _content(schema)}
    else:
        responses |= errors(401, *more, error=error)
    return {**found, "responses": {**responses, **errors(405, error=error)}}


def _index() -> Schema:
    texts = {name: STRING for name in ("name", "version", "base_path")}
    links: Schema = {"type": "object", "additionalProperties": STRING}
    return open_object({**texts, "models": array(STRING), "links": links})


def _explanation() -> Schema:
    counts = ("num_prompt_tokens", "num_output_tokens", "num_preemptions", "num_restarts")
    seconds: Schema = {"type": "object", "additionalProperties": NUMBER}
    return open_object(
        {
            **{name: STRING for name in ("id", "caller", "sentence", "largest")},
            **{name: INTEGER for name in counts},
            **{name: seconds for name in ("parts", "queued_because", "waited_for")},
            "finished": {"type": "boolean"},
            "finish_reason": or_null(STRING),
            "total_s": NUMBER,
            "time_to_first_token_s": or_null(NUMBER),
            "model": STRING,
        },
        optional=("model",),
    )
