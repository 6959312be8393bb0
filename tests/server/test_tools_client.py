"""Tools and reasoning as the official client asks for them, over a tiny random model: whatever it calls is valid."""

# ruff: noqa: E501 - one refusal a line

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pydantic
import pytest

from quire.llm import AsyncLLM
from tests.server.conftest import MODEL, Running, start
from tests.server.tool_models import THINKING, make_caller, make_tool_model
from tests.structured.yaml_texts import read

HELLO: Any = [{"role": "user", "content": "hello"}]


class GetWeather(pydantic.BaseModel):
    """The weather of a city."""

    city: str = pydantic.Field(max_length=8)
    unit: Literal["C", "F"]
    days: list[int] = pydantic.Field(max_length=2)


class Now(pydantic.BaseModel):
    """The time."""

    zone: Literal["UTC", "CET"]


TOOLS: Any = [openai.pydantic_function_tool(GetWeather, name="get_weather"), openai.pydantic_function_tool(Now)]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def _running(directory: Any) -> Iterator[Running]:
    running = start(AsyncLLM(str(directory), max_num_seqs=8))
    yield running
    running.stop()
    running.engine.close()


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from _running(make_tool_model(tmp_path_factory.mktemp("hermes") / "model"))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from _running(make_tool_model(tmp_path_factory.mktemp("thinking") / "model", THINKING))


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a model that likes to open calls."""
    yield from _running(make_caller(tmp_path_factory.mktemp("caller") / "model"))


def ask(running: Running, **changes: Any) -> Any:
    asked = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 400, "temperature": 1.0, **changes}
    return running.client().chat.completions.create(**asked)


def check_calls(message: Any) -> list[str]:
    """The names of its calls, each valid under its schema."""
    for call in message.tool_calls or ():
        arguments = json.loads(call.function.arguments)
        jsonschema_rs.validator_for(SCHEMAS[call.function.name]).validate(arguments)
        assert call.type == "function" and call.id.startswith("call_")
    return [call.function.name for call in message.tool_calls or ()]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.client(
    "openai",
    "chat.completions.create(tools, tool_choice)",
    "chat.completions.stream(tools, tool_choice)",
)
def test_required_calls_are_valid_whole_and_streamed(hermes: Running, seed: int) -> None:
    choice = ask(hermes, tool_choice="required", seed=seed).choices[0]
    assert choice.finish_reason == "tool_calls" and check_calls(choice.message) and choice.message.content is None
    client = hermes.client()
    asked: Any = dict(model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=400, temperature=1.0, seed=seed)
    with client.chat.completions.stream(**asked, tool_choice="required") as stream:
        done = [event.arguments for event in stream if event.type == "tool_calls.function.arguments.done"]
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in streamed.message.tool_calls or ()] == [
        (call.function.name, call.function.arguments) for call in choice.message.tool_calls
    ]
    assert done == [call.function.arguments for call in choice.message.tool_calls]


@pytest.mark.client("openai", "chat.completions.parse(tools, tool_choice)")
def test_arguments_are_parsed_into_pydantic_models(hermes: Running) -> None:
    asked: Any = dict(model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=400, temperature=1.0, seed=3)
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    parsed = hermes.client().chat.completions.parse(**asked, tool_choice=named).choices[0].message
    (call,) = parsed.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, GetWeather)


@pytest.mark.client("openai", "chat.completions.create(tools, tool_choice, parallel_tool_calls)")
def test_choices_of_tools(hermes: Running) -> None:
    reference = {"type": "function", "function": {"name": "Now"}}
    for mode in ("auto", "required"):
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [reference]}}
        for seed in range(3):
            choice = ask(hermes, tool_choice=allowed, seed=seed, max_tokens=120).choices[0]
            assert set(check_calls(choice.message)) <= {"Now"}
            assert choice.message.tool_calls or mode == "auto"
    for seed in range(3):
        choice = ask(hermes, tool_choice="none", seed=seed, max_tokens=40).choices[0]
        assert choice.message.tool_calls is None and choice.finish_reason != "tool_calls"
        one = ask(hermes, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        assert len(check_calls(one.message)) == 1
        named = ask(hermes, tool_choice=reference, seed=seed).choices[0]
        assert check_calls(named.message) == ["Now"]


@pytest.mark.client("openai", "chat.completions.create(tools, stream)")
def test_auto_holds_the_calls_that_a_model_opens(caller: Running) -> None:
    """In the middle of free text, whole and streamed."""
    names: list[str] = []
    for seed in range(10):
        choice = ask(caller, seed=seed, max_tokens=300).choices[0]
        names += check_calls(choice.message)
        text = choice.message.content or ""
        assert "<tool_call>" not in text
        pieces = [chunk.choices[0].delta for chunk in ask(caller, seed=seed, max_tokens=300, stream=True)]
        assert "".join(piece.content or "" for piece in pieces) == text
        parts = [part.function for piece in pieces for part in piece.tool_calls or ()]
        assert [part.name for part in parts if part.name] == [
            call.function.name for call in choice.message.tool_calls or ()
        ]
        assert "".join(part.arguments for part in parts) == "".join(
            call.function.arguments for call in choice.message.tool_calls or ()
        )
    assert len(names) >= 5 and {*names} == {"get_weather", "Now"}


def test_a_loop_of_two_turns(hermes: Running) -> None:
    client = hermes.client()
    messages: list[Any] = list(HELLO)
    asked: Any = dict(model=MODEL, tools=TOOLS, max_tokens=400, seed=5)
    first = client.chat.completions.parse(messages=messages, tool_choice="required", **asked).choices[0].message
    messages.append(first)
    for call in first.tool_calls or ():
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "it rains"})
    again = {"return_prompt_text": True}
    second = client.chat.completions.create(messages=messages, extra_body=again, **asked)
    text = second.model_extra["prompt_text"] if second.model_extra else ""
    for call in first.tool_calls or ():
        assert f'"name": "{call.function.name}"' in text
        assert json.dumps(json.loads(call.function.arguments), ensure_ascii=False) in text
    assert text.count("<tool_response>\nit rains\n</tool_response>") == len(first.tool_calls or ())
    check_calls(second.choices[0].message)


@pytest.mark.client("openai", "chat.completions.create(tools, response_format)")
def test_content_is_held_to_its_shape_and_calls_to_their_tools(hermes: Running) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    found = set()
    for seed in range(10):
        choice = ask(hermes, response_format=shape, seed=seed, temperature=2.0).choices[0]
        assert choice.finish_reason in ("stop", "tool_calls")
        names = check_calls(choice.message)
        assert names or json.loads(choice.message.content) in ("yes", "no")
        found.add(bool(names))
    assert found


@pytest.mark.parametrize("budget", [0, 1, 20])
def test_reasoning_has_a_budget_and_shapes_begin_after_it(thinking: Running, budget: int) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    for seed in range(3):
        asked: Any = dict(response_format=shape, tools=[], seed=seed, max_tokens=200)
        bias = {str(ord(one)): 20 for one in "<think>"} if budget else None
        choice = ask(thinking, **asked, logit_bias=bias, extra_body={"thinking_token_budget": budget}).choices[0]
        assert json.loads(choice.message.content) in ("yes", "no")
        reasoning = getattr(choice.message, "reasoning", "") or ""
        assert len(reasoning.encode()) <= budget  # of this tokenizer a token is a byte


@pytest.mark.parametrize("tools", [TOOLS, openai.omit])
def test_white_space_is_as_asked_behind_reasoning_and_beside_tools(thinking: Running, tools: Any) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 3, "maxItems": 5}
    for option, allowed in (({"disable_any_whitespace": True}, set()), ({"whitespace_pattern": "\n"}, {"\n"})):
        extra: Any = {"structured_outputs": {"json": schema, **option}, "thinking_token_budget": 8}
        written = ""
        for seed in range(6):
            message = ask(thinking, tools=tools, seed=seed, extra_body=extra).choices[0].message
            assert message.content or message.tool_calls
            if message.content:
                jsonschema_rs.validate(schema, json.loads(message.content))
                written += message.content
        assert written and {one for one in written if one.isspace()} == allowed


TAG = {"begin": "<n>", "content": {"type": "regex", "pattern": "[0-9 ]{1,4}"}, "end": "</n>"}
DIGITS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 4, "maxItems": 4}
OLDER = {"begin": "<n>", "schema": {"type": "array", "items": {"type": "null"}, "maxItems": 2}, "end": "</n>"}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"format": {"type": "tag", **TAG}}, r"<n>[0-9 ]{1,4}</n>"),
        ({"format": {"type": "json_schema", "json_schema": DIGITS}}, r"\[[0-9](,[0-9]){3}\]"),
        (
            {"format": {"type": "triggered_tags", "triggers": ["<n>"], "tags": [TAG], "at_least_one": True}},
            r"<n>[0-9 ]{1,4}</n>.*",
        ),
        ({"structures": [OLDER], "triggers": ["<n>"]}, r"((?!<n>).)*(<n>\[(null(,null)?)?\]</n>((?!<n>).)*)*"),
    ],
)
def test_structural_tags_begin_after_the_reasoning(thinking: Running, form: Any, pattern: str) -> None:
    shape = {"structural_tag": json.dumps({"type": "structural_tag", **form}), "disable_any_whitespace": True}
    extra: Any = {"structured_outputs": shape, "thinking_token_budget": 8}
    extra |= {"continue_final_message": True, "add_generation_prompt": False}
    begun = [*HELLO, {"role": "assistant", "content": "<think>\n"}]
    reasoned = 0
    for seed in range(6):
        choice = ask(thinking, tools=[], messages=begun, seed=seed, max_tokens=120, extra_body=extra).choices[0]
        reasoned += bool(getattr(choice.message, "reasoning", ""))
        assert re.fullmatch(pattern, choice.message.content, re.DOTALL), choice
    assert reasoned


def test_a_tag_that_bounds_the_reasoning_itself_is_all_of_the_answer(thinking: Running) -> None:
    bound = {"begin": "", "end": "</think>", "max_tokens": 4}
    tag = {"type": "structural_tag", "format": {"type": "tag", **TAG}, "reasoning": bound}
    choice = ask(thinking, tools=[], extra_body={"structured_outputs": {"structural_tag": tag}}).choices[0]
    assert re.fullmatch(r"<n>[0-9 ]{1,4}</n>", choice.message.content)


def test_yaml_begins_after_the_reasoning_and_stands_beside_tools(thinking: Running) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1}
    for seed in range(4):
        asked: Any = dict(seed=seed, max_tokens=200, extra_body={"structured_outputs": {"yaml": schema}})
        choice = ask(thinking, tools=TOOLS if seed % 2 else [], temperature=1.5, **asked).choices[0]
        assert choice.finish_reason in ("stop", "tool_calls")
        names = check_calls(choice.message)
        assert names or jsonschema_rs.is_valid(schema, read(choice.message.content))


def test_no_thinking_by_the_template(thinking: Running) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}, "return_prompt_text": True}
    answer = ask(thinking, tools=[], max_tokens=10, extra_body=off)
    assert answer.model_extra["prompt_text"].endswith("<think>\n\n</think>\n\n")
    assert not hasattr(answer.choices[0].message, "reasoning")


def test_tokenize_takes_tools(hermes: Running) -> None:
    def count(**more: Any) -> int:
        body = {"messages": HELLO, **more}
        found: int = httpx.post(f"{hermes.url}/tokenize", json=body).json()["count"]
        return found

    assert count(tools=TOOLS) == ask(hermes, max_tokens=1).usage.prompt_tokens > count() + 200


def test_the_format_is_told(hermes: Running, thinking: Running) -> None:
    card = hermes.client().models.list().data[0].model_extra or {}
    assert (card["tool_call_parser"], card["reasoning_parser"]) == ("hermes", "none")
    (decision,) = [one for one in thinking.engine.decisions if one.name == "answers"]
    assert decision.value == "hermes, reasoning qwen3" and "chat template" in decision.reason


def tool(name: Any = "f", parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


LARGE = {"type": "object", "properties": {"x": {"enum": ["y" * 2**21]}}}
NAMED = {"type": "function", "function": {"name": "absent"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "is required"),
        ({"tools": [tool(), tool("")]}, "tools[1].function.name", "1 to 64 letters"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "as of another tool"),
        ({"tools": [tool(), tool("g", [])]}, "tools[1].function.parameters", "must be an object"),
        ({"tools": [tool("g", {"type": "string"})]}, "tools[0].function.parameters", "of type object, not string"),
        ({"tools": [tool("g", {"type": "object", "properties": {"a": {"not": {}}}})]}, "tools[0].function.parameters", "'not' at #/properties/a"),
        ({"tools": [tool(), tool("g", {"properties": {"a": {"pattern": "("}}})]}, "tools[1].function.parameters", "cannot be held"),
        ({"tools": [tool(parameters=LARGE)]}, "tools", "limited to 131,072 characters"),
        ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools", "limited to 128 tools, got 129"),
        ({"tools": [tool(stict=True)]}, "tools[0].function.stict", "did you mean"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "of type function only"),
        ({"tool_choice": NAMED}, "tool_choice", "'absent', which is no tool of this request (get_weather, Now)"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}}, "tool_choice", "tools[0].function.name is 'absent'"),
        ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must hold function"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "required needs tools"),
        ({"functions": [{"name": "f"}]}, "functions", "send tools and tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call", "send tools and tool_choice"),
        ({"extra_body": {"thinking_token_budget": 5}}, "thinking_token_budget", "no reasoning"),
        ({"extra_body": {"thinking_token_budget": -1}}, "thinking_token_budget", "at least 0"),
        ({"extra_body": {"structured_outputs": {"json": {}, "whitespace_pattern": "("}}}, "structured_outputs", "structured_outputs.whitespace_pattern: is no regular expression"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: foo"}}}, "structured_outputs", "structured_outputs.grammar: is taken for Lark"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"properties": {"a": {"not": {}}}}}}}, "response_format", "response_format.json_schema.schema: the keyword 'not' at #/properties/a"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "is required"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id", "belongs to the role tool"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]}]}, "messages", "messages[0].tool_calls[0].function.arguments is no JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_that_names_field_and_place(
    hermes: Running, body: dict[str, Any], param: str, text: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(hermes, stream=stream, **body)
    assert text in caught.value.message and caught.value.param == param
    assert ask(hermes, max_tokens=2).choices
