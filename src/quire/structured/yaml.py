"""YAML by a schema: one grammar of Lark's for a JSON Schema, in block style with two spaces a level.

Indentation makes what may follow depend on the depth, so there is a rule for each schema at each depth, as far as
`MAX_DEPTH`; what lies deeper is in flow style (JSON on one line), which depends on no depth. What a rule means:

- `inline`: a value behind `key: ` or `- `, and at the start: a scalar, `{}`, `[]`, a literal block, flow style;
- `lines`: an object or a list in block style, that begins where it stands;
- `flow`: a value in flow style.

Keys must differ (section 3.2.1.3 of YAML 1.2), which no grammar can say of keys that it does not know: `unique.py` sees
to it, where every key can become a longer one. Where a pattern may leave no other key, and where the document is a part
of an answer, there is at most one for each first character, in their order.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_lowercase
from typing import Any

from quire.structured.merging import (
    KEYWORDS,
    Plain,
    Schema,
    Unheld,
    item_at,
    kinds,
    property_of,
)
from quire.structured.source import ESCAPES
from quire.structured.yaml_rules import Rules, Symbol
from quire.structured.yaml_scalars import (
    INTEGER_BOUND,
    KEY_STARTS,
    LONGEST_KEY,
    PLAIN,
    PLAIN_FORMATS,
    SAFE_PATTERN,
    is_endless,
    json_text,
    key_of,
    lark,
    other_keys,
    text_of,
    whole_pattern,
)
from quire.structured_params import MAX_SOURCE_BYTES

MAX_DEPTH = 8
"""Levels in block style, of a schema that needs no more than `MAX_RULES`; others have fewer."""
MAX_RULES = 6000
MAX_TEXT = 4 * MAX_SOURCE_BYTES
MAX_OPTIONAL = 900
"""Keys any of which may come next: llguidance follows at most 2,000 rules at one place, and each key takes two."""
_DEPTHS = (MAX_DEPTH, 6, 4, 3, 2, 1, 0)
FLOW = -1
"""As a depth: flow style."""
_INDENT = "  "


class _TooLarge(Exception):
    """Needs more rules than there may be."""


def grammar(document: Any, matches: Callable[[str, str | None], bool], *, is_whole: bool = True) -> str | None:
    """The grammar of a schema that `source.py` has looked through.

    Args:
        matches: whether a grammar in Lark's notation matches a text; with None, whether it matches any.
        is_whole: whether it is followed from the beginning of the answer to its end, by `unique.py`.

    Returns:
        None if no text satisfies the schema.

    Raises:
        Unheld: a keyword that cannot be held.
    """
    tried = lru_cache(None)(matches)
    for depth in _DEPTHS:
        with suppress(_TooLarge):
            text = _Compiler(document, depth, tried, is_whole).text()
            if text is None or len(text) <= MAX_TEXT:
                return text
    raise Unheld("properties", f"needs more than {MAX_RULES} rules, or {MAX_TEXT} characters of them")


class _Compiler:
    """One grammar, with block style for as many levels as `max_depth`."""

    def __init__(
        self, document: Any, max_depth: int, matches: Callable[[str, str | None], bool], is_whole: bool
    ) -> None:
        self._matches = matches
        self._is_whole = is_whole
        self._plain = Plain(document)
        self._document = document
        self._max_depth = max_depth
        self._rules = Rules()
        self._names: dict[tuple[str, str, int], str] = {}
        self._waiting: list[tuple[str, Any, int, str]] = []

    def text(self) -> str | None:
        self._rules.add("start", (self._rule("inline", self._document, 0),), (self._rule("lines", self._document, 0),))
        while self._waiting:
            kind, schema, depth, name = self._waiting.pop()
            self._fill(kind, schema, depth, name)
            if len(self._rules) > MAX_RULES:
                raise _TooLarge
        return self._rules.text()

    def _rule(self, kind: str, schema: Any, depth: int) -> str:
        """The rule of a schema, which is filled in later."""
        key = (kind, json.dumps(schema), depth)
        if key not in self._names:
            self._names[key] = self._rules.new()
            self._waiting.append((kind, schema, depth, self._names[key]))
        return self._names[key]

    def _fill(self, kind: str, schema: Any, depth: int, name: str) -> None:
        for plain in self._plain.branches(schema):
            if "enum" not in plain:
                for type_name in kinds(plain):
                    self._fill_type(kind, type_name, plain, depth, name)
                continue
            write = json_text if kind == "flow" else text_of
            for value in plain["enum"]:
                if not self._admits(plain, value):
                    continue
                if isinstance(value, list | dict):
                    self._fill_type(kind, _type_of(value), _exactly(value), depth, name)
                elif kind != "lines":
                    self._rules.add(name, (lark(write(value)),))

    def _fill_type(self, kind: str, type_name: str, plain: Schema, depth: int, name: str) -> None:
        add = self._rules.add
        if type_name in ("array", "object"):
            collection = self._array if type_name == "array" else self._object
            if kind != "lines" and _may_be_empty(plain, type_name):
                add(name, ('"[]"' if type_name == "array" else '"{}"',))
            is_flow = kind == "flow" or (kind == "inline" and depth >= self._max_depth)
            if is_flow or (kind == "lines" and depth < self._max_depth):
                inner = collection(plain, FLOW if is_flow else depth)
                mark = ("[", "]") if type_name == "array" else ("{", "}")
                add(name, (lark(mark[0]), inner, lark(mark[1])) if is_flow else (inner,))
        elif kind == "lines":
            return
        elif type_name == "null":
            add(name, ('"null"',))
        elif type_name == "boolean":
            add(name, ('"true"',), ('"false"',))
        elif type_name == "string":
            add(name, *self._string(plain, kind, depth))
        else:
            add(name, *self._number(plain, type_name))

    def _admits(self, plain: Schema, value: Any) -> bool:
        """Whether a value of an `enum` satisfies what is said beside it."""
        name = _type_of(value)
        if name not in kinds(plain) and not (name == "integer" and "number" in kinds(plain)):
            return False
        rest = {word: plain[word] for word in KEYWORDS.get(name, ()) if word in plain}
        if name in ("array", "object") and rest:
            raise Unheld("enum", f"cannot be held beside {next(iter(rest))!r}")
        return not rest or self._matches(
            f"start: %json {json.dumps({'type': name, **rest})}\n", json.dumps(value, ensure_ascii=False)
        )

    def _number(self, plain: Schema, type_name: str) -> Iterator[tuple[Symbol, ...]]:
        """Of free numbers at most 18 digits, of bounded ones those between the bounds: exponents are not written."""
        bounds = {word: plain[word] for word in KEYWORDS[type_name] if word in plain}
        if not bounds:
            yield (type_name.upper(),)
            return
        if not {"maximum", "exclusiveMaximum"} & bounds.keys():
            bounds["maximum"] = INTEGER_BOUND
        if not {"minimum", "exclusiveMinimum"} & bounds.keys():
            bounds["minimum"] = -INTEGER_BOUND
        yield from self._json({"type": type_name, **bounds})

    def _json(self, schema: Schema) -> Iterator[tuple[Symbol, ...]]:
        """A scalar in JSON, if there is one."""
        text = f"%json {json.dumps(schema)}"
        if self._matches(f"start: {text}\n", None):
            yield (self._rules.once(text, (text,)),)

    def _string(self, plain: Schema, kind: str, depth: int) -> Iterator[tuple[Symbol, ...]]:
        said = {word: plain[word] for word in KEYWORDS["string"] if word in plain}
        if said:
            guidance = {"whitespace_flexible": False, "json_allowed_escapes": ESCAPES}
            held = {"type": "string", **said, "allOf": [{"pattern": SAFE_PATTERN}], "x-guidance": guidance}
            yield from self._json(held)
            if kind == "inline" and said.get("format", "email") in PLAIN_FORMATS:
                yield from self._plain_text(said)
            return
        yield ("QUOTED",)
        if kind == "inline":
            yield ("PLAIN",)
            more = self._rules.once(f"block{max(depth, 1)}", (self._rules.next_line(max(depth, 1)), "INDENTED"))
            yield ('"|-"', self._rules.line(max(depth, 1)), "LINE", (more, 0, None))

    def _plain_text(self, said: Schema) -> Iterator[tuple[Symbol, ...]]:
        """A text without quotes, if some is as it is said to be."""
        pattern = whole_pattern(said["pattern"]) if "pattern" in said else "/.*/"
        if pattern is not None:
            least, most = int(said.get("minLength", 0)), said.get("maxLength", "")
            text = f"{PLAIN} & {pattern} & /.{{{least},{most}}}/"
            if "format" in said:
                text += f" & /{PLAIN_FORMATS[said['format']].replace('/', chr(92) + '/')}/"
            if self._matches(f"start: K\nK: {text}\n", None):
                yield (self._rules.terminal(text),)

    def _array(self, plain: Schema, depth: int) -> Symbol:
        """The items of a list that is not empty."""
        rules, least, most = self._rules, int(plain.get("minItems", 0)), plain.get("maxItems")
        between: Symbol = '", "' if depth == FLOW else rules.line(depth)
        num_first = max(len(plain.get("prefixItems", ())), 1)
        whole = rules.new()
        if most is not None and most < 1:
            return whole
        if depth != FLOW:
            rules.starts_line("- ", depth)
        rest, tail = rules.new(), rules.new()
        rules.add(rest, *((between, *item) for item in self._item(item_at(plain, num_first), depth)))
        left = None if most is None else max(int(most) - num_first, 0)
        rules.add(tail, ((rest, max(least - num_first, 0), left),))
        for place in range(num_first - 1, 0, -1):
            longer, tail = tail, rules.new()
            if place >= least:
                rules.add(tail, ())
            if most is None or place < most:
                rules.add(tail, *((between, *item, longer) for item in self._item(item_at(plain, place), depth)))
        rules.add(whole, *((*item, tail) for item in self._item(item_at(plain, 0), depth)))
        return whole

    def _item(self, schema: Any, depth: int) -> list[tuple[Symbol, ...]]:
        if depth == FLOW:
            return [(self._rule("flow", schema, FLOW),)]
        return [('"- "', self._rule(kind, schema, depth + 1)) for kind in ("inline", "lines")]

    def _object(self, plain: Schema, depth: int) -> Symbol:
        """The properties of an object that has some. For each place among the slots, and number of properties before
        it, a rule for the keys that may come from there on, and one for what may follow a value: the break comes before
        the choice of a key, so that behind a value no keys are looked for, of this object and of all around it."""
        rules = self._rules
        slots = [*self._named(plain, depth), *self._others(plain, depth)]
        least, most = max(int(plain.get("minProperties", 0)), 1), plain.get("maxProperties")
        top = least if most is None else int(most)
        runs = "".join(" " if slot.is_required else "o" for slot in slots).split()
        if max(map(len, runs), default=0) > MAX_OPTIONAL:
            raise Unheld("properties", f"cannot be held with more than {MAX_OPTIONAL} keys any of which may come next")
        if len(slots) * top > MAX_RULES:
            raise Unheld("maxProperties" if most is not None else "minProperties", "is too large")
        between: Symbol = '", "' if depth == FLOW else rules.line(depth)
        if depth != FLOW and least > 1:
            for letter in ascii_lowercase[:least]:  # keys that no schema names may be needed
                rules.starts_line(f"{letter}:", depth)
        keys = [rules.new() for _ in range(top + 1)]
        ends = [rules.new() for _ in range(top + 1)]
        for end in ends[least:]:
            rules.add(end, ())
        may_end = True
        for slot in reversed(slots):
            may_end = may_end and not slot.is_required
            later_keys, later_ends = keys, ends
            keys, ends = [rules.new() for _ in keys], [rules.new() for _ in ends]
            values = [(key, self._value(value, depth)) for key, value in slot.pairs]
            for count, (key_rule, end) in enumerate(zip(keys, ends, strict=True)):
                if count < top or most is None:
                    rest = (ends if slot.is_repeated else later_ends)[min(count + 1, top)]
                    rules.add(key_rule, *((key, value, rest) for key, value in values))
                    rules.add(end, (between, key_rule))
                if not slot.is_required:
                    rules.add(key_rule, (later_keys[count],))
                if may_end and count >= least:
                    rules.add(end, ())
        return keys[0]

    def _value(self, schema: Any, depth: int) -> Symbol:
        """What comes behind a key."""
        if depth == FLOW:
            return self._rule("flow", schema, FLOW)
        inline, lines = (self._rule(kind, schema, depth + 1) for kind in ("inline", "lines"))
        return self._rules.once(f"{inline} {lines}", ('" "', inline), (self._rules.line(depth + 1), lines))

    def _named(self, plain: Schema, depth: int) -> "Iterator[_Slot]":
        required = plain.get("required", ())
        for name in dict.fromkeys([*plain.get("properties", ()), *required]):
            text = f"{json_text(name)}: " if depth == FLOW else f"{key_of(name)}:"
            if len(text) > LONGEST_KEY:
                raise Unheld("properties", f"cannot be held with keys of more than {LONGEST_KEY} characters")
            if depth != FLOW:
                self._rules.starts_line(text, depth, first=name in required)
            yield _Slot([(lark(text), property_of(plain, name))], is_required=name in required)

    def _others(self, plain: Schema, depth: int) -> "Iterator[_Slot]":
        """Keys that are not named: those of one `patternProperties` alone, or of none."""
        named = [*plain.get("properties", {}), *plain.get("required", ())]
        groups: list[tuple[str | None, Any]] = [(None, plain.get("additionalProperties", True))]
        for pattern, schema in plain.get("patternProperties", {}).items():
            inside = whole_pattern(pattern)
            if inside is None:
                raise Unheld("patternProperties", f"cannot be held with the pattern {pattern[:80]!r}")
            groups.append((inside, schema))
        patterns = plain.get("patternProperties", {}).items()
        are_free = self._is_whole and all(
            is_endless(pattern) and self._plain.branches(schema) for pattern, schema in patterns
        )
        for start in (None,) if are_free else KEY_STARTS:
            pairs: list[tuple[Symbol, Any]] = []
            for inside, schema in groups:
                outside = [other for other, _ in groups if other is not None and other != inside]
                block, flow = other_keys(start, named, inside, outside)
                if schema is not False and (len(groups) == 1 or self._matches(f"start: K\nK: {flow}\n", None)):
                    pairs.append((self._rules.terminal(flow if depth == FLOW else block), schema))
            yield _Slot(pairs, is_repeated=start is None)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place among the properties of an object: keys with the schemas of their values."""

    pairs: Sequence[tuple[Symbol, Any]]
    is_required: bool = False
    is_repeated: bool = False


def _may_be_empty(plain: Schema, type_name: str) -> bool:
    if type_name == "array":
        return int(plain.get("minItems", 0)) < 1
    return not plain.get("required") and int(plain.get("minProperties", 0)) < 1


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if value == int(value) else "number"
    names: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _exactly(value: Any) -> Schema:
    """The plain schema of one list or object."""
    if isinstance(value, list):
        items = [{"const": item} for item in value]
        return {"prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    properties = {name: {"const": item} for name, item in value.items()}
    return {"properties": properties, "required": [*value], "additionalProperties": False}
