"""A JSON Schema without references and combinations: the plain schemas one of which a value satisfies.

A plain schema holds no `$ref`, `allOf`, `anyOf` and `oneOf` of its own; those of its properties and items are left for
when they are asked for. That the branches of a `oneOf` exclude each other was seen before (`source.py`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any]
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("prefixItems", "items", "minItems", "maxItems"),
    "object": (
        *("properties", "patternProperties", "additionalProperties"),
        *("required", "minProperties", "maxProperties"),
    ),
}
"""What is said of values of a type; nothing else is read."""
_READ = frozenset(("type", "enum", *(word for words in KEYWORDS.values() for word in words)))
_UNHELD = (
    *("not", "if", "contains", "uniqueItems", "propertyNames", "dependentRequired", "dependentSchemas"),
    *("dependencies", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
)
_LARGER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_SMALLER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
MAX_BRANCHES = 256


class Unheld(Exception):
    """A keyword that cannot be held, or can only be held otherwise."""

    def __init__(self, keyword: str, why: str) -> None:
        super().__init__(keyword, why)
        self.keyword, self.why = keyword, why


class Plain:
    """Makes the schemas of one document plain."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._known: dict[str, list[Schema]] = {}

    def branches(self, schema: Any) -> list[Schema]:
        """The plain schemas, one of which a value satisfies that satisfies `schema`; none if no value does.

        Raises:
            Unheld: a keyword that cannot be held.
        """
        text = json.dumps(schema)
        if text not in self._known:
            self._known[text] = self._branches(schema, ())
        return self._known[text]

    def _branches(self, schema: Any, followed: tuple[str, ...]) -> list[Schema]:
        if isinstance(schema, bool):
            return [{}] if schema else []
        for word in _UNHELD:
            if word in schema and (word, schema[word]) != ("uniqueItems", False):
                raise Unheld(word, "cannot be held")
        parts: list[tuple[str, list[Schema]]] = [] if "properties" in schema else [("type", [_read(schema)])]
        for word, value in schema.items():  # in their order, which is that of the properties
            if word == "properties":
                parts.append((word, [_read(schema)]))
            elif word == "allOf":
                parts += [(word, self._branches(one, followed)) for one in value]
            elif word in ("anyOf", "oneOf"):
                parts.append((word, [plain for one in value for plain in self._branches(one, followed)]))
            elif word == "$ref":
                if value in followed:
                    raise Unheld(word, "leads back to itself")
                parts.append((word, self._branches(self._target(value), (*followed, value))))
        found: list[Schema] = [{}]
        for word, others in parts:
            if len(found) * len(others) > MAX_BRANCHES:
                raise Unheld(word, f"makes more than {MAX_BRANCHES} combinations")
            found = [both for one in found for other in others if (both := _both(one, other)) is not None]
        return found

    def _target(self, reference: str) -> Any:
        if not reference.startswith("#") or (len(reference) > 1 and reference[1] != "/"):
            raise Unheld("$ref", f"can be held where it is a path in the schema, not with the value {reference[:80]!r}")
        at = self._document
        for part in unquote(reference[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                at = at[int(part)] if isinstance(at, list) else at[part]
            except (KeyError, ValueError, IndexError, TypeError):
                raise Unheld("$ref", f"leads nowhere with the value {reference[:80]!r}") from None
        return at


def _read(schema: Mapping[str, Any]) -> Schema:
    """What is read of a schema, in one form whatever the draft."""
    found = {word: value for word, value in schema.items() if word in _READ}
    if "const" in schema:
        found["enum"] = [value for value in found.get("enum", [schema["const"]]) if is_equal(value, schema["const"])]
    if isinstance(found.get("type"), str):
        found["type"] = [found["type"]]
    if isinstance(found.get("items"), list):  # draft 7
        found["prefixItems"] = found["items"]
        found["items"] = schema.get("additionalItems", True)
    return found


def _both(one: Schema, other: Schema) -> Schema | None:
    """A plain schema of what satisfies both; None if nothing does, as far as is seen."""
    found = {**one, **other}
    for word in one.keys() & other.keys():
        left, right = one[word], other[word]
        if word in _LARGER or word in _SMALLER:
            found[word] = max(left, right) if word in _LARGER else min(left, right)
        elif word == "type":
            found[word] = _types(left, right)
            if not found[word]:
                return None
        elif word == "enum":
            found[word] = [value for value in left if any(is_equal(value, same) for same in right)]
            if not found[word]:
                return None
        elif word == "required":
            found[word] = list(dict.fromkeys([*left, *right]))
        elif word in ("multipleOf", "pattern", "format") and left != right:
            raise Unheld(word, "cannot be held twice")
    if {"prefixItems", "items"} & one.keys() and {"prefixItems", "items"} & other.keys():
        width = max(len(one.get("prefixItems", ())), len(other.get("prefixItems", ())))
        found["prefixItems"] = [all_of(item_at(one, place), item_at(other, place)) for place in range(width)]
        found["items"] = all_of(one.get("items", True), other.get("items", True))
    named = ("properties", "patternProperties", "additionalProperties")
    if any(word in one for word in named) and any(word in other for word in named):
        found |= _objects(one, other)
    return found


def _types(left: list[str], right: list[str]) -> list[str]:
    found = [name for name in left if name in right]
    if "integer" not in found and (
        ("integer" in left and "number" in right) or ("number" in left and "integer" in right)
    ):
        found.append("integer")
    return found


def _objects(one: Schema, other: Schema) -> Schema:
    names = dict.fromkeys([*one.get("properties", {}), *other.get("properties", {})])
    patterns = dict.fromkeys([*one.get("patternProperties", {}), *other.get("patternProperties", {})])
    rest = [schema.get("additionalProperties", True) for schema in (one, other)]
    return {
        "properties": {name: all_of(property_of(one, name), property_of(other, name)) for name in names},
        "patternProperties": {
            pattern: all_of(
                *(
                    schema.get("patternProperties", {}).get(pattern, default)
                    for schema, default in zip((one, other), rest, strict=True)
                )
            )
            for pattern in patterns
        },
        "additionalProperties": all_of(*rest),
    }


def property_of(schema: Schema, name: str) -> Any:
    """What a plain schema says of a property."""
    found = [schema["properties"][name]] if name in schema.get("properties", {}) else []
    found += [value for pattern, value in schema.get("patternProperties", {}).items() if matches(pattern, name)]
    return all_of(*found) if found else schema.get("additionalProperties", True)


def item_at(schema: Schema, place: int) -> Any:
    """What it says of an item."""
    first = schema.get("prefixItems", ())
    return first[place] if place < len(first) else schema.get("items", True)


def matches(pattern: str, name: str) -> bool:
    """Whether a key is one of a `patternProperties`."""
    try:
        return re.search(pattern, name, re.ASCII) is not None
    except (re.error, RecursionError):
        raise Unheld("patternProperties", f"cannot be held with the pattern {pattern[:80]!r}") from None


def all_of(*schemas: Any) -> Any:
    """A schema of what satisfies all of them."""
    parts: list[Any] = []
    for schema in schemas:
        if schema is False:
            return False
        if schema is not True and schema != {} and schema not in parts:
            parts.append(schema)
    return True if not parts else parts[0] if len(parts) == 1 else {"allOf": parts}


def is_equal(one: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and no `true`."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_equal(one[name], other[name]) for name in one)
    return (type(one) is type(other) and one == other) or _numbers(one, other)


def _numbers(one: Any, other: Any) -> bool:
    return isinstance(one, int | float) and isinstance(other, int | float) and one == other


def kinds(schema: Schema) -> Iterator[str]:
    """The types that a plain schema allows, each once: an integer is a number."""
    allowed = schema.get("type", [name for name in TYPES if name != "integer"])
    yield from (name for name in TYPES if name in allowed and not (name == "integer" and "number" in allowed))
