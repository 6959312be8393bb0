"""Calls and reasoning in answers, whole and streamed, over an engine that says what a test wants."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.text.parsers.choose import choose
from tests.server.conftest import Running, start
from tests.server.fake_engine import FakeEngine
from tests.server.tool_models import THINKING

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of a city.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K\\u00f6ln", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def telling() -> Iterator[Running]:
    engine = FakeEngine()
    engine.answer_format = choose(THINKING, {})
    running = start(engine)
    yield running
    running.stop()


def ask(telling: Running, says: str, **body: Any) -> dict[str, Any]:
    telling.engine.says = says
    response = httpx.post(f"{telling.url}/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def stream(telling: Running, says: str, **body: Any) -> list[dict[str, Any]]:
    """The choices of a stream's events."""
    telling.engine.says = says
    body = {"messages": HELLO, "tools": TOOLS, "stream": True, **body}
    response = httpx.post(f"{telling.url}/v1/chat/completions", json=body)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


def joined(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's deltas make, in the way of OpenAI's clients."""
    message: dict[str, Any] = {}
    for choice in choices:
        for name, value in choice["delta"].items():
            if name == "tool_calls":
                calls = message.setdefault("tool_calls", [])
                for part in value:
                    if part["index"] == len(calls):
                        calls.append({"id": part["id"], "type": part["type"], "function": {**part["function"]}})
                    else:
                        calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
            elif isinstance(value, str) and name != "role":
                message[name] = message.get(name, "") + value
            else:
                message[name] = value
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{**call, "id": None} for call in message.get("tool_calls", ())]
    return {**message, "content": message["content"] or None, **({"tool_calls": calls} if calls else {})}


ANSWERS = {
    "text": "It rains.",
    "calls": CALLS,
    "text and calls": f"Let me look.\n{CALLS}",
    "reasoning": "<think>\nHm, rain?\n</think>\n\nIt rains.",
    "reasoning and calls": f"<think>\nHm?\n</think>\n\n{CALLS}",
    "reasoning that does not end": "<think>\nHm, and",
    "a call that does not end": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K',
    "no call": 'See <tool_call> and {"name": "x"} </tool_call>.',
}


@pytest.mark.parametrize("says", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("interval", [1, 2, 7, 1000])
def test_a_stream_says_what_the_whole_answer_says(telling: Running, says: str, interval: int) -> None:
    whole = ask(telling, says)["choices"][0]
    choices = stream(telling, says, stream_interval=interval)
    assert without_ids(joined(choices)) == without_ids(whole["message"])
    assert [choice["finish_reason"] for choice in choices][-1] == whole["finish_reason"]
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}


def test_a_whole_answer_with_calls(telling: Running) -> None:
    choice = ask(telling, ANSWERS["reasoning and calls"])["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == (None, "Hm?", "Hm?")
    first, second = message["tool_calls"]
    assert first["function"]["name"] == "get_weather" and second["function"] == {"name": "now", "arguments": "{}"}
    assert json.loads(first["function"]["arguments"]) == {"city": "Köln", "days": 2}
    assert first["type"] == "function" and first["id"].startswith("call_") and first["id"] != second["id"]


def test_a_stream_names_a_call_before_its_arguments(telling: Running) -> None:
    parts = [part for choice in stream(telling, CALLS) for part in choice["delta"].get("tool_calls", ())]
    names = [place for place, part in enumerate(parts) if "name" in part["function"]]
    assert [parts[place]["index"] for place in names] == [0, 1]
    assert [part["index"] for part in parts] == sorted(part["index"] for part in parts)
    assert names[0] == 0 and names[1] - names[0] > 10, "arguments come in pieces"
    assert all("id" in parts[place] and parts[place]["function"]["arguments"] == "" for place in names)
    assert all(set(part) == {"index", "function"} for place, part in enumerate(parts) if place not in names)


def test_calls_are_not_read_where_none_are_asked_for(telling: Running) -> None:
    named = {"tool_choice": {"type": "function", "function": {"name": "now"}}}
    says = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
    bodies: list[dict[str, Any]] = [{"tool_choice": "none"}, {"tools": []}, named]
    for body in bodies:
        choice = ask(telling, says, **body)["choices"][0]
        assert choice["finish_reason"] == "stop" and "get_weather" in choice["message"]["content"]
        assert "tool_calls" not in choice["message"]


def test_reasoning_is_left_out_on_request(telling: Running) -> None:
    says = ANSWERS["reasoning"]
    message = ask(telling, says, include_reasoning=False)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "It rains.", "refusal": None}
    assert joined(stream(telling, says, include_reasoning=False)) == message


def test_logprobs_and_token_ids_keep_every_token(telling: Running) -> None:
    says = ANSWERS["reasoning and calls"]
    extra = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    whole = ask(telling, says, **extra)["choices"][0]
    assert bytes(whole["token_ids"]).decode() == says
    for interval in (1, 5, 1000):
        choices = stream(telling, says, stream_interval=interval, **extra)
        assert [item for choice in choices for item in choice.get("token_ids", ())] == whole["token_ids"]
        content = [item for choice in choices for item in (choice["logprobs"] or {}).get("content", ())]
        assert content == whole["logprobs"]["content"]
        assert without_ids(joined(choices)) == without_ids(whole["message"])


def test_several_sequences_have_parts_of_their_own(telling: Running) -> None:
    choices = stream(telling, CALLS, n=2)
    whole = ask(telling, CALLS, n=2)["choices"]
    for index in range(2):
        own = [choice for choice in choices if choice["index"] == index]
        assert without_ids(joined(own)) == without_ids(whole[index]["message"])
        assert own[-1]["finish_reason"] == "tool_calls"


def test_an_answer_cut_off_in_a_call_ends_with_length(telling: Running) -> None:
    choice = ask(telling, ANSWERS["a call that does not end"], max_tokens=99)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "K'}
    choice = ask(telling, CALLS, max_tokens=len(CALLS))["choices"][0]
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("length", 2)


def test_an_answer_cut_off_in_a_call_by_a_stop_string_ends_with_stop(telling: Running) -> None:
    for found in (ask(telling, CALLS[:50], stop=["x"])["choices"], stream(telling, CALLS[:50], stop=["x"])):
        assert found[-1]["finish_reason"] == "stop"


def test_a_prompt_may_end_inside_reasoning(telling: Running) -> None:
    """As templates that open it themselves write it."""
    says = "Hm, rain?\n</think>\n\nIt rains."
    inside = [{"role": "user", "content": "hello<think>"}]
    message = ask(telling, says, messages=inside)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm, rain?", "It rains.")
    assert without_ids(joined(stream(telling, says, messages=inside))) == without_ids(message)
    behind = [{"role": "user", "content": "hello<think>\n\n</think>"}]
    message = ask(telling, says, messages=behind)["choices"][0]["message"]
    assert "reasoning" not in message and message["content"] == says
