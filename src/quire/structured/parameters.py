"""Arguments that are not one JSON object: named values one after the other, in the styles of some models.

A text may be written as it is, everything else is JSON. Which is which depends on the schema alone (`is_raw_text`), so
that a reader that has the schema finds the same value again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quire.structured_params import is_raw_text

Mark = str | int
"""A text, or a special token's id."""
OF_OBJECTS = frozenset(
    "type properties required additionalProperties description title $defs definitions $schema".split()
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a named value is written.

    Args:
        name: before and behind a parameter's name.
        raw: before and behind text that is written as it is; None where text is JSON.
        other: before and behind JSON.
        never: what text that is written as it is never holds.
        separator: between parameters.
        truths: how true and false are written; None for JSON's.
    """

    name: tuple[str, str]
    raw: tuple[Mark, Mark] | None
    other: tuple[str, str]
    separator: str
    never: str = ""
    truths: tuple[str, str] | None = None


STYLES: Mapping[str, Style] = {
    "qwen_xml": Style(("<parameter=", ">\n"), ("", "\n</parameter>\n"), ("", "\n</parameter>\n"), "", "</parameter>"),
    "python": Style(("", "="), None, ("", ""), ", ", truths=("True", "False")),
    "gemma": Style(("", ":"), ("<escape>", "<escape>"), ("", ""), ",", "<escape>"),
}


class Writer(Protocol):
    """Of a grammar's rules; see `structural_tag.py`."""

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a rule."""

    def json(self, schema: Any) -> str:
        """JSON that a schema holds."""

    def raw_text(self, least: int, most: int | None, end: Mark, never: str) -> str:
        """Text of so many characters and the mark behind it; it holds neither that nor `never`."""

    def either(self, marks: Sequence[Mark]) -> str:
        """One of these marks."""


def parameters_of(
    writer: Writer, style: Style, schema: Mapping[str, Any], bad: Callable[[str, str], Exception], place: str
) -> str:
    """The named properties in their order; those that are not required may be left out.

    Raises:
        what `bad` makes: a schema that says more than which properties there are.
    """
    others = [name for name in schema if name not in OF_OBJECTS]
    if others or schema.get("type", "object") != "object":
        raise bad(place, f"the keyword {(others or ['type'])[0]!r} cannot be held for named parameters")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    for name in required:
        if name not in properties:
            raise bad(place, f"{name!r} is required, and no property")
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    first, later = "", ""
    for name, inner in reversed(properties.items()):
        if not name or any(one in name for one in "<>\n(){},:="):
            raise bad(place, f"the property {name!r} cannot be the name of a parameter in this format")
        one = writer.rule(
            f"{json.dumps(''.join((style.name[0], name, style.name[1])))} {_value(writer, style, inner, shared)}"
        )
        may_miss = name not in required
        with_rest = f"{one} {later}".rstrip()
        first = writer.rule(f"{with_rest} | {first or _NOTHING}" if may_miss else with_rest)
        separated = f"{json.dumps(style.separator)} {with_rest}" if style.separator else with_rest
        later = writer.rule(f"{separated} | {later or _NOTHING}" if may_miss else separated)
    return first or _NOTHING


_NOTHING = '""'


def _value(writer: Writer, style: Style, schema: Any, shared: Mapping[str, Any]) -> str:
    if style.truths and isinstance(schema, Mapping) and schema.get("type") == "boolean" and "enum" not in schema:
        return f"({' | '.join(map(json.dumps, style.truths))})"
    if style.raw is None or not is_raw_text(schema, style.never):
        value = schema if isinstance(schema, Mapping) else {}
        held = writer.rule(writer.json({**shared, **value}))
        begin, end = style.other
        return f"{json.dumps(begin)} {held} {json.dumps(end)}" if end else held
    begin_mark, end_mark = style.raw
    before = f"{writer.either([begin_mark])} " if begin_mark != "" else ""
    if "const" in schema or "enum" in schema:
        texts = [schema["const"]] if "const" in schema else schema["enum"]
        listed = " | ".join(json.dumps(one, ensure_ascii=False) for one in texts)
        return f"{before}({listed}) {writer.either([end_mark])}"
    return before + writer.raw_text(schema.get("minLength", 0), schema.get("maxLength"), end_mark, style.never)
