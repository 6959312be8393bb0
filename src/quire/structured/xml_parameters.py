"""Parameters as Qwen3-Coder writes them: `<parameter=NAME>`, a line, the value, a line, `</parameter>`.

A text is written as it is, everything else as JSON. Which is which depends on the schema alone, so that a reader that
has the schema finds the same value again (`quire.text.parsers.qwen_xml` says the same).
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

RAW = frozenset(("type", "description", "title", "default", "examples", "enum", "const", "minLength", "maxLength"))
"""What a schema of text that is written as it is may say."""
OF_OBJECTS = frozenset(
    (
        "type",
        "properties",
        "required",
        "additionalProperties",
        "description",
        "title",
        "$defs",
        "definitions",
        "$schema",
    )
)
CLOSE = "</parameter>"
MAX_RAW_LENGTH = 2000


class Writer(Protocol):
    """Of a grammar's rules; see `structural_tag.py`."""

    ends: dict[str | int, None]

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a rule."""

    def terminal(self, body: str) -> str:
        """The name of a terminal."""

    def json(self, schema: Any) -> str:
        """JSON that a schema holds."""

    def text_until(self, marks: Any, excludes: Any) -> str:
        """Any text, and a mark."""


def is_raw(schema: Any) -> bool:
    """Whether a value is text that is written as it is."""
    if not isinstance(schema, Mapping) or schema.get("type") != "string" or not RAW.issuperset(schema):
        return False
    texts = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]
    return all(isinstance(one, str) and CLOSE not in one for one in texts) and (
        schema.get("minLength", 0) <= MAX_RAW_LENGTH and schema.get("maxLength", 0) <= MAX_RAW_LENGTH
    )


def parameters_of(writer: Writer, schema: Mapping[str, Any], bad: Callable[[str, str], Exception], place: str) -> str:
    """The named properties in their order, those that are not required perhaps.

    Raises:
        what `bad` makes: a schema that says more than which properties there are.
    """
    others = [name for name in schema if name not in OF_OBJECTS]
    if others or schema.get("type", "object") != "object":
        raise bad(place, f"the keyword {(others or ['type'])[0]!r} cannot be held for XML parameters")
    properties = schema.get("properties", {})
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    for name in schema.get("required", ()):
        if name not in properties:
            raise bad(place, f"requires {name!r}, which is no property")
    found = []
    for name, inner in properties.items():
        if any(one in name for one in "<>\n"):
            raise bad(place, f"the property {name!r} cannot be the name of an XML parameter")
        one = writer.rule(f"{json.dumps(f'<parameter={name}>')} {_value(writer, inner, shared)} {json.dumps(chr(10))}")
        found.append(one if name in schema.get("required", ()) else f"{one}?")
    return " ".join(found) or '""'


def _value(writer: Writer, schema: Any, shared: Mapping[str, Any]) -> str:
    end = f"\n{CLOSE}"
    if not is_raw(schema):
        value = schema if isinstance(schema, Mapping) else {}
        return f'"\\n" {writer.rule(writer.json({**shared, **value}))} {json.dumps(end)}'
    if "const" in schema or "enum" in schema:
        texts = [schema["const"]] if "const" in schema else schema["enum"]
        return f'"\\n" ({" | ".join(json.dumps(one, ensure_ascii=False) for one in texts)}) {json.dumps(end)}'
    writer.ends[end] = None
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not least and most is None:
        return f'"\\n" {writer.text_until([end], [])}'
    bounds = f"{{{least},{'' if most is None else most}}}"
    text = writer.terminal(f"/(?s:.{bounds})/ & ~/(?s:.*)<\\/parameter>(?s:.*)/")
    return f'"\\n" {writer.rule(f"{text} {json.dumps(end)}", "[lazy]")}'
