"""Structural tags become one grammar: text, and between markers in it what a schema, an expression or a grammar holds.

XGrammar's forms (https://xgrammar.mlc.ai, "Structural Tag"), the older one of `structures` and `triggers` among them.
What is ours: tokens (by id, as in its form `token`) in `triggers`; of `json_schema` `disable_additional_properties`,
`disable_any_whitespace`, `whitespace_pattern` (those of the whole shape where it says nothing) and the styles
`python`, `gemma` (with `escape`) and `yaml`; a whole tag as a format of another; beside `format` the keys
`definitions`, formats by name to which the form `ref` refers, and `reasoning`, a bound on the tokens between two
markers at the beginning of the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quire.structured.parameters import STYLES, parameters_of
from quire.structured.samples import EXTRAS
from quire.structured.source import (
    checked_schema,
    is_expression,
    json_options,
    lark_of,
    options_of,
    refusal,
    yaml_grammar,
)
from quire.structured.yaml_scalars import lark
from quire.structured_params import MAX_NESTING, MAX_PATTERN_BYTES, StructuredOutputsParams

MAX_TOKEN_ID = 2**24
MAX_REASONING_TOKENS = 2**24
_TOKEN = re.compile(r"<\[(\d+)\]>")
_ANY = "/(?s:.*)/"
_WHITE = ("disable_any_whitespace", "whitespace_pattern")
_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "const_string": (("value",), ()),
    "token": (("token",), ()),
    "ref": (("name",), ()),
    "any_text": ((), ("excludes",)),
    "structural_tag": ((), ("format", "structures", "triggers")),
    "json_schema": (("json_schema",), ("style", "escape", "disable_additional_properties", *_WHITE)),
    "qwen_xml_parameter": (("json_schema",), ("disable_additional_properties",)),
    "regex": (("pattern",), ()),
    "grammar": (("grammar",), ()),
    "sequence": (("elements",), ()),
    "or": (("elements",), ()),
    "tag": (("begin", "content", "end"), ()),
    "triggered_tags": (("triggers", "tags"), ("at_least_one", "stop_after_first", "excludes")),
    "tags_with_separator": (("tags", "separator"), ("at_least_one", "stop_after_first")),
}
"""Type -> the keys that it must have, and may have."""
_TAKE_ENDS = ("any_text", "triggered_tags", "structural_tag")
"""Types that contain the markers which follow them: where they stand decides what the text before them may be."""
_LISTS = ("elements", "tags", "triggers", "excludes")
_FLAGS = ("at_least_one", "stop_after_first", "disable_additional_properties", "disable_any_whitespace")
_STRINGS = ("name", "value", "pattern", "grammar", "separator", "whitespace_pattern")


def source_of_tag(params: StructuredOutputsParams) -> str:
    """The grammar of `params.structural_tag`, with what is no grammar beside it.

    Raises:
        InvalidRequestError: an unknown form, key or value, with its place.
    """
    assert isinstance(params.structural_tag, str)
    try:
        value = json.loads(params.structural_tag)
    except (ValueError, RecursionError) as error:
        raise _bad("", f"is no JSON: {str(error)[:200]}") from None
    if not isinstance(value, Mapping):
        raise _bad("", f"must be an object, not {type(value).__name__}")
    if not isinstance(value.get("definitions", {}), Mapping):
        raise _bad("/definitions", "must be an object of formats")
    writer = _Writer(params, value.get("definitions", {}), options_of(params))
    start = writer.expression(_format_of(value), "/format", is_last=True)
    extras = {"may_be_cut": writer.has_free_end, "ends": [*{**writer.ends, **writer.begins}]}
    if value.get("reasoning") is not None:
        extras["reasoning"] = _reasoning(value["reasoning"])
    text = "\n".join([f"start: {start}", *writer.rules])
    return json.dumps({"grammars": [{"lark_grammar": text}, *writer.grammars], EXTRAS: extras}, ensure_ascii=False)


def without_token_ids(source: str) -> str:
    """With ids that a vocabulary of bytes has, for compiling without the model's."""
    return _TOKEN.sub(lambda found: f"<[{256 + int(found[1]) % 5}]>", source)


def _bad(place: str, text: str) -> Exception:
    return refusal("structural_tag", f"{text}{f' at #{place}' if place else ''}")


def _format_of(value: Mapping[str, Any]) -> Any:
    """The format of either form."""
    is_older = "structures" in value or "triggers" in value
    known = ("type", "structures", "triggers") if is_older else ("type", "format", "definitions", "reasoning")
    for name in value:
        if name not in known:
            raise _bad("", f"has the unknown key {name!r}")
    if value.get("type", "structural_tag") != "structural_tag":
        raise _bad("/type", "must be 'structural_tag'")
    if not is_older:
        if "format" not in value:
            raise _bad("", "needs a format, or structures and triggers")
        return value["format"]
    structures = value.get("structures")
    if not isinstance(structures, list) or not all(
        isinstance(one, Mapping) and one.keys() == {"begin", "schema", "end"} for one in structures
    ):
        raise _bad("/structures", "must be objects of begin, schema and end")
    tags = [
        {"begin": one["begin"], "content": {"type": "json_schema", "json_schema": one["schema"]}, "end": one["end"]}
        for one in structures
    ]
    return {"type": "triggered_tags", "triggers": value.get("triggers"), "tags": tags}


def _reasoning(value: Any) -> dict[str, Any]:
    """The bound on reasoning, checked."""
    place = "/reasoning"
    if not isinstance(value, Mapping) or value.keys() != {"begin", "end", "max_tokens"}:
        raise _bad(place, "must be an object of begin, end and max_tokens")
    most = value["max_tokens"]
    if type(most) is not int or not 0 <= most <= MAX_REASONING_TOKENS:
        raise _bad(f"{place}/max_tokens", f"must be an integer from 0 to {MAX_REASONING_TOKENS}")
    begin, end = (_mark(value[name], f"{place}/{name}") for name in ("begin", "end"))
    if end == "":
        raise _bad(f"{place}/end", "must not be empty")
    return {"begin": begin, "end": end, "max_tokens": most}


def _mark(value: Any, place: str) -> str | int:
    """A text, or a special token's id."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value.keys() == {"type", "token"} and value["type"] == "token":
        token = value["token"]
        if type(token) is int and 0 <= token <= MAX_TOKEN_ID:
            return token
    raise _bad(place, "must be text, or a token by its id")


@dataclass(slots=True)
class _Writer:
    """Writes the rules of one grammar."""

    params: StructuredOutputsParams
    definitions: Mapping[str, Any]
    options: Mapping[str, Any]
    """How JSON is written where a format does not say it."""
    rules: list[str] = field(default_factory=list)
    grammars: list[dict[str, str]] = field(default_factory=list)
    ends: dict[str | int, None] = field(default_factory=dict)
    """Markers behind free text, and behind what may be repeated: a completion goes by them."""
    begins: dict[str | int, None] = field(default_factory=dict)
    """Special tokens that begin a part."""
    has_free_end: bool = False
    """Whether the answer may be any text where it ends."""
    _known: dict[str, str] = field(default_factory=dict)
    _written: dict[tuple[str, bool], str] = field(default_factory=dict)
    """Definitions."""
    _depth: int = 0

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a rule of this body."""
        if re.fullmatch(r"\w+", body):
            return body
        return self._named(f"{attributes}: {body}", "r")

    def terminal(self, body: str) -> str:
        """The name of a terminal of this body."""
        return self._named(f": {body}", "T")

    def _named(self, definition: str, letter: str) -> str:
        name = self._known.get(definition)
        if name is None:
            name = self._known[definition] = f"{letter}{len(self._known)}"
            self.rules.append(name + definition)
        return name

    def expression(self, value: Any, place: str, *, is_last: bool, end: Sequence[str | int] = ()) -> str:
        """A format as an expression of Lark.

        Args:
            is_last: whether nothing follows, so that text may be free to the end.
            end: the markers that follow, one of which the expression is to contain.
        """
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise _bad("", f"may be nested at most {MAX_NESTING} deep")
        kind = _checked(value, place)
        if kind in _TAKE_ENDS:
            found = getattr(self, f"_{kind}")(value, place, is_last, end)
        elif kind in ("sequence", "or", "tag", "tags_with_separator", "ref"):
            found = getattr(self, f"_{kind}")(value, place, is_last)
        else:
            found = getattr(self, f"_{kind}")(value, place)
        if end and kind not in _TAKE_ENDS:
            found = f"{self.rule(found)} {self.either(end)}"
        self._depth -= 1
        return self.rule(found)

    def either(self, marks: Sequence[str | int]) -> str:
        """One of these marks."""
        found = [f"<[{one}]>" if isinstance(one, int) else lark(one) for one in marks if one != ""]
        return found[0] if len(found) == 1 else f"({' | '.join(found)})" if found else '""'

    def free_text(self, excludes: Sequence[str]) -> str:
        """A terminal: any text that holds none of `excludes`."""
        if not excludes:
            return self.terminal(_ANY)
        texts = "|".join(_regex_text(one) for one in sorted(set(excludes)))
        return self.terminal(f"{_ANY} & ~/(?s:.*)({texts})(?s:.*)/")

    def text_until(self, marks: Sequence[str | int], excludes: Sequence[str]) -> str:
        """Any text, and the first of `marks` in it."""
        text = self.free_text(excludes)
        written = [one for one in marks if isinstance(one, str)]
        found = [f"{text} <[{one}]>" for one in marks if isinstance(one, int)]
        if written:
            found.append(self.rule(f"{text} {self.either(written)}", "[lazy]"))
        return self.rule(" | ".join(found))

    def raw_text(self, least: int, most: int | None, end: str | int, never: str) -> str:
        """Text of so many characters and the mark behind it; it holds neither that nor `never`."""
        self.ends[end] = None
        if not least and most is None and isinstance(end, str):
            return self.text_until([end], [])
        size = f"{{{least},{'' if most is None else most}}}" if least or most is not None else "*"
        text = self.terminal(f"/(?s:.{size})/ & ~/(?s:.*)({_regex_text(never)})(?s:.*)/")
        is_text = isinstance(end, str)
        return self.rule(f"{text} {self.either([end])}", "[lazy]" if is_text else "")

    def _any_text(self, value: Mapping[str, Any], place: str, is_last: bool, end: Sequence[str | int]) -> str:
        excludes = value.get("excludes", [])
        if end and "" not in end:
            self.ends.update(dict.fromkeys(end))
            return self.text_until(end, excludes)
        if not is_last:
            raise _bad(place, "may be followed by nothing but the end of its tag: any_text")
        self.has_free_end = True
        return self.free_text(excludes)

    def _structural_tag(self, value: Mapping[str, Any], place: str, is_last: bool, end: Sequence[str | int]) -> str:
        return self.expression(_format_of(value), f"{place}/format", is_last=is_last, end=end)

    def _triggered_tags(self, value: Mapping[str, Any], place: str, is_last: bool, end: Sequence[str | int]) -> str:
        excludes = value.get("excludes", [])
        triggers = [_mark(one, f"{place}/triggers/{index}") for index, one in enumerate(value["triggers"])]
        if not triggers or "" in triggers:
            raise _bad(f"{place}/triggers", "must be texts that are not empty, or tokens")
        rests: dict[str | int, list[str]] = {one: [] for one in triggers}
        tags = []
        for index, tag in enumerate(value["tags"]):
            at = f"{place}/tags/{index}"
            _checked(tag, at, "tag")
            begin = _mark(tag["begin"], f"{at}/begin")
            trigger = _trigger_of(begin, triggers)
            if trigger is None:
                raise _bad(f"{at}/begin", "must begin with exactly one of the triggers")
            rest = begin[len(trigger) :] if isinstance(begin, str) and isinstance(trigger, str) else ""
            inner = self._tag({**tag, "begin": rest}, at, is_last and bool(value.get("stop_after_first")))
            rests[trigger].append(inner)
            tags.append(f"{self.either([begin])} {self._tag({**tag, 'begin': ''}, at, False)}")
        used = [one for one in triggers if rests[one]]
        several = [self.rule(f"{self.text_until([one], excludes)} ({' | '.join(rests[one])})") for one in used]
        tail = self._any_text({"excludes": excludes}, place, is_last, end)
        any_tag, first = self.rule(" | ".join(several)), self.rule(" | ".join(tags))
        after = self.either(end) if end else ""
        if value.get("stop_after_first"):
            one_tag = first if value.get("at_least_one") else any_tag
            return f"{one_tag} {after}".strip() + ("" if value.get("at_least_one") else f" | {tail}")
        return f"{first if value.get('at_least_one') else ''} {any_tag}* {tail}"

    def _tags_with_separator(self, value: Mapping[str, Any], place: str, is_last: bool) -> str:
        ends_after_first = bool(value.get("stop_after_first"))
        tags = [
            self.expression(tag, f"{place}/tags/{index}", is_last=is_last and ends_after_first)
            for index, tag in enumerate(_all_tags(value["tags"], place))
        ]
        one = self.rule(" | ".join(tags))
        several = one if ends_after_first else f"{one} ({self.either([value['separator']])} {one})*"
        return several if value.get("at_least_one") else f"({several})?"

    def _tag(self, value: Mapping[str, Any], place: str, is_last: bool) -> str:
        begin = _mark(value["begin"], f"{place}/begin")
        ends = value["end"] if isinstance(value["end"], list) else [value["end"]]
        end = [_mark(one, f"{place}/end") for one in ends]
        if not end:
            raise _bad(f"{place}/end", "must be text, a token, or a list that is not empty")
        inner = self.expression(value["content"], f"{place}/content", is_last=is_last and "" in end, end=end)
        if isinstance(begin, int):
            self.begins[begin] = None
        if value["content"].get("type") in ("tags_with_separator", "sequence"):
            self.ends.update((one, None) for one in end if one != "")
        return self.rule(inner if begin == "" else f"{self.either([begin])} {inner}")

    def _sequence(self, value: Mapping[str, Any], place: str, is_last: bool) -> str:
        parts, last = value["elements"], len(value["elements"]) - 1
        return " ".join(
            self.expression(one, f"{place}/elements/{index}", is_last=is_last and index == last)
            for index, one in enumerate(parts)
        )

    def _or(self, value: Mapping[str, Any], place: str, is_last: bool) -> str:
        parts = enumerate(value["elements"])
        return " | ".join(self.expression(one, f"{place}/elements/{index}", is_last=is_last) for index, one in parts)

    @staticmethod
    def _const_string(value: Mapping[str, Any], place: str) -> str:
        return lark(value["value"])

    def _ref(self, value: Mapping[str, Any], place: str, is_last: bool) -> str:
        name = value["name"]
        if name not in self.definitions:
            raise _bad(f"{place}/name", f"the definition {name!r} is missing")
        known = self._written.get((name, is_last))
        if known is None:
            known = self.expression(self.definitions[name], f"/definitions/{name}", is_last=is_last)
            self._written[name, is_last] = known
        return known

    def _token(self, value: Mapping[str, Any], place: str) -> str:
        return self.either([_mark(value, place)])

    @staticmethod
    def _regex(value: Mapping[str, Any], place: str) -> str:
        from llguidance import regex_to_lark

        return f"/{regex_to_lark(value['pattern'], 'd')}/" if value["pattern"] else '""'

    def _grammar(self, value: Mapping[str, Any], place: str) -> str:
        return self._other(lark_of(value["grammar"], "structural_tag"))

    def _other(self, text: str) -> str:
        """A grammar of its own."""
        name = f"g{len(self.grammars)}"
        self.grammars.append({"name": name, "lark_grammar": text})
        return f"@{name}"

    def _json_schema(self, value: Mapping[str, Any], place: str) -> str:
        style = value.get("style", "json")
        if style == "json":
            return self.json(self._schema(value, place), _white(value, place))
        for name in _WHITE:
            if name in value:
                raise _bad(f"{place}/{name}", f"belongs to the style json, not to {style}")
        if style == "yaml":
            return self._other(yaml_grammar(self._schema(value, place), self.params, f"#{place}/json_schema"))
        if style not in STYLES:
            raise _bad(f"{place}/style", f"must be one of json, yaml, {', '.join(STYLES)}")
        found = STYLES[style]
        if "escape" in value:
            escape = _mark(value["escape"], f"{place}/escape")
            found = replace(found, raw=(escape, escape))
        return parameters_of(self, found, self._schema(value, place), _bad, f"{place}/json_schema")

    def json(self, schema: Any, options: Mapping[str, Any] | None = None) -> str:
        """JSON that a checked schema holds; `options` as `json_options` gives them, None for those of the shape."""
        return f"%json {json.dumps({**schema, 'x-guidance': self.options if options is None else options})}"

    def _qwen_xml_parameter(self, value: Mapping[str, Any], place: str) -> str:
        return self._json_schema({**value, "style": "qwen_xml"}, place)

    def _schema(self, value: Mapping[str, Any], place: str) -> Any:
        is_closed = value.get("disable_additional_properties", self.params.disable_additional_properties)
        is_yaml, root = value.get("style") == "yaml", f"#{place}/json_schema"
        return checked_schema(value["json_schema"], "structural_tag", is_closed=is_closed, is_yaml=is_yaml, root=root)


def _white(value: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    """What a format says of its white space; None if nothing."""
    if not any(name in value for name in _WHITE):
        return None
    is_tight, pattern = value.get("disable_any_whitespace", False), value.get("whitespace_pattern")
    if pattern is not None and (is_tight or not 0 < len(pattern.encode()) <= MAX_PATTERN_BYTES):
        why = "says what disable_any_whitespace excludes" if is_tight else f"may have 1 to {MAX_PATTERN_BYTES} bytes"
        raise _bad(f"{place}/whitespace_pattern", why)
    if not is_expression(pattern):
        raise _bad(f"{place}/whitespace_pattern", "is no regular expression that can be held")
    return json_options(pattern, is_tight=is_tight)


def _all_tags(tags: Sequence[Any], place: str) -> Sequence[Any]:
    for index, tag in enumerate(tags):
        _checked(tag, f"{place}/tags/{index}", "tag")
    return [{"type": "tag", **tag} for tag in tags]


def _trigger_of(begin: str | int, triggers: Sequence[str | int]) -> str | int | None:
    found = [
        one
        for one in triggers
        if one == begin or (isinstance(one, str) and isinstance(begin, str) and begin.startswith(one))
    ]
    return found[0] if len(found) == 1 else None


def _checked(value: Any, place: str, default: str | None = None) -> str:
    """The type of a format whose keys and their types are right."""
    if not isinstance(value, Mapping):
        raise _bad(place, "a format must be an object")
    kind = value.get("type", default)
    if kind not in _KEYS or (default is not None and kind != default):
        raise _bad(f"{place}/type", f"must be one of {', '.join([default] if default else _KEYS)}")
    needed, others = _KEYS[kind]
    for name in needed:
        if name not in value:
            raise _bad(place, f"{kind} needs {name!r}")
    for name, inner in value.items():
        if name != "type" and name not in needed and name not in others:
            raise _bad(place, f"{kind} has the unknown key {name!r}")
        if name in _LISTS and (not isinstance(inner, list) or not (inner or name == "excludes")):
            raise _bad(f"{place}/{name}", "must be a list that is not empty")
        if name in _FLAGS and type(inner) is not bool:
            raise _bad(f"{place}/{name}", "must be true or false")
        if name in _STRINGS and not isinstance(inner, str):
            raise _bad(f"{place}/{name}", "must be text")
        if name == "excludes" and not all(isinstance(one, str) and one for one in inner):
            raise _bad(f"{place}/{name}", "must hold texts that are not empty")
    return str(kind)


def _regex_text(text: str) -> str:
    """An expression that is `text`, inside slashes."""
    return re.sub(r"[\\.+*?()|\[\]{}^$/#&~-]", r"\\\g<0>", text).replace("\n", "\\n")
