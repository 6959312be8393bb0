"""From what a caller asks for to the one text that is compiled: a grammar in llguidance's notation.

A schema stays a schema, which llguidance compiles itself; a regular expression and choices become grammars of one rule;
GBNF becomes Lark. What cannot be held is refused, by name and place: no keyword is ignored.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from quire.errors import InvalidRequestError
from quire.structured_params import FIELD, MAX_NESTING, StructuredOutputsParams

WHITESPACE = " ?"
"""Between tokens of JSON, unless the caller says: a model that may break lines and indent is easily lost in it."""
ESCAPES = '"\\\\bfnrt'
"""What may follow a backslash. One that stands for a character that is written plainly would make two keys of one."""
LARGEST_EXACT = 2**53
"""llguidance compares numbers as doubles."""
_GBNF_RULE = re.compile(r"^\s*[A-Za-z][\w-]*\s*::=", re.MULTILINE)
_UNHELD = re.compile(r"Unimplemented keys: (\[.*\])")
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)")
_KEYWORD_OF = (
    (re.compile("oneOf constraints are not supported()"), "oneOf", "cannot be held: its schemas may overlap"),
    (re.compile("Resource '(.*)' is not present"), "$ref", "cannot be held: it refers to another document"),
    (re.compile("Pointer '(.*)' does not exist"), "$ref", "refers to nothing"),
    (re.compile("Invalid type: (.*)"), "type", "names no type"),
    (re.compile(r"regex parse error:\n +(.*)\n"), "pattern", "cannot be held"),
    (re.compile(r"regex parse error:\n +(.*)\n"), "patternProperties", "cannot be held"),
)
"""What llguidance says without a place, the keyword whose value holds what it says, and what that means."""
FORMATS = frozenset(
    (
        "date-time date time duration email idn-email hostname idn-hostname ipv4 ipv6 uri uri-reference iri "
        "iri-reference uuid uri-template json-pointer relative-json-pointer regex"
    ).split()
)
"""Of draft 2020-12; draft 7 has no others."""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_VALUES = ("const", "enum", "default", "examples")
"""Keywords that hold values, in which nothing is a schema."""
_IN_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that map names to schemas."""


def refusal(field: str | None, text: str) -> InvalidRequestError:
    """An error about one field of `structured_outputs`."""
    return InvalidRequestError(f"{FIELD}{f'.{field}' if field else ''}: {text}", param=FIELD)


def source_of(params: StructuredOutputsParams) -> str:
    """The grammar of `params`; `validate` says whether it is one.

    Raises:
        InvalidRequestError: a schema that is none, or nested too deep; a grammar in GBNF that is none.
    """
    from llguidance import LLMatcher, regex_to_lark

    if params.json is not None or params.json_object:
        return _json(_schema(params), options_of(params))
    if params.yaml is not None:
        return LLMatcher.grammar_from_lark(yaml_grammar(_schema(params), params))
    if params.regex is not None:
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(params.regex, 'd')}/")
    if params.choice is not None:
        assert not isinstance(params.choice, type)
        from quire.structured.yaml_scalars import lark

        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(lark, params.choice)))
    if params.structural_tag is not None:
        from quire.structured.structural_tag import source_of_tag

        return source_of_tag(params)
    assert params.grammar is not None
    return LLMatcher.grammar_from_lark(lark_of(params.grammar, "grammar"))


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is in llama.cpp's notation; otherwise it is Lark's."""
    return _GBNF_RULE.search(grammar) is not None


def validate(source: str, params: StructuredOutputsParams) -> None:
    """Compile `source` over a vocabulary of bytes, and ask what may come first.

    Raises:
        InvalidRequestError: it does not compile, holds a keyword that cannot be held (with the keyword's place), or
            holds no text at all.
    """
    from llguidance import LLMatcher, LLTokenizer

    if params.structural_tag is not None:
        from quire.structured.structural_tag import without_token_ids

        source = without_token_ids(source)
    matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0, limits=limits())
    if matcher.is_error():
        raise refusal(params.kind, _explained(matcher.get_error(), params))
    if not any(matcher.compute_bitmask()) or matcher.is_error():
        raise refusal(params.kind, "no text satisfies it, or what may come first takes too long to say")


def limits() -> Any:
    """What compiling and following one grammar may take, as llguidance counts it: some 20 ms for the first automata,
    15 ms and 20,000 items for one token."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=20_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _schema(params: StructuredOutputsParams) -> Any:
    if params.json_object:
        schema: Any = {"type": "object"}
    else:
        text = params.json if params.yaml is None else params.yaml
        assert isinstance(text, str)
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise refusal(params.kind, f"is no JSON: {str(error)[:200]}") from None
    is_yaml = params.yaml is not None
    return checked_schema(schema, params.kind, is_closed=params.disable_additional_properties, is_yaml=is_yaml)


def checked_schema(
    schema: Any, field: str, *, is_closed: bool, is_yaml: bool = False, root: str = "#"
) -> Mapping[str, Any]:
    """A schema as it is compiled.

    Args:
        field: of `structured_outputs` in which it stands, and `root` the place there.
        is_closed: whether its objects hold the named properties alone.
        is_yaml: whether the answer is YAML, where no key comes twice.

    Raises:
        InvalidRequestError: it is none, or says what cannot be held.
    """
    if not isinstance(schema, Mapping | bool):
        raise refusal(field, f"a schema is an object, true or false, not {type(schema).__name__}")
    if schema is False:
        raise refusal(field, "no text satisfies the schema false")
    schema = {} if schema is True else schema
    if _is_deeper(schema, MAX_NESTING):
        raise refusal(field, f"may be nested at most {MAX_NESTING} deep")
    for place, keywords in _schemas(schema, root):
        if "x-guidance" in keywords:
            raise refusal(field, f"the keyword 'x-guidance' at {place} is not honoured: use the fields of {FIELD}")
        for keyword in _not_held_exactly(keywords):
            if is_yaml and keyword == "minProperties":
                continue
            raise refusal(field, f"the keyword {keyword!r} at {place} cannot be held with this value")
    held: Mapping[str, Any] = _map_schemas(schema, _without_unknown_format)
    return _map_schemas(held, _closed) if is_closed else held


def options_of(params: StructuredOutputsParams) -> dict[str, Any]:
    """How JSON is written under `params`.

    Raises:
        InvalidRequestError: `whitespace_pattern` is no expression.
    """
    if not is_expression(params.whitespace_pattern):
        raise refusal("whitespace_pattern", "is no regular expression that can be held")
    return json_options(params.whitespace_pattern, is_tight=params.disable_any_whitespace)


def is_expression(pattern: str | None) -> bool:
    """Whether a regular expression can be held, which None can."""
    from llguidance import regex_to_lark

    return pattern is None or _matches(f"start: /{regex_to_lark(pattern, 'd')}/", None)


def json_options(whitespace_pattern: str | None, *, is_tight: bool) -> dict[str, Any]:
    """How JSON is written, as llguidance reads it: `is_tight` without white space between its tokens."""
    white = {} if is_tight else {"whitespace_pattern": whitespace_pattern or WHITESPACE}
    return {"json_allowed_escapes": ESCAPES, "whitespace_flexible": not is_tight, **white}


def _json(schema: Any, options: Any) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), overrides=options)


def yaml_grammar(schema: Mapping[str, Any], params: StructuredOutputsParams, root: str = "#") -> str:
    """A grammar of Lark's of a checked schema, which is the whole of `params` or stands at `root` in it. What is
    refused of JSON is refused of YAML: the same schemas are held, if not all that they allow.

    Raises:
        InvalidRequestError: a keyword that cannot be held, with its place.
    """
    from quire.structured.merging import Unheld
    from quire.structured.yaml import grammar  # imported where shapes are checked, not where an engine starts

    validate(_json(schema, json_options(None, is_tight=True)), params)
    field, schemas = params.kind, dict(_schemas(schema, root))
    if any("$ref" in one for one in schemas.values()):
        for place, one in schemas.items():
            if place != root and "$id" in one:
                raise refusal(field, f"the keyword '$id' at {place} cannot be held beside '$ref'")
    try:
        text = grammar(schema, _matches, is_whole=field == "yaml")
    except Unheld as error:
        places = [place for place, one in schemas.items() if error.keyword in one]
        place = places[0] if places else root
        raise refusal(field, f"the keyword {error.keyword!r} at {place} {error.why}") from None
    if text is None:
        raise refusal(field, "no text satisfies it")
    return text


def _matches(lark_text: str, text: str | None) -> bool:
    """Whether a grammar matches a text; with None, any."""
    from llguidance import LLMatcher, LLTokenizer

    source = LLMatcher.grammar_from_lark(lark_text)
    matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0, limits=limits())
    if text is None:  # where nothing may come, it allows the end, and says so afterwards
        return not matcher.is_error() and any(matcher.compute_bitmask()) and not matcher.is_error()
    tokens = list(text.encode())
    return not matcher.is_error() and matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if inner is None:
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inner)


def _schemas(value: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema in a schema, with its JSON pointer. What stands in `const`, `enum`, `default` and `examples` is no
    schema."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _schemas(item, f"{place}/{index}")
    if not isinstance(value, Mapping):
        return
    yield place, value
    for name, inner in value.items():
        below = f"{place}/{name.replace('~', '~0').replace('/', '~1')}"
        if name in _IN_SCHEMAS and isinstance(inner, Mapping):
            for key, item in inner.items():
                yield from _schemas(item, f"{below}/{key.replace('~', '~0').replace('/', '~1')}")
        elif name not in _VALUES:
            yield from _schemas(inner, below)


def _not_held_exactly(schema: Mapping[str, Any]) -> Iterator[str]:
    """Keywords whose value llguidance takes for another one."""
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum"):
        if keyword in schema and _is_inexact(schema[keyword]):
            yield keyword
    for keyword in ("properties", "required"):
        if _is_inexact([*schema.get(keyword, ())]):
            yield keyword
    if "$ref" in schema and "$id" in schema:
        yield "$id"  # whether it counts beside a reference is not the same in all drafts
    least = schema.get("minProperties", 0)
    is_closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if isinstance(least, int) and least > 1 and not is_closed:
        yield "minProperties"  # a key that comes twice would count twice
    bounds = {name: schema[name] for name in _BOUNDS if isinstance(schema.get(name), int | float)}
    if "multipleOf" not in schema and any(
        _takes_bound(bounds, keyword) for keyword in ("exclusiveMinimum", "exclusiveMaximum")
    ):
        yield "exclusiveMinimum" if "exclusiveMinimum" in bounds else "exclusiveMaximum"


def _is_inexact(value: Any) -> bool:
    """Whether a value holds an integer that no double is, or a character that cannot be written."""
    if isinstance(value, list):
        return any(map(_is_inexact, value))
    if isinstance(value, Mapping):
        return any(map(_is_inexact, [*value, *value.values()]))
    if isinstance(value, str):
        return any(one < " " and one not in "\b\f\n\r\t" for one in value)
    return isinstance(value, int) and abs(value) > LARGEST_EXACT


def _takes_bound(bounds: Mapping[str, Any], keyword: str) -> bool:
    """Whether the compiler lets the very number through that `keyword` excludes."""
    from llguidance import LLMatcher, LLTokenizer

    if keyword not in bounds:
        return False
    schema = json.dumps({"type": "number", **bounds})
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(schema), log_level=0, limits=limits())
    text = list(json.dumps(bounds[keyword]).encode())
    return not matcher.is_error() and matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()


def _map_schemas(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The same with every schema in it changed."""
    if isinstance(schema, list):
        return [_map_schemas(item, change) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, inner in schema.items():
        if name in _IN_SCHEMAS and isinstance(inner, Mapping):
            found[name] = {key: _map_schemas(item, change) for key, item in inner.items()}
        else:
            found[name] = inner if name in _VALUES else _map_schemas(inner, change)
    return change(found)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """With `additionalProperties: false` where an object has named properties and says nothing of others."""
    return {"additionalProperties": False, **schema} if "properties" in schema else schema


def _without_unknown_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A format that the standard does not know says nothing of a value (section 7 of its part on validation)."""
    is_unknown = "format" in schema and isinstance(schema["format"], str) and schema["format"] not in FORMATS
    return {name: value for name, value in schema.items() if name != "format"} if is_unknown else schema


def _explained(text: str, params: StructuredOutputsParams) -> str:
    """What llguidance says, with the place in the schema where it can be found."""
    unheld, unknown = _UNHELD.search(text), _UNKNOWN_FORMAT.search(text)
    if params.kind in ("json", "yaml", "structural_tag") and (unheld or unknown):
        kind, word = ("keyword", json.loads(unheld[1])[0]) if unheld else ("format", (unknown or "")[1])
        tag = params.structural_tag
        schemas = _schemas(json.loads(tag) if isinstance(tag, str) else _schema(params), "#")
        places = [at for at, schema in schemas if (word in schema if unheld else schema.get("format") == word)]
        return f"the {kind} {word!r} at {places[0] if places else '#'} cannot be held"
    said = text.removesuffix("<non-verbose/>").strip()[:1000]
    if params.kind == "grammar" and not is_gbnf(params.grammar or ""):
        return f"is taken for Lark (no '::='): {said}"
    if params.kind in ("json", "yaml"):
        return next(_placed(said, _schema(params)), said)
    return said


def _placed(said: str, schema: Any) -> Iterator[str]:
    for pattern, keyword, meaning in _KEYWORD_OF:
        found = pattern.search(said)
        if found is None:
            continue
        held = [(at, one[keyword]) for at, one in _schemas(schema, "#") if keyword in one]
        places = [at for at, value in held if any(found[1] in str(item) for item in _items(value))]
        if places:
            detail = "" if keyword == "oneOf" else f": {said}"
            yield f"the keyword {keyword!r} at {' or '.join(places[:4])} {meaning}{detail}"


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, Mapping | list) else (value,)


def lark_of(grammar: str, field: str) -> str:
    """A grammar in either notation, in Lark's."""
    if "x-guidance" in grammar:
        raise refusal(field, "'x-guidance' is not honoured: it would loosen what a schema says")
    if not is_gbnf(grammar):
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise refusal(field, f"is taken for GBNF ('::='), and is none: {str(error)[:300]}") from None
