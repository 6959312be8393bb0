"""Fields that hold an answer to a shape: OpenAI's `response_format`, vLLM's `structured_outputs` and its older
`guided_*`, which are deprecated. They become one `StructuredOutputsParams`, which checks what they say."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from quire import structured_params as shapes
from quire.errors import InvalidRequestError, ShapeError
from quire.server.http.errors import ApiError
from quire.server.http.schema import STRING, Field, Schema, array
from quire.structured_params import StructuredOutputsParams

_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": shapes.MAX_SOURCE_BYTES}
_JSON_SCHEMA: Schema = {"anyOf": [{"type": "object"}, {"type": "boolean"}, _TEXT]}
_CHOICE = array({"type": "string", "minLength": 1}, shapes.MAX_CHOICES, least=1)
_FLAG: Schema = {"type": "boolean", "default": False}
_KINDS: dict[str, Schema] = {
    "json": _JSON_SCHEMA,
    "yaml": _JSON_SCHEMA,
    "regex": _TEXT,
    "choice": _CHOICE,
    "grammar": _TEXT,
    "structural_tag": {"anyOf": [{"type": "object"}, _TEXT]},
    "json_object": {"type": "boolean"},
    "disable_any_whitespace": _FLAG,
    "disable_additional_properties": _FLAG,
    "whitespace_pattern": {"type": "string", "minLength": 1, "maxLength": shapes.MAX_PATTERN_BYTES},
}


def _object(*required: str, **properties: Schema) -> Schema:
    """With these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


_NAME: Schema = {"type": "string", "maxLength": 64}
_STRICT: Schema = {"type": ["boolean", "null"]}
_NAMED = _object("schema", name=_NAME, description=STRING, schema=_JSON_SCHEMA, strict=_STRICT)
_FORMAT: Schema = {
    "anyOf": [
        _object("type", type={"const": "text"}),
        _object("type", type={"const": "json_object"}, schema=_JSON_SCHEMA),
        _object("type", "value", type={"const": "json_object"}, value=_JSON_SCHEMA),
        _object("type", "json_schema", type={"const": "json_schema"}, json_schema=_NAMED),
    ]
}
_OF_FORMAT = {"text": (), "json_object": ("schema", "value"), "json_schema": ("json_schema",)}
"""Type of a `response_format` -> one field beside it; with json_object it is a schema: `schema` is llama.cpp's and
others' name of it, `value` is TGI's, which the hub's client sends where it was given a json_schema."""
_OLD = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_OLD_PATTERN, _OLD_BACKEND = "guided_whitespace_pattern", "guided_decoding_backend"
_OLDER = "vLLM's older name for structured_outputs."


def _deprecated(text: str, schema: Schema) -> Field:
    return Field(text, schema={**schema, "deprecated": True})


SHAPES = {
    "response_format": Field(
        "the answer is JSON (json_object), or JSON that a schema holds (json_schema; strict: named properties alone)",
        schema=_FORMAT,
    ),
    "structured_outputs": Field(
        "the answer is held to one of json and yaml (a schema), regex, choice, grammar (Lark or GBNF),"
        " structural_tag (text with parts that are held) and json_object",
        schema=_object(**_KINDS),
    ),
    **{old: _deprecated(f"{_OLDER}{new}", _KINDS[new]) for old, new in _OLD.items()},
    _OLD_PATTERN: _deprecated(f"{_OLDER}whitespace_pattern", _KINDS["whitespace_pattern"]),
    _OLD_BACKEND: _deprecated("vLLM's choice of a compiler; there is one here: any name will do", STRING),
}
"""Fields of completions and of chats."""
_SINCE = int(datetime(2026, 11, 30, tzinfo=UTC).timestamp())
_INSTEAD = {old: f"use structured_outputs.{new}" for old, new in _OLD.items()} | {
    _OLD_PATTERN: "use structured_outputs.whitespace_pattern",
    _OLD_BACKEND: "leave it out",
}


def deprecated_in(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields among `values` that ask for something under a name of the past."""
    return tuple(name for name in _INSTEAD if name in values)


def deprecation_note(names: Sequence[str]) -> str:
    """What to send instead of each of `names`."""
    return ", ".join(f"{name} is deprecated: {_INSTEAD[name]}" for name in names)


def deprecation_headers(names: Sequence[str]) -> dict[str, str]:
    """Since when, and what to send instead (RFC 9745; `Link` as of RFC 8288); nothing where `names` is empty."""
    link = f'</openapi.json>; rel="deprecation"; type="application/json"; title="{deprecation_note(names)}"'
    return {"deprecation": f"@{_SINCE}", "link": link} if names else {}


def place_of_shape(values: Mapping[str, Any]) -> str:
    """Where a body's fields hold a shape, unless that is `structured_outputs` or nowhere."""
    older = [name for name in _OLD if values.get(name) is not None]
    form = values.get("response_format")
    if values.get(shapes.FIELD) is not None or older or not isinstance(form, Mapping):
        return older[0] if older else ""
    inner = "json_schema.schema" if form.get("type") == "json_schema" else None
    inner = inner or next((name for name in _OF_FORMAT["json_object"] if form.get(name) is not None), None)
    return f"response_format.{inner}" if inner else "response_format"


@contextmanager
def naming_shape(place: str) -> Iterator[None]:
    """Let the engine's refusal of a shape name the place in the body that `place_of_shape` found."""
    try:
        yield
    except (InvalidRequestError, ShapeError) as error:
        if not place or (isinstance(error, InvalidRequestError) and error.param != shapes.FIELD):
            raise
        place = _OLD_PATTERN if ".whitespace_pattern" in str(error).partition(" ")[0] else place
        text, param = re.sub(rf"^{shapes.FIELD}(\.\w+)?", place, str(error)), place.partition(".")[0]
        if isinstance(error, ShapeError):
            raise ApiError(400, text, param=param, code="invalid_shape") from error
        raise InvalidRequestError(text, param=param) from error


def take_shape(values: dict[str, Any]) -> None:
    """Replace the fields of `SHAPES` in `values` by `structured_outputs`, if they ask for a shape.

    Raises:
        InvalidRequestError: two of them ask for one, or one of them is wrong; it is named.
    """
    taken = {name: values.pop(name) for name in SHAPES if name in values}
    backend = taken.pop("guided_decoding_backend", None)
    if backend is not None and not isinstance(backend, str):
        raise InvalidRequestError("guided_decoding_backend must be a string", param="guided_decoding_backend")
    pattern = taken.pop("guided_whitespace_pattern", None)
    found = {name: params for name, value in taken.items() if (params := _shape_of(name, value, pattern)) is not None}
    if len(found) > 1:
        first, second = [*found][:2]
        raise InvalidRequestError(f"{first} and {second} both hold the answer to a shape: send one", param=second)
    if pattern is not None and not found:
        raise InvalidRequestError("guided_whitespace_pattern needs guided_json", param="guided_whitespace_pattern")
    for params in found.values():
        values["structured_outputs"] = params


def _shape_of(name: str, value: Any, pattern: Any) -> StructuredOutputsParams | None:
    if name == "response_format":
        return _of_response_format(value)
    try:
        if name == "structured_outputs":
            return StructuredOutputsParams.from_mapping(value)
        return StructuredOutputsParams(**{_OLD[name]: value, "whitespace_pattern": pattern})
    except InvalidRequestError as error:
        text = error.message.replace(f"structured_outputs.{_OLD[name]}", name) if name in _OLD else error.message
        raise InvalidRequestError(text, param=name) from error


def _of_response_format(value: Any) -> StructuredOutputsParams | None:
    def refused(text: str) -> InvalidRequestError:
        return InvalidRequestError(f"response_format{text}", param="response_format")

    kind = value.get("type") if isinstance(value, Mapping) else None
    kind = kind if isinstance(kind, str) else ""
    for name in value if kind in _OF_FORMAT else ():
        if name != "type" and name not in _OF_FORMAT[kind]:
            raise refused(f" of type {kind} has no field {str(name)[:64]!r}")
    if kind == "text":
        return None
    given = [name for name in _OF_FORMAT["json_object"] if kind == "json_object" and value.get(name) is not None]
    if len(given) > 1:
        raise refused(" holds schema and value, which are one field: send one")
    if kind == "json_object" and not given:
        return StructuredOutputsParams(json_object=True)
    if kind not in _OF_FORMAT:
        raise refused(" must be an object whose type is text, json_object or json_schema (others: structured_outputs)")
    named = value.get("json_schema") if kind == "json_schema" else {"schema": value[given[0]]}
    if not isinstance(named, Mapping) or "schema" not in named:
        raise refused(".json_schema must be an object with a schema")
    for name in named:
        if name not in _NAMED["properties"]:
            raise refused(f".json_schema has no field {str(name)[:64]!r}; known: {', '.join(_NAMED['properties'])}")
    if not isinstance(named.get("name", ""), str) or len(named.get("name", "")) > 64:
        raise refused(".json_schema.name must be a string of at most 64 characters")
    if not isinstance(named.get("strict"), bool | None):
        raise refused(".json_schema.strict must be true or false")
    try:
        closed = named.get("strict") is True  # OpenAI takes no other schema then
        return StructuredOutputsParams(json=named["schema"], disable_additional_properties=closed)
    except InvalidRequestError as error:
        place = f".{given[0]}" if given else ".json_schema.schema"
        raise refused(place + error.message.removeprefix("structured_outputs.json")) from error
