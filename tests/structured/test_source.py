"""What a shape holds: the judges are Python's own parsers, and the official suite of JSON Schema."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.structured.source import is_gbnf
from quire.structured_params import MAX_NESTING
from tests.structured.grammars import accepts, matcher

SUITE = Path(__file__).parent / "json_schema_test_suite"
"""Drafts 2020-12 and 7 of https://github.com/json-schema-org/JSON-Schema-Test-Suite at 44401e0c (MIT), without what
needs a network or another vocabulary."""


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=6),
    st.data(),
)
def test_a_choice_is_one_of_the_texts(choice: list[str], data: st.DataObject) -> None:
    start = matcher(choice=choice)
    other = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(choice))
    assert all(accepts(start, text) for text in choice)
    assert accepts(start, other) == (other in choice)


@pytest.mark.parametrize(
    "pattern",
    [r"\d{3}-\d{4}", r"[a-c]+x?", r"(ab|a)*b", r"^\w+@\w+\.com$", r"a{2,4}|/b/", r"[^\"\\]{0,3}", r"(?i)yes|no", "é+"],
)
def test_a_regex_matches_the_whole_answer(pattern: str) -> None:
    start = matcher(regex=pattern)
    texts = [
        "123-4567",
        "abc",
        "ax",
        "abab",
        "aab",
        "b",
        "joe@x.com",
        "aaa",
        "/b/",
        "YES",
        "no",
        "",
        "éé",
        "12-1",
        "a",
        "aaaaa",
        "ab\n",
    ]
    for text in texts:
        assert accepts(start, text) == (re.fullmatch(pattern, text, re.ASCII if "d" in pattern else 0) is not None), (
            text
        )


def test_digits_are_those_of_ascii() -> None:
    """Rust's own `\\d` takes those of every script."""
    assert accepts(matcher(regex=r"\d"), "3") and not accepts(matcher(regex=r"\d"), "\u0663")


def test_grammars_in_both_notations() -> None:
    gbnf = 'root ::= sum\nsum ::= number ("+" number)*\nnumber ::= [0-9]+'
    lark = 'start: number ("+" number)*\nnumber: /[0-9]+/'
    assert is_gbnf(gbnf) and not is_gbnf(lark)
    for grammar in (gbnf, lark):
        start = matcher(grammar=grammar)
        assert [accepts(start, text) for text in ("1+22", "7", "", "1+", "+1", "1 + 1")] == [True, True, *[False] * 4]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"regex": "(a"}, "(?s)structured_outputs.regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: foo"}, r'structured_outputs.grammar: is taken for Lark \(no .*unknown name: "foo"'),
        ({"grammar": "root ::= foo"}, "structured_outputs.grammar: is taken for GBNF .*foo"),
        ({"grammar": "root ::= " + "(" * 9999}, "structured_outputs.grammar"),
        ({"json": "[1]"}, "a schema is an object, true or false, not list"),
        ({"json": "{"}, "is no JSON"),
        ({"json": False}, "no text satisfies"),
        ({"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "no text satisfies"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"json": {"$ref": "#/$defs/b"}}, "/\\$defs/b"),
        ({"json": {"$ref": "http://127.0.0.1:9/x"}}, "the keyword '\\$ref' at # cannot be held: .*does not fetch"),
        ({"json": {"items": {"$ref": "#/$defs/b"}}}, "the keyword '\\$ref' at #/items refers to nothing"),
        ({"json": {"items": {"type": ["null", "foo"]}}}, "the keyword 'type' at #/items names no type: .*foo"),
        (
            {"json": {"properties": {"a": {"pattern": "(?=b)c"}, "d": {"pattern": "e"}}}},
            "(?s)the keyword 'pattern' at #/properties/a cannot be held: .*look-around",
        ),
        (
            {"yaml": {"properties": {"a": {"patternProperties": {"(?=b)": True}}}}},
            "(?s)the keyword 'patternProperties' at #/properties/a cannot be held: .*look-around",
        ),
        (
            {"json": {"items": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}},
            "the keyword 'oneOf' at #/items cannot be held: its schemas may overlap$",
        ),
        ({"json": {"properties": {"a/b": {"not": {}}}}}, "the keyword 'not' at #/properties/a~1b cannot be held"),
        ({"json": {"items": {"uniqueItems": True}}}, "the keyword 'uniqueItems' at #/items cannot be held"),
        (
            {"json": {"properties": {"a": {"x-guidance": {"lenient": True}}}}},
            "'x-guidance' at #/properties/a is not honoured",
        ),
        ({"json": {"type": "string", "format": {}}}, "structured_outputs.json"),
        ({"json": {"minProperties": 2}}, "the keyword 'minProperties' at # cannot be held with this value"),
        ({"json": {"items": {"const": 12345678901234567890123}}}, "the keyword 'const' at #/items cannot be held with"),
        ({"json": {"enum": [1, 9007199254740993]}}, "the keyword 'enum' at #"),
        (
            {"json": {"type": "number", "exclusiveMinimum": 9, "maximum": 9.63}},
            "'exclusiveMinimum' at # cannot be held",
        ),
        ({"grammar": 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'}, "'x-guidance' is not honoured"),
        ({"json": {"items": {"type": "string", "format": "regex"}}}, "the format 'regex' at #/items cannot be held"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name_and_place(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text) as caught:
        matcher(**values)
    assert caught.value.param == "structured_outputs" and len(str(caught.value)) < 1200


def test_nesting_is_bounded() -> None:
    schema: Any = {"type": "string"}
    for _ in range(MAX_NESTING // 2 - 1):
        schema = {"type": "array", "items": schema}
    matcher(json=schema)
    for _ in range(MAX_NESTING):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_NESTING} deep"):
        matcher(json=schema)


def test_what_is_no_schema_is_not_read_as_one() -> None:
    """`enum` and `const` hold values, and a property may have any name."""
    start = matcher(json={"properties": {"not": {"const": {"uniqueItems": 1}}, "x-guidance": {}}, "required": ["not"]})
    assert accepts(start, '{"not":{"uniqueItems":1}}') and not accepts(start, '{"not":{}}')
    start = matcher(json={"enum": [{"x-guidance": 1, "format": "no such one"}]})
    assert accepts(start, '{"x-guidance":1,"format":"no such one"}')
    start = matcher(json={"type": "string", "format": "colour-of-the-house"})  # unknown formats say nothing
    assert accepts(start, '"red"')


def test_white_space_is_bounded_and_can_be_excluded() -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    start, tight = matcher(json=schema), matcher(json=schema, disable_any_whitespace=True)
    lines = matcher(json=schema, whitespace_pattern=r"( |\n {0,16})?")
    for text, by_default, without, own in (
        ('{"a":1}', True, True, True),
        ('{"a": 1}', True, False, True),
        ('{\n    "a": 1\n}', False, False, True),
        ('{"a":' + "\n" * 9 + "1}", False, False, False),
        ('{"a":  1}', False, False, False),
    ):
        assert [accepts(one, text) for one in (start, tight, lines)] == [by_default, without, own], text


def test_a_key_has_one_spelling() -> None:
    """An escaped one would pass by what the schema says of it."""
    start = matcher(json={"type": "object", "properties": {"a": {"type": "integer"}, "\u00e9": {"type": "integer"}}})
    assert accepts(start, '{"a":1,"b\\n":2}') and accepts(start, '{"x\\"y\\\\":"z"}')
    for text in ('{"\\u0061":"x"}', '{"\\u00e9":"x"}', '{"\\u00E9":"x"}', '{"a":"x"}', '{"b\\/":1}'):
        assert not accepts(start, text), text


def test_exclusive_bounds_exclude() -> None:
    for bound in ({"exclusiveMinimum": 0}, {"exclusiveMaximum": 7.5}, {"exclusiveMinimum": 2, "maximum": 9}):
        start = matcher(json={"type": "number", **bound})
        assert not any(accepts(start, json.dumps(value)) for name, value in bound.items() if "exclusive" in name)


def test_objects_can_be_closed() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}, "properties": {}}}
    start, closed = matcher(json=schema), matcher(json=schema, disable_additional_properties=True)
    assert accepts(start, '{"a":{"b":1,"c":2}}') and not accepts(closed, '{"a":{"b":1,"c":2}}')
    assert accepts(closed, '{"a":{"b":1},"properties":{"x":1}}')


@pytest.mark.parametrize("file", sorted(SUITE.glob("*/*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_nothing_wrong_is_accepted(file: Path) -> None:
    """The official suite: a schema is held or refused, and what is held accepts no instance that it should not."""
    seen = Counter[str]()
    for group in json.loads(file.read_text()):
        try:
            start = matcher(json=json.dumps(group["schema"]))
        except InvalidRequestError:
            seen["refused"] += 1
            continue
        for test in group["tests"]:
            accepted = accepts(start, json.dumps(test["data"], ensure_ascii=False))
            seen["right" if accepted == test["valid"] else "wrong reject"] += 1
            assert not accepted or test["valid"], (group["description"], test["description"])
    assert seen.total()
