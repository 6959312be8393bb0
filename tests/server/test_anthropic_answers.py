"""Anthropic's API over an engine that says what a test wants: blocks, conversations as templates get them, refusals,
keys."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from quire.server.doors.all import DOORS
from quire.text.parsers.choose import choose
from tests.server.conftest import MODEL, Running, start
from tests.server.fake_engine import FakeEngine
from tests.server.test_anthropic_client import connect, without_ids
from tests.server.test_tool_answers import ANSWERS
from tests.server.tool_models import THINKING

HELLO: Any = [{"role": "user", "content": "hello"}]
PLACE = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: Any = [
    {"name": "get_weather", "description": "Of a city.", "input_schema": PLACE},
    {"name": "now", "input_schema": {}},
]
BASE: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "messages": HELLO}
VERSIONED = "anthropic-version"


@pytest.fixture(scope="module")
def telling() -> Iterator[Running]:
    engine = FakeEngine()
    engine.answer_format = choose(THINKING, {})
    running = start(engine, apis=DOORS)
    yield running
    running.stop()


@pytest.fixture
def http(telling: Running) -> Iterator[httpx.Client]:
    telling.engine.says = None
    with httpx.Client(base_url=telling.url, headers={VERSIONED: "2023-06-01"}) as session:
        yield session


def ask(telling: Running, says: str, **body: Any) -> Any:
    telling.engine.says = says
    return connect(telling).messages.create(**{**BASE, "tools": TOOLS, "max_tokens": 400, **body})


def streamed(telling: Running, says: str, **body: Any) -> Any:
    telling.engine.says = says
    with connect(telling).messages.stream(**{**BASE, "tools": TOOLS, "max_tokens": 400, **body}) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("says", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("thinking", [None, {"type": "adaptive"}, {"type": "adaptive", "display": "omitted"}])
def test_a_stream_says_what_the_whole_answer_says(telling: Running, says: str, thinking: Any) -> None:
    body = {} if thinking is None else {"thinking": thinking}
    whole, stream = without_ids(ask(telling, says, **body)), without_ids(streamed(telling, says, **body))
    assert stream == whole
    assert ("thinking" in [block["type"] for block in whole["content"]]) == (
        says.startswith("<think>") and bool(thinking)
    )


def test_blocks_of_an_answer(telling: Running) -> None:
    answer = ask(telling, ANSWERS["reasoning and calls"], thinking={"type": "enabled", "budget_tokens": 9})
    thought, first, second = answer.content
    assert thought.type == "thinking" and thought.thinking == "Hm?" and thought.signature
    assert (first.name, first.input) == ("get_weather", {"city": "Köln", "days": 2})
    assert (second.name, second.input) == ("now", {}) and first.id != second.id
    held = telling.engine.calls[-1]["params"].structured_outputs
    assert '"max_tokens":9' in str(held.structural_tag).replace(" ", "").replace("'", '"')
    hidden = ask(telling, ANSWERS["reasoning"], thinking={"type": "adaptive", "display": "omitted"}).content
    assert [(block.type, getattr(block, "thinking", None)) for block in hidden] == [("thinking", ""), ("text", None)]
    assert hidden[0].signature == ask(telling, ANSWERS["reasoning"], thinking={"type": "adaptive"}).content[0].signature


def test_templates_are_told_whether_to_think(telling: Running) -> None:
    for thinking, told in ((None, False), ({"type": "disabled"}, False), ({"type": "adaptive"}, True)):
        ask(telling, "x", output_config={"effort": "low"}, **({} if thinking is None else {"thinking": thinking}))
        asked = next(call for call in reversed(telling.engine.calls) if "messages" in call)
        assert asked["chat_template_kwargs"] == {"enable_thinking": told, "reasoning_effort": "low"}


def test_a_conversation_as_templates_take_it(telling: Running) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}, "caller": None}
    result = {"type": "tool_result", "tool_use_id": "toolu_1"}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "text", "text": "Let me", "citations": None},
            {"type": "text", "text": "look."},
            use,
        ]},
        {"role": "user", "content": [
            {**result, "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "net"}], "is_error": True},
            {"type": "text", "text": "so?"},
        ]},
        {"role": "assistant", "content": "It"},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    ask(telling, "x", messages=messages, system=system, tools=TOOLS[:1])
    asked = next(call for call in reversed(telling.engine.calls) if "messages" in call)
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "Let me\nlook.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"type": "function", "id": "toolu_1", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: no\nnet"},
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": "It"},
    ]
    assert asked["continue_final_message"] is True and asked["add_generation_prompt"] is False
    shown = {"name": "get_weather", "description": "Of a city.", "parameters": PLACE}
    assert asked["tools"] == [{"type": "function", "function": shown}]


def test_sampling_goes_to_the_engine(http: httpx.Client, telling: Running) -> None:
    body = {
        **BASE,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "stop_sequences": ["q"],
        "metadata": {"user_id": "u"},
    }
    assert http.post("/v1/messages", json=body).status_code == 200
    params = telling.engine.calls[-1]["params"]
    assert (params.temperature, params.top_p, params.top_k) == (0.25, 0.5, 7)
    assert list(params.stop) == ["q"] and params.max_tokens == 4


def turn(*blocks: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": list(blocks)}]


USE = {"type": "tool_use", "id": "t", "name": "now", "input": {}}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is required"),
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
    ({"max_tokens": True}, "max_tokens must be"),
    ({"model": None}, "model is required"),
    ({"messages": []}, "messages must be a list that is not empty"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role must be user or assistant"),
    ({"messages": turn({"type": "image", "source": {}})}, "messages[0].content[0] of type 'image' is not supported"),
    ({"messages": turn({"type": "document", "source": {}})}, "messages[0].content[0] of type 'document' is not"),
    ({"messages": turn({"type": "redacted_thinking", "data": "x"}, role="assistant")}, "'redacted_thinking' is not"),
    ({"messages": turn({"type": "text"})}, "messages[0].content[0].text is required in text"),
    ({"messages": turn({"type": "text", "text": "x", "id": "y"})}, "messages[0].content[0].id does not belong to text"),
    ({"messages": turn(USE)}, "messages[0].content[0] of type tool_use belongs to the role assistant"),
    ({"messages": turn(USE, role="assistant")}, "messages[0] calls tools: a tool_result for each must follow"),
    ({"messages": turn({"type": "tool_result", "tool_use_id": "z"})}, "tool_use_id is 'z', which no tool_use before"),
    ({"system": [{"type": "image"}]}, "system[0] of type 'image' is not supported"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0] of type 'web_search_2025"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name must be"),
    ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema must be of type object"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].name is 'get_weather', as of another tool"),
    ({"tool_choice": {"type": "any"}}, "tool_choice of type any needs tools"),
    ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "tool_choice.name belongs to tool_choice of type tool"),
    ({"tool_choice": {"type": "tool", "name": "x"}, "tools": TOOLS}, "tool_choice.name is 'x', which is no tool"),
    ({"tool_choice": {"type": "none", "disable_parallel_tool_use": True}}, "tool_choice.disable_parallel_tool_use"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens belongs to thinking of type enabled, which needs it"),
    ({"thinking": {"type": "enabled", "budget_tokens": 4}}, "thinking.budget_tokens must be less than max_tokens (4)"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type must be enabled, disabled or adaptive"),
    ({"temperature": -1}, "temperature must be"),
    ({"top_k": 1.5}, "top_k must be"),
    ({"stop_sequences": "x"}, "stop_sequences must be a list"),
    ({"stop_sequences": ["x" * 2000]}, "stop_sequences"),
    ({"output_config": {"format": {"type": "json_schema", "schema": "x"}}}, "output_config.format.schema must be"),
    ({"cache_control": {"type": "lasting"}}, "cache_control.type must be ephemeral"),
    ({"container": "x"}, "container is not supported"),
    ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
    ({"service_tier": "fast"}, "service_tier must be auto or standard_only"),
    ({"max_token": 4}, "unknown field 'max_token'; did you mean 'max_tokens'?"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSALS, ids=lambda value: str(value)[:40])
def test_a_refusal_names_the_field(http: httpx.Client, changes: dict[str, Any], says: str) -> None:
    response = http.post("/v1/messages", json={**BASE, **changes})
    found = response.json()
    assert response.status_code == 400, found
    assert found["type"] == "error" and found["error"]["type"] == "invalid_request_error"
    assert says in found["error"]["message"]
    assert found["request_id"] == response.headers["request-id"]


def test_errors_of_the_http_side_have_its_shape(http: httpx.Client, telling: Running) -> None:
    asks: list[tuple[int, str, Any]] = [
        (404, "not_found_error", lambda: http.post("/v1/messages", json={**BASE, "model": "other"})),
        (404, "not_found_error", lambda: http.post("/v1/messages/batches", json={})),
        (405, "invalid_request_error", lambda: http.get("/v1/messages")),
        (415, "invalid_request_error", lambda: http.post("/v1/messages", content=b"x")),
        (413, "request_too_large", lambda: http.post("/v1/messages", json={**BASE, "system": "x" * 9_000_000})),
        (400, "invalid_request_error", lambda: http.post("/v1/messages", json=BASE, headers={VERSIONED: "1"})),
        (400, "invalid_request_error", lambda: http.post("/v1/messages", json={**BASE, "system": "x" * 600})),
        (500, "api_error", lambda: http.post("/v1/messages", json={**BASE, "system": "fail"})),
    ]  # fmt: skip
    for status, kind, send in asks:
        response = send()
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
        assert response.json()["request_id"] == response.headers["request-id"]
    telling.engine.is_full = True
    try:
        for send in (http.post, lambda *at, **more: httpx.post(telling.url + at[0], **more)):
            full = send("/v1/messages", json=BASE)
            assert (full.status_code, full.json()["error"]["type"]) == (503, "overloaded_error")
            assert full.headers["retry-after"] and full.headers["request-id"] == full.json()["request_id"]
    finally:
        telling.engine.is_full = False


def test_an_error_in_a_stream_is_an_event(telling: Running) -> None:
    telling.engine.says = None
    with pytest.raises(anthropic.APIStatusError, match="the row broke") as caught:
        list(connect(telling).messages.create(**{**BASE, "system": "fail", "stream": True}))
    assert caught.value.type == "api_error"


def test_a_key_comes_in_either_header() -> None:
    locked = start(FakeEngine(), apis=DOORS, api_key=["one", "two"])
    try:
        assert connect(locked, "one").messages.create(**BASE).stop_reason == "max_tokens"
        with pytest.raises(anthropic.AuthenticationError) as caught:
            connect(locked, "three").messages.create(**BASE)
        assert caught.value.type == "authentication_error" and caught.value.request_id
        bearer = {"authorization": "Bearer two"}
        assert httpx.post(f"{locked.url}/v1/messages", json=BASE, headers=bearer).status_code == 200
        both = {"authorization": "Bearer one", "x-api-key": "two"}
        assert httpx.post(f"{locked.url}/v1/messages", json=BASE, headers=both).status_code == 401
        names = [call["caller"].name for call in locked.engine.calls if "caller" in call]
        assert len({*names}) == 2
    finally:
        locked.stop()


def test_usage_is_silent_on_the_cache_where_others_could_learn_of_it() -> None:
    shared = start(FakeEngine(), apis=DOORS, api_key=["one", "two"], share_prefix_cache=True)
    try:
        usage = connect(shared, "one").messages.create(**BASE).usage
        assert usage.cache_read_input_tokens is None and usage.cache_creation_input_tokens is None
        assert usage.input_tokens == len("user: hello\n")
    finally:
        shared.stop()


def test_what_reads_a_thread_is_told_to_send_all(http: httpx.Client) -> None:
    refused = http.post("/v1/messages?beta=true", json={**BASE, "thread": {"type": "create"}}).json()["error"]
    assert refused["details"]["error_code"] == "thread_unsupported_request" and "thread" in refused["message"]


def test_events_are_json_whose_type_stands_first(http: httpx.Client) -> None:
    text = http.post("/v1/messages", json={**BASE, "stream": True}).text
    for event in filter(None, text.split("\n\n")):
        name, data = event.splitlines()
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
