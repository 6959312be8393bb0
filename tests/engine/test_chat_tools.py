"""Tools in `LLM.chat` and `AsyncLLM`: what the prompt tells of them, and what calls are held to."""

# ruff: noqa: E501 - one text a line

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from quire import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from quire.engine.tools import Asked, read_tools
from quire.errors import ConfigurationError, InvalidRequestError
from quire.text.parsers.events import CallArguments, CallStart
from quire.text.parsers.reader import whole
from tests.server.tool_models import THINKING, make_caller, make_tool_model

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": SCHEMA}}]
PARAMS = SamplingParams(max_tokens=200, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_caller(tmp_path_factory.mktemp("caller") / "model")


@pytest.fixture(scope="module")
def llm(caller: Path) -> Iterator[LLM]:
    with LLM(str(caller)) as found:
        yield found


def calls_in(text: str, llm: LLM) -> list[Any]:
    """The calls that the model's own format finds."""
    assert llm.answer_format is not None
    events = whole(llm.answer_format.parser(Asked(read_tools(TOOLS)[1])), text)
    starts = [event.index for event in events if isinstance(event, CallStart)]
    return [
        json.loads("".join(one.text for one in events if isinstance(one, CallArguments) and one.index == start))
        for start in starts
    ]


def test_calls_are_held_in_every_way_to_give_conversations(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=200, temperature=1.0, seed=seed) for seed in range(8)]
    listed = llm.chat([HELLO] * 8, params, tools=TOOLS, use_tqdm=False)
    found = [call for output in listed for call in calls_in(output.outputs[0].text, llm)]
    assert len(found) >= 3
    for call in found:
        jsonschema_rs.validator_for(SCHEMA).validate(call)
    text = llm.get_tokenizer().decode(listed[0].prompt_token_ids, skip_special_tokens=False)
    assert '"description": "Does it."' in text and '"maximum": 9' in text
    (one,) = llm.chat(HELLO, params[3], tools=TOOLS, use_tqdm=False)
    (drawn,) = llm.chat(iter([HELLO]), params[3], tools=TOOLS, use_tqdm=False)
    assert one.outputs[0].text == drawn.outputs[0].text == listed[3].outputs[0].text


async def test_an_async_engine_holds_the_same(caller: Path, llm: LLM) -> None:
    shown, tools = read_tools(TOOLS)
    engine = AsyncLLM(str(caller))
    try:
        token_ids = await engine.encode_chat(HELLO, tools=shown)
        held = await engine.hold(PARAMS, Asked(tools), token_ids, names=["f"])
        outputs = [one async for one in engine.generate({"prompt_token_ids": token_ids}, held.params)]
    finally:
        await engine.shutdown()
    assert outputs[-1].outputs[0].text == llm.chat(HELLO, PARAMS, tools=TOOLS, use_tqdm=False)[0].outputs[0].text


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ({"type": "function"}, "tools must be a list"),
        ([3], r"tools\[0\] must be an object of type function"),
        ([*TOOLS, {"type": "function", "function": {}}], r"tools\[1\].function.name must be a text"),
        ([*TOOLS, *TOOLS], r"tools\[1\].function.name is 'f', as of another tool"),
        ([{"type": "function", "function": {"name": "g", "parameters": {"type": "array"}}}], "of type object, not array"),
        (
            [*TOOLS, {"type": "function", "function": {"name": "g", "parameters": {"properties": {"x": {"not": {}}}}}}],
            r"tools\[1\].function.parameters cannot be held: the keyword 'not' at #/properties/x",
        ),
    ],
)  # fmt: skip
def test_what_is_no_tool_is_refused_with_its_place(llm: LLM, tools: Any, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        llm.chat(HELLO, PARAMS, tools=tools, use_tqdm=False)
    assert llm.chat(HELLO, SamplingParams(max_tokens=1), use_tqdm=False)


def test_a_shape_of_the_library_holds_the_whole_text(tmp_path: Path) -> None:
    """There is no field for reasoning beside it."""
    shape = StructuredOutputsParams(choice=["yes", "no"])
    with LLM(str(make_tool_model(tmp_path / "model", THINKING))) as llm:
        params = SamplingParams(max_tokens=50, structured_outputs=shape)
        assert llm.chat(HELLO, params, use_tqdm=False)[0].outputs[0].text in ("yes", "no")


PLAIN = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_knows_nothing_of_tools_is_told_of_them(tmp_path: Path) -> None:
    """In the system's message; calls are lines of JSON, and results are told by the user."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": "x"}'}}
    results = [{"role": "tool", "tool_call_id": "c1", "content": one} for one in ("first", "second")]
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, *results]
    with LLM(str(make_tool_model(tmp_path / "model", PLAIN))) as llm:
        assert llm.answer_format is not None and llm.answer_format.name == "json"
        (output,) = llm.chat(messages, PARAMS, tools=TOOLS, use_tqdm=False)
        text = llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)
        assert text.startswith("<|system|>You may call functions.") and json.dumps(SCHEMA) in text
        told = '<|user|>hello<|assistant|>{"name": "f", "arguments": {"a": 1, "b": "x"}}<|user|>f gave: first\nf gave: second'
        assert text.endswith(f"{told}<|assistant|>")
        with_system = [{"role": "system", "content": "Be brief."}, *HELLO]
        (output,) = llm.chat(with_system, SamplingParams(max_tokens=1), tools=TOOLS, use_tqdm=False)
        text = llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)
        assert text.startswith("<|system|>Be brief.\n\nYou may call functions.")


def test_what_a_format_cannot_hold_names_the_tool(caller: Path) -> None:
    """Arguments that are written one by one, and a schema that says more of the whole."""
    schema = {"type": "object", "properties": {"x": {"type": "string"}}, "anyOf": [{"required": ["x"]}, {}]}
    tools = [*TOOLS, {"type": "function", "function": {"name": "g", "parameters": schema}}]
    with LLM(str(caller), tool_call_parser="qwen3_coder") as llm:
        assert llm.chat(HELLO, PARAMS, tools=TOOLS, use_tqdm=False)
        with pytest.raises(InvalidRequestError, match=r"tools\[1\].function.parameters cannot be held: .*anyOf"):
            llm.chat(HELLO, PARAMS, tools=tools, use_tqdm=False)


def test_the_format_is_said_or_seen(caller: Path, llm: LLM) -> None:
    (decision,) = [one for one in llm.decisions if one.name == "answers"]
    assert decision.value == "hermes, reasoning none" and "<tool_call>" in decision.reason
    with LLM(str(caller), tool_call_parser="json", reasoning_parser="deepseek_r1") as other:
        (decision,) = [one for one in other.decisions if one.name == "answers"]
        assert decision.value == "json, reasoning deepseek_r1" and "--tool-call-parser" in decision.reason
    for argument in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigurationError, match=f"{argument} 'hermse'") as caught:
            LLM(str(caller), **{argument: "hermse"})
        assert caught.value.field == argument
