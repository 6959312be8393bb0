"""Structural tags: what each form lets through, what is refused with its place, and answers of an engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.errors import InvalidRequestError
from quire.structured.samples import extras_of
from quire.structured.source import limits, source_of, validate
from quire.structured.structural_tag import without_token_ids
from tests.structured.grammars import accepts

DIGIT = {"type": "regex", "pattern": "[0-9]"}
NUMBER: dict[str, Any] = {"type": "json_schema", "json_schema": {"type": "integer"}}
XML = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["a", 1]},
        "short": {"type": "string", "maxLength": 3},
        "to": {"type": "string", "enum": ["x", "y"]},
    },
    "required": ["name"],
}
F = {"begin": "<f>", "content": DIGIT, "end": "</f>"}
G = {"begin": "<g>", "content": NUMBER, "end": "</g>"}


def triggered(**more: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": ["<f", "<g>"], "tags": [F, G], **more}


def separated(**more: Any) -> dict[str, Any]:
    return {"type": "tags_with_separator", "tags": [F, G], "separator": ", ", **more}


def tag(content: Any, begin: Any = "<a>", end: Any = "</a>") -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence(*elements: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


ANY = {"type": "any_text"}


def compiled(value: Any, **options: Any) -> LLMatcher:
    params = StructuredOutputsParams(structural_tag=value, **options)
    source = source_of(params)
    validate(source, params)
    return LLMatcher(LLTokenizer("byte"), without_token_ids(source), log_level=0, limits=limits())


@pytest.mark.parametrize(
    ("form", "accepted", "rejected"),
    [
        (const('a"\n/'), ['a"\n/'], ["a", ""]),
        (ANY, ["", "a\nb<f>"], []),
        ({**ANY, "excludes": ["</x>", "a.c"]}, ["abc </x", ""], ["</x>", "b a.c"]),
        (NUMBER, ["12"], ["x", "1.5"]),
        ({"type": "regex", "pattern": "a+|b"}, ["aa", "b"], ["ab", ""]),
        ({"type": "grammar", "grammar": "start: A+\nA: /[xy]/"}, ["xyx"], ["z"]),
        ({"type": "grammar", "grammar": 'root ::= "x" | "y" root'}, ["yyx"], ["y"]),
        (sequence(const("a"), DIGIT, const("b")), ["a1b"], ["ab", "a1"]),
        ({"type": "or", "elements": [const("a"), sequence(const("b"), DIGIT)]}, ["a", "b2"], ["a2", "b"]),
        (sequence({"type": "or", "elements": [const("a"), const("b")]}, const("c")), ["ac", "bc"], ["a", "bcc"]),
        (tag(ANY), ["<a></a>", "<a>x</b>\n</a>"], ["<a>x", "<a>x</a>y", "<a></a></a>"]),
        (tag({**ANY, "excludes": ["no"]}), ["<a>n o</a>"], ["<a>no</a>"]),
        (tag(DIGIT, end=["</a>", "!"]), ["<a>1!", "<a>1</a>"], ["<a>1"]),
        (tag(ANY, end=["</a>", "!"]), ["<a>1!", "<a>1</a>"], ["<a>1", "<a>1!</a>"]),
        (tag({"type": "or", "elements": [const("x"), DIGIT]}), ["<a>x</a>", "<a>3</a>"], ["<a>x", "<a>3"]),
        (triggered(), ["", "x", "x<f>1</f>y<g>12</g>", "<"], ["<f", "<g>", "<g>x</g>", "x<f>12</f>", "<f>1</f> <g>"]),
        (triggered(at_least_one=True), ["<f>1</f>", "<f>1</f> x <g>1</g>"], ["", "x<f>1</f>"]),
        (triggered(stop_after_first=True), ["abc", "x<f>1</f>"], ["x<f>1</f> "]),
        (triggered(stop_after_first=True, at_least_one=True), ["<f>1</f>"], ["", "<f>1</f> ", "x<f>1</f>"]),
        (tag(triggered()), ["<a>x<f>1</f></a>", "<a></a>"], ["<a>x<f></a>", "<a>", "<a></a>x"]),
        (tag(triggered(stop_after_first=True)), ["<a>x<f>1</f></a>", "<a>x</a>"], ["<a>x<f>1</f>x</a>", "<a>"]),
        (separated(), ["", "<f>1</f>", "<f>1</f>, <g>2</g>"], ["x", "<f>1</f><f>1</f>", "<f>1</f>, "]),
        (separated(at_least_one=True), ["<f>1</f>, <f>1</f>"], [""]),
        (separated(stop_after_first=True), ["", "<f>1</f>"], ["<f>1</f>, <f>1</f>"]),
        (
            {"type": "qwen_xml_parameter", "json_schema": XML},
            [
                "<parameter=name>\n\n</parameter>\n",
                '<parameter=name>\na\n"b" </parameter\n</parameter>\n<parameter=kind>\n"a"\n</parameter>\n',
                "<parameter=name>\nx\n</parameter>\n<parameter=short>\nabc\n</parameter>\n<parameter=to>\ny\n</parameter>\n",
            ],
            [
                "",
                "<parameter=kind>\n1\n</parameter>\n",
                "<parameter=name>\nx\n</parameter>\n<parameter=kind>\n2\n</parameter>\n",
                "<parameter=name>\nx\n</parameter>\n<parameter=short>\nabcd\n</parameter>\n",
                "<parameter=name>\nx\n</parameter>\n<parameter=to>\nz\n</parameter>\n",
            ],
        ),
        (
            {"type": "json_schema", "style": "python", "json_schema": {"properties": {"a": {}, "b": {}}}},
            ["", 'a={"x": 1}', "b=1", "a=1, b=2"],
            ["a=1b=2", ", b=2", "b=1, a=1", "a=1, "],
        ),
    ],
)  # fmt: skip
def test_a_form_lets_its_texts_through(form: Any, accepted: list[str], rejected: list[str]) -> None:
    matcher = compiled({"type": "structural_tag", "format": form})
    assert [text for text in accepted if not accepts(matcher, text)] == []
    assert [text for text in rejected if accepts(matcher, text)] == []


def test_the_older_form_is_triggered_tags() -> None:
    structures = [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}]
    matcher = compiled(json.dumps({"type": "structural_tag", "structures": structures, "triggers": ["<f="]}))
    assert accepts(matcher, "x<f=a>12</f>y") and accepts(matcher, "x<f")
    assert not accepts(matcher, "x<f=b>") and not accepts(matcher, "<f=a>x</f>")


def test_a_definition_may_be_used_several_times() -> None:
    form = sequence({"type": "ref", "name": "a"}, const("-"), {"type": "ref", "name": "a"})
    matcher = compiled({"format": form, "definitions": {"a": {"type": "or", "elements": [DIGIT, const("x")]}}})
    assert accepts(matcher, "1-x") and not accepts(matcher, "1-") and not accepts(matcher, "11-x")


@pytest.mark.parametrize(
    ("options", "own", "held"),
    [
        ({}, {}, [True, True, False, True]),
        ({"disable_any_whitespace": True}, {}, [True, False, False, True]),
        ({"whitespace_pattern": r"\n?"}, {}, [True, False, True, True]),
        ({"disable_additional_properties": True}, {}, [True, True, False, False]),
        ({}, {"disable_any_whitespace": True}, [True, False, False, True]),
        ({"disable_any_whitespace": True}, {"whitespace_pattern": r"\n?"}, [True, False, True, True]),
        ({"whitespace_pattern": r"\n?"}, {"disable_any_whitespace": False}, [True, True, False, True]),
        ({"disable_additional_properties": True}, {"disable_additional_properties": False}, [True, True, False, True]),
    ],
)
def test_how_json_is_written_is_said_by_its_format_or_the_whole(options: Any, own: Any, held: list[bool]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = tag({"type": "json_schema", "json_schema": schema, **own})
    matcher = compiled({"format": form}, **options)
    texts = ('{"a":1}', '{"a": 1}', '{"a":\n1}', '{"a":1,"b":2}')
    assert [accepts(matcher, f"<a>{text}</a>") for text in texts] == held


def test_json_in_named_parameters_is_written_as_the_whole_says() -> None:
    form = {"type": "json_schema", "style": "python", "json_schema": {"properties": {"a": {}}}}
    tight = compiled({"format": form}, disable_any_whitespace=True)
    assert accepts(tight, 'a={"x":1}') and not accepts(tight, 'a={"x": 1}')
    with pytest.raises(InvalidRequestError, match=r"structured_outputs\.whitespace_pattern: is no regular expression"):
        compiled({"format": form}, whitespace_pattern="(")


def test_special_tokens_are_no_text() -> None:
    """Token 256 + 5 % 5 opens, 256 + 6 % 5 closes: only they do, and the text between may not be they."""
    mark = {"type": "token", "token": 5}
    form = {"type": "triggered_tags", "triggers": [mark], "tags": [tag(DIGIT, mark, {"type": "token", "token": 6})]}
    matcher = compiled({"format": form})
    for tokens, is_answer in (([97, 256, 49, 257, 98], True), ([97], True), ([256, 49], False), ([257], False)):
        one = matcher.deep_copy()
        taken = one.try_consume_tokens(tokens)
        assert (taken == len(tokens) and one.is_accepting()) is is_answer


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1]", "structural_tag: must be an object, not list"),
        ("{", "structural_tag: is no JSON"),
        ({"type": "x", "format": ANY}, "must be 'structural_tag' at #/type"),
        ({}, "needs a format, or structures and triggers"),
        ({"format": ANY, "other": 1}, "has the unknown key 'other'"),
        ({"structures": [{"begin": "a"}], "triggers": ["a"]}, "must be objects of begin, schema and end at"),
        ({"format": 1}, "a format must be an object at #/format"),
        ({"format": {"type": "nothing"}}, "must be one of const_string, .*at #/format/type"),
        ({"format": {"type": "const_string"}}, "const_string needs 'value' at #/format"),
        ({"format": {"type": "const_string", "value": 1}}, "must be text at #/format/value"),
        ({"format": {**ANY, "stop": "x"}}, "any_text has the unknown key 'stop' at #/format"),
        ({"format": sequence()}, "must be a list that is not empty at #/format/elements"),
        ({"format": sequence(ANY, const("a"))}, "may be followed by nothing .*at #/format/elements/0"),
        ({"format": triggered(triggers=["<g>"])}, "exactly one of the triggers at #/format/tags/0"),
        ({"format": triggered(triggers=["<f", "<f>", "<g>"])}, "exactly one of the triggers at #/format/tags/0/begin"),
        ({"format": triggered(at_least_one=1)}, "must be true or false at #/format/at_least_one"),
        ({"format": tag(ANY, {"type": "token", "token": -1})}, "must be text, or a token by its id at #/format/begin"),
        ({"format": {**NUMBER, "style": "toml"}}, "must be one of json, yaml, qwen_xml, .*at #/format/style"),
        ({"format": {**NUMBER, "json_schema": {"not": {}}}}, "keyword 'not' at #/format/json_schema cannot be held"),
        ({"format": {**NUMBER, "json_schema": {"const": 2**60}}}, "'const' at #/format/json_schema cannot be held"),
        ({"format": {**NUMBER, "json_schema": 3}}, "a schema is an object, true or false, not int"),
        ({"format": {**NUMBER, "whitespace_pattern": "("}}, "no regular expression .*at #/format/whitespace_pattern"),
        ({"format": {**NUMBER, "whitespace_pattern": ""}}, "1 to 256 bytes at #/format/whitespace_pattern"),
        ({"format": {**NUMBER, "whitespace_pattern": " " * 257}}, "1 to 256 bytes at #/format/whitespace_pattern"),
        ({"format": {**NUMBER, "whitespace_pattern": " ", "disable_any_whitespace": True}},
         "disable_any_whitespace excludes at #/format/whitespace_pattern"),
        ({"format": {**NUMBER, "style": "yaml", "disable_any_whitespace": True}},
         "belongs to the style json, not to yaml at #/format/disable_any_whitespace"),
        ({"format": {"type": "grammar", "grammar": "start: foo"}}, "structural_tag: .*foo"),
        ({"format": {"type": "regex", "pattern": "("}}, "structural_tag: "),
        ({"format": {"type": "ref", "name": "a"}}, "the definition 'a' is missing at #/format/name"),
        ({"format": {"type": "ref", "name": "a"}, "definitions": {"a": tag({"type": "ref", "name": "a"})}},
         "at most 64 deep"),
        ({"format": ANY, "reasoning": {"begin": "", "end": "x"}}, "must be an object of begin, end and max_tokens"),
        ({"format": ANY, "reasoning": {"begin": "", "end": "x", "max_tokens": -1}}, "at #/reasoning/max_tokens"),
        ({"format": ANY, "reasoning": {"begin": "", "end": "", "max_tokens": 1}}, "not be empty at #/reasoning/end"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        compiled(value)
    assert error.value.param == "structured_outputs"


def test_a_form_that_nests_too_deep_is_refused() -> None:
    form: Any = ANY
    for _ in range(70):
        form = tag(form)
    with pytest.raises(InvalidRequestError, match="at most 64 deep"):
        compiled({"format": form})


def test_only_this_kind_says_more_than_a_grammar() -> None:
    """A caller's grammar cannot pretend to be one of these."""
    source = source_of(StructuredOutputsParams(grammar='start: "{\\"quire\\": {\\"may_be_cut\\": true}}"'))
    assert not extras_of(source)
    assert extras_of(source_of(StructuredOutputsParams(structural_tag={"format": ANY})))["may_be_cut"]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(model=str(tiny_model), max_num_seqs=16, max_model_len=512) as llm:
        yield llm


SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"]}
CALL = {"begin": "<c>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</c>"}


@pytest.mark.parametrize("is_free", [True, False])
def test_an_engine_s_answers_are_text_and_whole_parts(llm: LLM, is_free: bool) -> None:
    """Alone and beside others, with log-probabilities and without: the same tokens."""
    letters = "aeiourst0123"
    calls = [{**CALL, "begin": f"{letter}<c>"} for letter in letters]
    form = {"type": "triggered_tags", "triggers": [*letters], "tags": calls, "at_least_one": not is_free}
    shape = StructuredOutputsParams(structural_tag={"format": form})
    base = [dict(temperature=2.0, seed=seed, max_tokens=24 + seed, structured_outputs=shape) for seed in range(24)]
    outputs = llm.generate(["x"] * 24, [SamplingParams(**one) for one in base], use_tqdm=False)
    num_parts = 0
    for output, params in zip(outputs, base, strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason in ("stop", "length") and len(answer.token_ids) <= params["max_tokens"]
        parts = answer.text.split("<c>")[1:]
        assert parts or is_free
        for part in parts:
            jsonschema_rs.validate(SCHEMA, json.loads(part.split("</c>")[0]))
            assert "</c>" in part
        num_parts += len(parts)
    assert num_parts > 4
    if is_free:
        assert any(output.outputs[0].finish_reason == "length" for output in outputs)
    for seed in (0, 7, 13):
        (alone,) = llm.generate(["x"], SamplingParams(**base[seed], logprobs=1), use_tqdm=False)
        assert alone.outputs[0].token_ids == outputs[seed].outputs[0].token_ids
