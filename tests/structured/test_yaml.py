"""YAML by a schema. The judges are PyYAML (1.1) and ruamel (1.2), who must read the same value, and jsonschema-rs."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.structured.yaml import MAX_DEPTH
from tests.structured.grammars import accepts, matcher
from tests.structured.yaml_texts import read, write

SUITE = Path(__file__).parent / "json_schema_test_suite"
TEXT = {"type": "string"}
PLAIN = (
    "no|NO|on|off|y|N|yes|null|Null|~|true|.5|1.|-.5e+3|1_000|0b1|0o7|012|0x1F|1e3|1E400|+1|1:30|190:20:30|2001-01-01"
)
TREACHEROUS = [
    *PLAIN.split("|"),
    *("2001-12-14t21:59:43.10-05:00", "2001-12-14 21:59:43.10 -5", ".inf", "-.INF", ".nan", "=", "<<", "-", "?", ":"),
    *("- a", "? a", ": a", "a: b", "a:", "a #b", "#a", "a ", " a", "a\tb", "---", "--- a", "...", "%YAML 1.2", "@a"),
    *("`a", "*a", "&a", "!a", "!!str a", "|", ">", "|-\n  a", "[a", "]", "{a", "}", ",a", "'a", "'a'", '"a', "\u0085"),
    *("a\u0085b", "a\u2028b", "\ufeff", "\ufeffa", "a\ufeffb", "\x7f", "\x80a", "\x9f", "\ufffe", "a\nb", "a\rb", ""),
    *("12e03", "1 000", "0.1.2", "1-2", "12:30:45.67", "a\\b", '"\\/"', '"\\ud800"', '"a\nb"', '"\t"', '"\x85"', "- "),
]
"""Texts that some YAML reads as another value than themselves, or not at all."""
VALUES = (
    *(
        "abc",
        "a b",
        "a:b",
        "http://a.b/c?d=e#f",
        "C#",
        "it's",
        "a, b; c",
        "1st",
        "3 apples",
        "\U0001f600",
        "é",
        "日本語",
        "α=β",
    ),
    *("x  y", "nope", "yes sir", "/usr/bin", "(a)", "$1", "a@b.c", "50 %", "a&b", "a|b", "a > b", "v1.2.3", "_", "0xg"),
)


@pytest.mark.parametrize("text", TREACHEROUS)
def test_what_is_read_as_something_else_is_not_held_as_a_text(text: str) -> None:
    """As the whole answer, as an item, as a value, as a key, and among other keys."""
    for before, shape in (
        ("", TEXT),
        ("- ", {"type": "array", "items": TEXT}),
        ("a: ", {"type": "object", "properties": {"a": TEXT}}),
    ):
        _accepted_only_as_read(shape, before + text)
    _accepted_only_as_read({"type": "object", "additionalProperties": {"type": "integer"}}, f"{text}: 1")
    _accepted_only_as_read({"type": "object", "additionalProperties": {"type": "integer"}}, f"a: 1\n{text}: 1")


def _accepted_only_as_read(schema: Any, text: str) -> bool:
    if not accepts(matcher(yaml=schema), text):
        return False
    jsonschema_rs.validate(schema, read(text))
    return True


def test_every_text_can_be_written() -> None:
    start = matcher(yaml=TEXT)
    for text in (*VALUES, *TREACHEROUS):
        if text.isprintable() and "\ufeff" not in text:
            quoted = json.dumps(text, ensure_ascii=False)
            assert accepts(start, quoted) and read(quoted) == text
    for text in VALUES:
        assert accepts(start, text) and read(text) == text


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.text("-+.:0123456789eExo_ '\"#,[]{}TZ~yn", max_size=9)
)
@example("1e5")
@example("0 ")
def test_a_plain_text_is_read_as_itself(text: str) -> None:
    start = matcher(yaml={"type": "object", "properties": {"a": TEXT}})
    if accepts(start, f"a: {text}"):
        found = read(f"a: {text}")["a"]
        assert found == text or text.startswith(('"', "|")), found
    shape = {"type": "object", "additionalProperties": True}
    if accepts(matcher(yaml=shape), f"{text}: 1"):
        assert [*read(f"{text}: 1")] == [text if not text.startswith('"') else json.loads(text)]


def test_literal_blocks_hold_texts_of_several_lines() -> None:
    shape = {"type": "object", "properties": {"a": TEXT, "b": {"type": "array", "items": TEXT}}}
    start = matcher(yaml=shape)
    for text in (
        "a: |-\n  one\n  two",
        "a: |-\n  one: 1\n    more # no comment\n\n\n  - two\nb:\n  - |-\n    x\n     y\n  - z",
        "a: |-\n  ---\n  ...",
    ):
        assert accepts(start, text), text
        jsonschema_rs.validate(shape, read(text))
    for text in (
        "a: |-\n one",
        "a: |-\n   one",
        "a: |-\none",
        "a: |-\n\n  one",
        "a: |-\n  one\n",
        "a: |\n  one",
        "a: >-\n  a",
    ):
        assert not accepts(start, text), text
    assert accepts(matcher(yaml=TEXT), "|-\n  a\n   b") and read("|-\n  a\n   b") == "a\n b"


def test_numbers_are_those_that_both_read() -> None:
    start = matcher(yaml={"type": "number"})
    for text in ("0", "-1", "1.5", "-0.25", "123456789012345678", "3.0"):
        assert accepts(start, text) and read(text) == json.loads(text)
    for text in ("1e5", "1.5e3", "01", ".5", "1.", "+1", "1_0", "0x1", "1e400", "1" * 400, "NaN", ".inf", "-"):
        assert not accepts(start, text), text
    for bounds, inside, outside in (
        ({"minimum": 3}, "3", "2"),
        ({"maximum": 3}, "-8", "4"),
        ({"multipleOf": 5}, "15", "16"),
    ):
        start = matcher(yaml={"type": "integer", **bounds})
        assert accepts(start, inside) and not accepts(start, outside) and not accepts(start, "1" * 40)


def test_block_style_has_one_form() -> None:
    shape = {
        "type": "object",
        "properties": {
            "name": TEXT,
            "no": {"type": "boolean"},
            "tags": {"type": "array", "items": {"enum": ["left", "no", 1.5, None, "a: b"]}, "maxItems": 3},
            "inner": {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"]},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    start = matcher(yaml=shape)
    for text in (
        "name: Ann",
        'name: Ann\n"no": true\ntags:\n  - left\n  - "no"\n  - 1.5',
        'name: Ann\ntags:\n  - null\n  - "a: b"\ninner:\n  x: null',
        "name: Ann\ntags: []",
    ):
        assert accepts(start, text), text
        jsonschema_rs.validate(shape, read(text))
    for text in (
        *(
            "name: Ann\n",
            "name:  Ann",
            "name: Ann # hers",
            "no: true\nname: Ann",
            "name: Ann\nno: true",
            "name: Ann\ntags:",
        ),
        *("name: Ann\ntags:\n- left", "name: Ann\ntags:\n   - left", "name: Ann\ntags: [left]", "name: Ann\ninner: {}"),
        *(
            "name: Ann\ninner: {x: null}",
            "name: Ann\nother: 1",
            "name: Ann\nname: Bob",
            '"name": Ann',
            "{}",
            "---\nname: a",
        ),
    ):
        assert not accepts(start, text), text


def test_no_key_comes_twice() -> None:
    shape: Any = {"type": "object", "properties": {"b": {}}, "additionalProperties": {"type": ["object", "integer"]}}
    start = matcher(yaml=shape)
    for text in (
        "a: 1\naa: 2\na1: 3",
        "b: 1\nc:\n  b: 1\n  c: 2\nd:\n  b: 1",
        '"a b": 1\na: {}\n"a  b": 2',
        "a:\n  a:\n    a: 1",
    ):
        assert accepts(start, text), text
        jsonschema_rs.validate(shape, read(text))
    for text in (
        "a: 1\na: 2",
        'a: 1\n"a": 2',
        "b: 1\nb: 2",
        "c:\n  b: 1\n  b: 1",
        "c:\n  a: 1\nd: 1\nc: 1",
        "a:\n  a: 1\na: 1",
    ):
        assert not accepts(start, text), text
    items = matcher(yaml={"type": "array", "items": {"type": "object", "minProperties": 2}})
    assert accepts(items, "- a: 1\n  b: 2\n- a: 1\n  b:\n    - a: 1\n      c: 1\n    - a: 2")
    assert not accepts(items, "- a: 1\n- a: 1\n  b: 2") and not accepts(items, "- a: 1\n  b: 2\n  a: 1")
    texts = matcher(yaml={"properties": {"t": TEXT}, "type": "object"})
    assert accepts(texts, "t: |-\n  a: 1\n  a: 1\na: 1") and not accepts(texts, "t: |-\n  a: 1\na: 1\na: 1")


def test_what_is_deeper_than_block_style_is_in_flow_style() -> None:
    shape: Any = {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}
    start = matcher(yaml=shape)
    dashes = "- " * MAX_DEPTH
    for text in (dashes + "[]", dashes + "[[], [[]]]"):
        assert accepts(start, text) and read(text)
    assert not accepts(start, dashes + "- []") and not accepts(start, "[[]]")
    tree = {
        "type": "object",
        "properties": {"v": {"type": ["integer", "string"]}, "m": {"$ref": "#"}},
        "additionalProperties": True,
    }
    start = matcher(yaml=tree)
    text = "".join("  " * depth + "m:\n" for depth in range(MAX_DEPTH - 1)) + "  " * (MAX_DEPTH - 1)
    for end in ('m: {"v": "a: b", "m": {"v": 1, "x": [1, {"y": null}]}}', "m: {}"):
        assert accepts(start, text + end), text + end
        jsonschema_rs.validate(tree, read(text + end))
    for end in (
        'm: {"v": 1,"m": {}}',
        'm: {"x": 1, "x": 2}',
        "m: {v: 1}",
        'm: {"v": a}',
        'm: {"v": "\\u0041"}',
        'm: {"v": "\\/"}',
    ):
        assert not accepts(start, text + end), end


def test_large_schemas_have_fewer_levels() -> None:
    """A rule for each schema at each depth would be too many: flow style begins earlier."""
    names = {f"p{number}": {"$ref": "#"} for number in range(200)}
    start = matcher(yaml={"type": "object", "properties": names, "additionalProperties": False})
    levels = next(
        levels
        for levels in range(MAX_DEPTH)
        if accepts(start, "".join(f"{'  ' * level}p7:\n" for level in range(levels)) + "  " * levels + 'p7: {"p8": {}}')
    )
    assert 0 < levels < MAX_DEPTH - 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"yaml": {"uniqueItems": True}}, "structured_outputs.yaml: the keyword 'uniqueItems' at # cannot be held"),
        ({"yaml": {"properties": {"a": {"not": {}}}}}, "the keyword 'not' at #/properties/a cannot be held"),
        ({"yaml": {"items": {"x-guidance": {}}}}, "'x-guidance' at #/items"),
        ({"yaml": {"type": "array", "contains": {}}}, "the keyword 'contains' at #"),
        ({"yaml": {"properties": {"k" * 1001: {}}}}, "the keyword 'properties' at # cannot be held with keys of more"),
        ({"yaml": {"patternProperties": {"(^a)|b": {}}}}, "the keyword 'patternProperties' at #"),
        ({"yaml": {"allOf": [{"multipleOf": 2}, {"multipleOf": 3}]}}, "the keyword 'multipleOf' at #/allOf/0"),
        ({"yaml": {"$ref": "#"}}, "structured_outputs.yaml: no text satisfies it"),
        ({"yaml": {"type": "integer", "minimum": 5, "maximum": 4}}, "structured_outputs.yaml"),
        ({"yaml": {"required": ["a"], "properties": {"a": {"$ref": "#"}}, "type": "object"}}, "no text satisfies it"),
        ({"yaml": False}, "no text satisfies the schema false"),
        ({"yaml": "{"}, "structured_outputs.yaml: is no JSON"),
        ({"yaml": "[]"}, "a schema is an object"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name_and_place(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        matcher(**values)
    assert text in str(caught.value) and caught.value.param == "structured_outputs"


def test_combinations_are_held_by_what_they_mean() -> None:
    for schema, held, not_held in (
        (
            {
                "allOf": [
                    {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                    {"type": "object", "additionalProperties": {"minimum": 3}},
                ]
            },
            ["a: 3", "a: 3\nb: 4"],
            ["a: 2", "a: 3\nb: 2", "{}"],
        ),
        (
            {"anyOf": [{"type": "integer"}, {"type": "object", "required": ["a"]}, {"const": "x"}]},
            ["1", "x", "a: 1"],
            ["y", "{}", "b: 1"],
        ),
        ({"type": "string", "enum": ["a", 1, None, "bb"], "maxLength": 1}, ["a"], ["1", "null", "bb"]),
        ({"type": "string", "pattern": "^[0-9]+$"}, ['"12"'], ["12", '"a"', '""']),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", '"abc"', "日本"], ["a", "abcd", "no", '"a"', '""']),
        ({"type": "string", "format": "date"}, ['"2001-01-01"'], ["2001-01-01", "a"]),
        (
            {
                "type": "array",
                "prefixItems": [{"type": "integer"}, TEXT],
                "items": {"type": "null"},
                "minItems": 1,
                "maxItems": 3,
            },
            ["- 1", "- 1\n- a\n- null"],
            ["[]", "- a", "- 1\n- a\n- null\n- null", "- 1\n- 1"],
        ),
        (
            {
                "type": "object",
                "patternProperties": {"^x-": {"type": "integer"}},
                "properties": {"x-a": {"maximum": 3}},
                "additionalProperties": False,
            },
            ["x-a: 3", "x-b: 4\nx-c: 5"],
            ["x-a: 4", "x-a: true", "b: 1"],
        ),
        (
            {"type": "object", "patternProperties": {"^[ab]$": {}}, "additionalProperties": False, "minProperties": 2},
            ["a: 1\nb: 2"],
            ["a: 1", "a: 1\na: 2", "b: 1\nc: 1"],
        ),
        (
            {"type": "object", "additionalProperties": TEXT, "minProperties": 2, "maxProperties": 3},
            ["b: x\na: z"],
            ["a: x", "a: x\nb: x\nc: x\nd: x"],
        ),
        (
            {"type": "integer", "allOf": [{"minimum": 3}, {"minimum": 5, "maximum": 9}, {"maximum": 7}]},
            ["5", "7"],
            ["4", "8"],
        ),
    ):
        start = matcher(yaml=schema)
        for text in held:
            assert _accepted_only_as_read(schema, text), (schema, text)
        for text in not_held:
            assert not accepts(start, text), (schema, text)


@pytest.mark.parametrize(
    ("pattern", "held", "not_held"),
    [
        ("^a|b$", ["a", "ax", "xb"], ["xa", "bx"]),
        ("^BYTES|^KB$", ["BYTES", "BYTESx", "KB"], ["KBx", "xBYTES"]),
        (r"^\d+:$", ['"1:"'], ["1:", '"1"', '"٣:"']),
        ("b", ["abc"], ["ac"]),
        (r"^[|^$]+$", ['"|"', '"^$"'], ['"a"', "a|"]),
        (r"^(gs|s3)://\w+$", ["gs://a", "s3://b_"], ["gs://é", "gs:/a", "gs://"]),
        ("^(?!a).*$", None, None),
        (r"^no|yes$", ['"no"', "nope", '"yes"', "eyes"], ["no", "yes", "no way yesterday: 1"]),
    ],
)
def test_a_pattern_is_held_plain_and_in_quotes(pattern: str, held: list[str] | None, not_held: list[str]) -> None:
    schema = {"type": "string", "pattern": pattern}
    if held is None:
        with pytest.raises(InvalidRequestError):
            matcher(yaml=schema)
        return
    start = matcher(yaml=schema)
    for text in held:
        assert accepts(start, text), text
        assert re.search(pattern, read(text), re.ASCII)
    for text in not_held:
        assert not accepts(start, text), text


@pytest.mark.parametrize("file", sorted(SUITE.glob("*/*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_nothing_wrong_is_accepted(file: Path) -> None:
    """The official suite, its instances as another writes them."""
    seen = Counter[str]()
    for group in json.loads(file.read_text()):
        try:
            start = matcher(yaml=json.dumps(group["schema"]))
        except InvalidRequestError:
            seen["refused"] += 1
            continue
        for test in group["tests"]:
            text = write(test["data"])
            accepted = accepts(start, text)
            seen["right" if accepted == test["valid"] else "wrong reject"] += 1
            assert not accepted or (test["valid"] and read(text) == test["data"]), (group["description"], text)
    assert seen.total()
