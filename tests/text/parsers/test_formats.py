"""Calls and reasoning read out of answers, whole and in pieces."""

import json
import random

import pytest

from quire.text.parsers.events import Asked, CallArguments, CallEnd, CallStart, Content, Event, Reasoning, Tool, joined
from quire.text.parsers.reader import whole
from tests.text.parsers.samples import ANSWERS, SEPARATE, A, B, made

TEXT = {"type": "string"}
TOOLS = (
    Tool("weather", {"type": "object", "properties": {"city": TEXT, "days": {"type": "integer"}}}),
    Tool("other-2", {"type": "object", "properties": {"city": TEXT, "deep": {"type": "object"}}}),
)
ASKED = Asked(TOOLS)


def read(name: str, text: str, asked: Asked = ASKED) -> list[Event]:
    return joined(whole(made(name).parser(asked), text))


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_found(name: str) -> None:
    events = read(name, ANSWERS[name])
    if name == "openai":
        assert events.pop(0) == Reasoning("I think.")
    assert events[0] == Content(SEPARATE)
    assert [one for one in events if isinstance(one, CallStart)] == [CallStart(0, "weather"), CallStart(1, "other-2")]
    given = [json.loads(one.text) for one in events if isinstance(one, CallArguments)]
    assert given == [json.loads(A), json.loads(B)]
    assert [one for one in events if isinstance(one, CallEnd)] == [CallEnd(0), CallEnd(1)] and len(events) == 7


@pytest.mark.parametrize("name", ANSWERS)
def test_the_events_do_not_depend_on_the_cuts(name: str) -> None:
    """At every character, in two pieces; character by character; and in random pieces, some of them empty."""
    text = f"{ANSWERS[name]}\n then more <tool_ca"
    expected = read(name, text)
    for cut in range(len(text) + 1):
        parser = made(name).parser(ASKED)
        assert joined([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.end()]) == expected
    for seed in range(20):
        draw, parser, found, place = random.Random(seed), made(name).parser(ASKED), [], 0
        while place < len(text):
            size = draw.randint(0, 4) if seed else 1
            found += parser.push(text[place : place + size])
            place += size
        assert joined([*found, *parser.end()]) == expected


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "openai"])
def test_calls_inside_of_content_that_is_held_are_none(name: str) -> None:
    """An answer that is calls or a document is a document where it does not begin with a call; wherever it is cut."""
    asked = Asked(TOOLS, then={"type": "regex", "pattern": ".*"})
    text, calls = "note: " + ANSWERS[name], ANSWERS[name].removeprefix(SEPARATE)
    for cut in range(0, len(text) + 1, 3):
        parser = made(name).parser(asked)
        assert joined([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.end()]) == [Content(text)]
    assert [one for one in read(name, calls, asked) if isinstance(one, CallEnd)] == [CallEnd(0), CallEnd(1)]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_cut_off_gives_what_is_there(name: str) -> None:
    text = ANSWERS[name]
    expected = [one.text for one in read(name, text) if isinstance(one, CallArguments)]
    for cut in range(len(text)):
        events = read(name, text[:cut])
        starts = [one for one in events if isinstance(one, CallStart)]
        assert starts == [CallStart(0, "weather"), CallStart(1, "other-2")][: len(starts)]
        for one in events:
            if isinstance(one, CallArguments):
                assert expected[one.index].startswith(one.text)
        ended = [one.index for one in events if isinstance(one, CallEnd)]
        assert all(json.loads(one.text) for one in events if isinstance(one, CallArguments) and one.index in ended)


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "openai"])
def test_what_only_looks_like_a_call_is_content(name: str) -> None:
    """Of a tool that is not there, with no tools at all, and broken off where no name was."""
    text = ANSWERS[name]
    nobody = read(name, text, Asked((Tool("nobody"),)))
    assert not any(isinstance(one, CallStart) for one in nobody) and "weather" in "".join(
        one.text for one in nobody if isinstance(one, Content)
    )
    assert read(name, text, Asked()) == [Content(text)]
    for odd in (f"{text[:20]} and so on", "a <tool_call> in a sentence", '[1, "x"] {"name": 3} [f( <', "", " \n"):
        events = read(name, odd, Asked((Tool("nobody"),)))
        assert events == ([Content(odd)] if odd else [])


@pytest.mark.parametrize("name", ANSWERS)
def test_any_text_is_read_without_an_error(name: str) -> None:
    """Pieces of answers in random order: whatever comes, the text of content and of arguments is the model's own."""
    for seed in range(60):
        draw = random.Random(seed)
        parts = [ANSWERS[name][place : place + draw.randint(1, 30)] for place in range(0, len(ANSWERS[name]), 17)]
        draw.shuffle(parts)
        text = "".join(parts)
        expected = read(name, text)
        parser, found = made(name).parser(ASKED), []
        for one in text:
            found += parser.push(one)
        assert joined([*found, *parser.end()]) == expected


def test_arguments_come_while_they_are_written() -> None:
    for name, answer in ANSWERS.items():
        parser, most = made(name).parser(ASKED), 0
        for one in answer:
            most += sum(isinstance(event, CallArguments) for event in parser.push(one))
        assert most > 6, name


def test_special_tokens_that_mark_nothing_are_taken_out() -> None:
    for cut in range(20):
        parser, text = made("mistral").parser(ASKED), "a<|other|>b <|oth<|other|>er|>"
        assert joined([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.end()]) == [Content("ab <|other|>")]
    assert made("hermes").special_tokens == () and "[TOOL_CALLS]" in made("mistral").special_tokens


@pytest.mark.parametrize(
    ("asked", "text", "expected"),
    [
        (Asked(in_reasoning=True), "\nhm \n</think>\n\nyes ", [Reasoning("hm"), Content("yes ")]),
        (Asked(in_reasoning=True), "hm", [Reasoning("hm")]),
        (Asked(may_reason=True), "<think>\nhm\n</think>\n\nyes", [Reasoning("hm"), Content("yes")]),
        (Asked(may_reason=True), "<think>\n\n</think>\n\nyes", [Content("yes")]),
        (Asked(may_reason=True), " yes <think>", [Content(" yes <think>")]),
        (Asked(), "<think>a</think>", [Content("<think>a</think>")]),
        (
            Asked(TOOLS, in_reasoning=True),
            f"{ANSWERS['hermes']}</think>x",
            [Reasoning(ANSWERS["hermes"]), Content("x")],
        ),
    ],
)
def test_reasoning_is_found(asked: Asked, text: str, expected: list[Event]) -> None:
    for cut in range(len(text) + 1):
        parser = made("hermes", "qwen3").parser(asked)
        assert joined([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.end()]) == expected


def test_the_end_of_a_prompt_says_where_the_answer_begins() -> None:
    fmt = made("hermes", "deepseek_r1")
    assert fmt.starts_in_reasoning("<｜Assistant｜><think>\n") and not fmt.starts_in_reasoning("<｜Assistant｜>")
    assert not fmt.may_reason("<think>\n\n</think>\n\n") and fmt.may_reason("<|im_start|>assistant\n")
    granite = made("hermes", "granite_think")
    text = "<think>a</think><response>b</response>"
    assert joined(whole(granite.parser(Asked(may_reason=True)), text)) == [Reasoning("a"), Content("b")]


NAMED = {
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>",
    "llama4_pythonic": "[f(x={})]",
    "functiongemma": "<start_function_call>call:f{{x:{}}}<end_function_call>",
}
HALF_A_CHARACTER = r"\ud800"


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e999", '{"x": 1e999}'),
        ("[-1e999]", '{"x": [-1e999]}'),
        ("12345678901234567890.5", '{"x": 12345678901234567890.5}'),
        (f'["{HALF_A_CHARACTER}"]', f'{{"x": ["{HALF_A_CHARACTER}"]}}'),
        (f"'{HALF_A_CHARACTER}'", f'{{"x": "{HALF_A_CHARACTER}"}}'),
    ],
)
def test_named_values_are_json_whatever_they_hold(name: str, value: str, expected: str) -> None:
    """Python has no number for `1e999` but `Infinity`, which is no JSON, and half a character is in no answer."""
    asked = Asked((Tool("f", {"type": "object", "properties": {"x": {}}}),))
    text = "".join(one.text for one in read(name, NAMED[name].format(value), asked) if isinstance(one, CallArguments))
    assert text == expected and text.encode()


def test_half_a_character_in_arguments_that_are_text_is_no_error() -> None:
    text = f'{{"name": "weather", "arguments": "{HALF_A_CHARACTER}"}}'
    assert CallArguments(0, f'"{HALF_A_CHARACTER}"') in read("json", text)


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": "string", "maxLength": 100}, "some text"),
        ({"type": "string", "maxLength": 4000}, '"some text"'),
        ({"type": "string", "minLength": 2001}, '"some text"'),
        ({"type": "string", "enum": ["some text", "</parameter>"]}, '"some text"'),
        ({"type": "string", "pattern": "^some"}, '"some text"'),
    ],
)
def test_a_parameter_is_read_as_its_grammar_writes_it(schema: dict[str, object], written: str) -> None:
    """A text that the grammar holds in JSON, quotes and all, is read as JSON: its quotes are no part of it."""
    tool = Tool("weather", {"type": "object", "properties": {"city": schema}})
    text = f"<tool_call>\n<function=weather>\n<parameter=city>\n{written}\n</parameter>\n</function>\n</tool_call>"
    given = [one.text for one in read("qwen3_coder", text, Asked((tool,))) if isinstance(one, CallArguments)]
    assert [json.loads(one) for one in given] == [{"city": "some text"}]
