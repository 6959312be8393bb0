"""Samples of regular expressions: the judge is Python's own matcher."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.structured.closing import Closer, TextTokens
from quire.structured.samples import is_yaml, lines_of, samples_of, shortest_match
from tests.structured.grammars import matcher


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}.\d{6}", 26), (r"^[a-z]{2,9}-[0-9]+$", 4), ("(foo|ba)r+x", 4),
        ('[^"a]+', 1), ("(?:a|bc){2,}", 2), (r"\.", 1), (r"[\w.-]+@[\w-]+\.com", 7), ("(a(b|cd){3})?e", 1), ("[]x]", 1),
        ("(?P<year>[0-9]{4})", 4), ("a+?b*?c", 2), (r"\(\d\)", 3), ("[+-]?", 0),
    ],
)  # fmt: skip
def test_a_sample_matches_and_is_short(pattern: str, length: int) -> None:
    text = shortest_match(pattern)
    assert text is not None and re.search(pattern, text) and len(text) == length


@pytest.mark.parametrize("pattern", ["(", "[a", "(?=a)b", r"\p{L}", "(?<!a)b", "(?P=n)", "a)", "x{600}", "(" * 5000])
def test_what_is_not_understood_is_left_out(pattern: str) -> None:
    assert shortest_match(pattern) is None


@given(st.text("ab[](){}|*+?\\^$.-,0123dw", max_size=14))
def test_no_pattern_breaks_it(pattern: str) -> None:
    shortest_match(pattern)


def test_samples_come_from_every_place() -> None:
    schema = {
        "properties": {"a": {"pattern": "^x{3}$"}, "pattern": {"type": "string"}},
        "patternProperties": {"y+z": {}},
    }
    source = json.dumps({"grammars": [{"json_schema": schema}, {"lark_grammar": "start: /q{2}/ A\nA: /w/"}]})
    assert samples_of(source) == ["xxx", "yz", "qq", "w"]
    assert samples_of('start: a /q{2}/\na: %json {"pattern": "x{3}"}\nb: %json {') == ["xxx", "qq"]


def test_what_lines_begin_with_stands_before_a_grammar() -> None:
    source = '// lines: [[2, "a:"], [0, "b:"], [2, "- "]]\nstart: "b:"'
    assert lines_of(source) == [(0, "b:"), (2, "a:"), (2, "- ")] and is_yaml(source)
    assert lines_of('start: "b:"') == [] and not is_yaml("{}")


def test_an_expression_in_a_text_can_be_closed_from_anywhere() -> None:
    """Its beginning and end are free, so that no single character leads to an end."""
    shape = {"type": "string", "pattern": r"\d{4}-\d{2}"}
    samples = [list(text.encode()) for text in samples_of(json.dumps(shape))]
    closer = Closer(TextTokens(lambda text: text[0] if len(text) == 1 else None, 262), samples)
    for begun in ('"', '"ab', '"20', '"2024-', '"2024-01', '"2024-01 and'):
        one = matcher(json=shape)
        assert one.try_consume_tokens(list(begun.encode())) == len(begun)
        found = closer.completion(one, 40, 8)
        assert found is not None and re.search(r"\d{4}-\d{2}", json.loads(begun + bytes(found).decode())), begun
