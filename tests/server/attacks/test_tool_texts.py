"""A16: answers that are dear to read as calls. Each costs what its size says, and streams to what it is whole."""

import json
import sys
from typing import Any

import pytest

from quire.engine.tools import Asked, Tool
from quire.server.doors.openai.answer_parts import AnswerParts
from quire.text.parsers.choose import TOOL_FORMATS, choose
from tests.server.test_tool_answers import joined, without_ids

ASKED = Asked((Tool("f", {"type": "object"}),), may_reason=True)
TEXTS = {
    "markers": "<tool_call>",
    "half markers": "<tool_cal",
    "braces": "{",
    "brackets": "[",
    "openings": '{"name": "',
    "calls": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n',
    "unclosed strings": '<tool_call>\n{"name": "f", "arguments": {"a": "',
    "reasoning": "<think>",
    "names": "[f(",
    "white space": " \n",
    "backslashes": '{"name": "f", "arguments": {"a": "' + "\\" * 3,
}


def read(name: str, text: str) -> tuple[dict[str, Any], int]:
    """What deltas of one character each add up to, and how many calls of functions reading them took."""
    parts = AnswerParts(choose(None, {}, name, "qwen3").parser(ASKED), shows_reasoning=True)
    deltas: list[Any] = [{"content": ""}]
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        for place, character in enumerate(text):
            deltas += parts.deltas(character, ended=place == len(text) - 1)
    finally:
        sys.setprofile(None)
    return joined([{"delta": delta} for delta in deltas]), count


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("kind", TEXTS)
def test_reading_takes_what_the_size_says(name: str, kind: str) -> None:
    unit = TEXTS[kind]
    short, long = ((unit * (size // len(unit) + 1))[:size] for size in (400, 1600))
    _, few = read(name, short)
    message, many = read(name, long)
    assert many < 6 * few  # with the square of the size it would be 16
    whole = AnswerParts(choose(None, {}, name, "qwen3").parser(ASKED), shows_reasoning=True)
    assert json.dumps(without_ids(message)) == json.dumps(
        without_ids({name: value for name, value in whole.message(long, "").items() if name not in ("role", "refusal")})
    )
