"""Structural tags, as the formats of calls write them; `quire.structured.structural_tag` says what they mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.text.parsers.events import Tool

Format = Mapping[str, Any]
"""A format of structural tags."""


@dataclass(frozen=True, slots=True)
class Marker:
    """A text that opens or closes a part of an answer."""

    text: str
    token_id: int | None = None
    """Where it is a special token of the model, which no text spells."""

    @property
    def format(self) -> Any:
        """As `begin`, `end` and triggers name it."""
        return self.text if self.token_id is None else {"type": "token", "token": self.token_id}

    @property
    def element(self) -> Format:
        """As a part of a sequence."""
        found: Format = self.format if self.token_id is not None else const(self.text)
        return found


NOTHING = Marker("")
_LEAVES = ("json_schema", "const_string", "regex", "grammar", "any_text", "token")
_SHARED = ("json_schema", "tags_with_separator", "sequence", "or")
ANY_TEXT: Format = {"type": "any_text"}


def const(text: str) -> Format:
    """This text."""
    return {"type": "const_string", "value": text}


def one_of(formats: Sequence[Format]) -> Format:
    """Any of these."""
    return formats[0] if len(formats) == 1 else {"type": "or", "elements": list(formats)}


def sequence(*formats: Format) -> Format:
    """One after the other."""
    return formats[0] if len(formats) == 1 else {"type": "sequence", "elements": list(formats)}


def tag(begin: str | Marker, content: Format, end: str | Marker) -> Format:
    """`content` between two markers."""
    return {
        "type": "tag",
        "begin": begin.format if isinstance(begin, Marker) else begin,
        "content": content,
        "end": end.format if isinstance(end, Marker) else end,
    }


def arguments_of(tool: Tool) -> Format:
    """Its arguments as JSON."""
    schema = {"type": "json_schema", "json_schema": tool.schema}
    return schema | {"disable_additional_properties": True} if tool.strict else schema


def tags(tags: Sequence[Format], separator: str, *, several: bool) -> Format:
    """At least one of these and, with `several`, more."""
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not several,
    }


def shared(value: Format) -> tuple[Format, dict[str, Format]]:
    """The same with what stands in it several times, as one object, replaced by references.

    Returns:
        The format, and what is referred to.
    """
    counts: dict[int, int] = {}

    def count(one: Any) -> None:
        if isinstance(one, Mapping):
            counts[id(one)] = counts.get(id(one), 0) + 1
            if counts[id(one)] == 1 and one.get("type") not in _LEAVES:
                for inner in one.values():
                    count(inner)
        elif isinstance(one, list):
            for inner in one:
                count(inner)

    definitions: dict[str, Format] = {}
    names: dict[int, str] = {}

    def written(one: Any) -> Any:
        if isinstance(one, list):
            return [written(inner) for inner in one]
        if not isinstance(one, Mapping):
            return one
        if counts.get(id(one), 0) > 1 and one.get("type") in _SHARED and id(one) not in names:
            names[id(one)] = f"d{len(names)}"
            definitions[names[id(one)]] = plain(one)
        return {"type": "ref", "name": names[id(one)]} if id(one) in names else plain(one)

    def plain(one: Format) -> Format:
        return one if one.get("type") in _LEAVES else {name: written(inner) for name, inner in one.items()}

    count(value)
    return written(value), definitions


def text_with_tags(triggers: Sequence[Marker], tags: Sequence[Format], *, several: bool) -> Format:
    """Any text, in which a tag follows where a trigger is written."""
    found = {
        "type": "triggered_tags",
        "triggers": [one.format for one in triggers],
        "tags": list(tags),
        "stop_after_first": not several,
    }
    spelled = [one.text for one in triggers if one.token_id is not None]
    return found | {"excludes": spelled} if spelled else found
