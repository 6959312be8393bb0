"""Anthropic's Messages API as its own client asks for it, unchanged: create, streams, tools, its runner of tools,
counts, models; over a tiny random model, whose calls are valid all the same."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import jsonschema_rs
import pydantic
import pytest
from anthropic import beta_tool
from anthropic.types import Message, RawMessageStreamEvent

from quire.llm import AsyncLLM
from quire.server.doors.all import DOORS
from tests.conftest import PATIENCE_S
from tests.server.conftest import MODEL, Running, start
from tests.server.tool_models import make_caller, make_tool_model

HELLO: Any = [{"role": "user", "content": "hello"}]
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"name": "get_weather", "description": "Of a city.", "input_schema": PLACE},
    {"name": "now", "input_schema": ZONE, "type": "custom", "cache_control": {"type": "ephemeral"}},
]
SCHEMAS = {tool["name"]: tool["input_schema"] for tool in TOOLS}


def connect(running: Running, key: str = "none") -> anthropic.Anthropic:
    timeout: Any = PATIENCE_S
    return anthropic.Anthropic(base_url=running.url, api_key=key, max_retries=0, timeout=timeout)


def _running(directory: Any) -> Iterator[Running]:
    running = start(AsyncLLM(str(directory), max_num_seqs=8), apis=DOORS)
    yield running
    running.stop()
    running.engine.close()


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from _running(make_tool_model(tmp_path_factory.mktemp("hermes") / "model"))


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a model that likes to open calls."""
    yield from _running(make_caller(tmp_path_factory.mktemp("caller") / "model"))


def ask(running: Running, *, seed: int | None = None, temperature: float = 1.0, **changes: Any) -> Any:
    """What the client has no argument for goes beside it. There is no seed: a prompt of its own stands for one."""
    messages = HELLO if seed is None else [{"role": "user", "content": f"hello {seed}"}]
    asked = {"model": MODEL, "messages": messages, "max_tokens": 200, **changes}
    return connect(running).messages.create(**asked, extra_body={"temperature": temperature})


def check_calls(message: Message) -> list[str]:
    """The names of its calls, each valid under its schema."""
    calls = [block for block in message.content if block.type == "tool_use"]
    for call in calls:
        jsonschema_rs.validator_for(SCHEMAS[call.name]).validate(call.input)
        assert call.id.startswith("toolu_")
    return [call.name for call in calls]


def without_ids(message: Any) -> Any:
    """What does not change from answer to answer."""
    found = message.model_dump(exclude={"id": True, "usage": {"cache_creation_input_tokens", "cache_read_input_tokens",
                                                              "input_tokens"}})  # fmt: skip
    for block in found["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    return found


@pytest.mark.client("anthropic", "messages.create")
def test_a_text(hermes: Running) -> None:
    answer = ask(hermes, temperature=0, max_tokens=5)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    assert answer.stop_reason == "max_tokens" and answer.stop_sequence is None
    assert answer.id.startswith("msg_") and answer._request_id == answer.id
    (block,) = answer.content
    assert block.type == "text" and block.text
    assert answer.usage.output_tokens == 5 and answer.usage.service_tier == "standard"


@pytest.mark.client("anthropic", "messages.create(stream, tools)", "messages.stream(tools)")
def test_a_stream_equals_the_whole_answer_event_by_event(caller: Running) -> None:
    """The client's own reader puts the stream together; calls in the middle of text among them."""
    kinds: set[str] = set()
    for length in (3, 40, 300):
        asked: Any = {"max_tokens": length, "tools": TOOLS, "temperature": 0}
        whole = ask(caller, **asked)
        events: list[RawMessageStreamEvent] = list(ask(caller, **asked, stream=True))
        kinds |= {event.type for event in events}
        assert events[0].type == "message_start" and events[0].message.content == []
        assert [event.type for event in events[-2:]] == ["message_delta", "message_stop"]
        _check_order(events)
        client, body = connect(caller), {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": length}
        with client.messages.stream(**body, extra_body={"temperature": 0}) as stream:  # type: ignore[arg-type]
            texts = "".join(stream.text_stream)
            streamed = stream.get_final_message()
        assert without_ids(streamed) == without_ids(whole)
        assert texts == "".join(block.text for block in whole.content if block.type == "text")
        check_calls(whole)
    assert kinds == {
        *("message_start", "content_block_start", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    }


def _check_order(events: list[RawMessageStreamEvent]) -> None:
    """One block after another, each with its beginning, deltas of its kind, its end."""
    deltas = {
        "text": {"text_delta"},
        "tool_use": {"input_json_delta"},
        "thinking": {"thinking_delta", "signature_delta"},
    }
    place, kind = -1, ""
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert not kind and event.index == place + 1
            place, kind = event.index, event.content_block.type
        elif event.type == "content_block_delta":
            assert event.index == place and event.delta.type in deltas[kind]
        else:
            assert event.type == "content_block_stop" and event.index == place and kind
            kind = ""
    assert not kind


@pytest.mark.client("anthropic", "messages.create(tools, tool_choice)")
def test_choices_of_tools(hermes: Running) -> None:
    for seed in range(3):
        some = ask(hermes, seed=seed, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=400)
        assert check_calls(some) and some.stop_reason == "tool_use"
        assert all(block.type == "tool_use" for block in some.content)
        one = {"type": "any", "disable_parallel_tool_use": True}
        assert len(check_calls(ask(hermes, seed=seed, tools=TOOLS, tool_choice=one, max_tokens=400))) == 1
        named = {"type": "tool", "name": "now"}
        assert check_calls(ask(hermes, seed=seed, tools=TOOLS, tool_choice=named, max_tokens=400)) == ["now"]
        assert check_calls(ask(hermes, seed=seed, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=40)) == []


def test_a_loop_of_two_turns(hermes: Running) -> None:
    """What the client makes of an answer is taken back as it is."""
    messages: list[Any] = [*HELLO]
    answer = ask(hermes, messages=messages, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=400)
    messages.append({"role": "assistant", "content": answer.content})
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "it rains"}]}
        for block in answer.content
    ]
    messages.append({"role": "user", "content": [*results, {"type": "text", "text": "so?"}]})
    again = ask(hermes, messages=messages, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=3)
    assert again.stop_reason == "max_tokens"


@pytest.mark.client("anthropic", "beta.messages.tool_runner(tools, tool_choice)")
def test_its_runner_of_tools(hermes: Running) -> None:
    cities: list[str] = []

    @beta_tool
    def get_weather(city: Literal["Bern", "Oslo"]) -> str:
        """The weather of a city."""
        cities.append(city)
        return "it rains"

    runner = connect(hermes).beta.messages.tool_runner(
        model=MODEL,
        messages=HELLO,
        tools=[get_weather],
        tool_choice={"type": "tool", "name": "get_weather"},
        max_tokens=200,
        max_iterations=2,
    )
    answers = list(runner)
    assert len(answers) == 2 and len(cities) >= 1 and {*cities} <= {"Bern", "Oslo"}
    assert all(answer.stop_reason == "tool_use" for answer in answers)


class Person(pydantic.BaseModel):
    name: Literal["Ada", "Bob"]
    mood: Literal["good", "bad"]


@pytest.mark.client("anthropic", "messages.parse(output_format)")
def test_an_answer_is_parsed_into_a_model(hermes: Running) -> None:
    parsed = connect(hermes).messages.parse(model=MODEL, messages=HELLO, max_tokens=400, output_format=Person)
    assert isinstance(parsed.parsed_output, Person)


@pytest.mark.client("anthropic", "messages.create(stop_sequences)")
def test_stop_sequences(real: Running, hermes: Running) -> None:
    text = ask(hermes, temperature=0, max_tokens=20).content[0].text
    stop = text[4:6]
    answer = ask(hermes, temperature=0, max_tokens=20, stop_sequences=["nowhere in it", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in answer.content) == text[: text.index(stop)]


def test_a_budget_needs_a_model_that_reasons(hermes: Running) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(hermes, thinking={"type": "enabled", "budget_tokens": 12})
    assert (caught.value.api_message or "").startswith("thinking.budget_tokens: ")


def test_the_window_ends_an_answer(real: Running, hermes: Running) -> None:
    """A length that does not fit is no error: agents ask for more than most models have."""
    last = ask(hermes, temperature=0, max_tokens=30000, messages=[{"role": "user", "content": "x" * 4060}])
    assert last.stop_reason in ("model_context_window_exceeded", "end_turn")
    used = last.usage
    total = used.input_tokens + (used.cache_creation_input_tokens or 0) + (used.cache_read_input_tokens or 0)
    assert last.stop_reason == "end_turn" or total + used.output_tokens == hermes.engine.max_model_len


@pytest.mark.client("anthropic", "messages.create(system)", "messages.count_tokens(system)")
def test_usage_says_what_the_cache_wrote_and_read(hermes: Running) -> None:
    client, block = connect(hermes), hermes.engine.prefix_block_size
    system: Any = [{"type": "text", "text": "Be brief. " * 20, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    count = client.messages.count_tokens(model=MODEL, messages=HELLO, system=system).input_tokens
    first, second = (ask(hermes, system=system, max_tokens=2).usage for _ in range(2))
    assert first.cache_read_input_tokens is not None and first.cache_read_input_tokens < block
    written = count // block * block
    assert first.cache_creation_input_tokens == written - first.cache_read_input_tokens
    assert first.input_tokens == count - written
    read = second.cache_read_input_tokens or 0
    assert written - block <= read <= written, "the last token of a prompt is computed anew"
    assert second.input_tokens + (second.cache_creation_input_tokens or 0) + read == count


@pytest.mark.client("anthropic", "messages.count_tokens", "messages.count_tokens(system, tools)")
def test_tokens_are_counted(hermes: Running) -> None:
    client = connect(hermes)
    few = client.messages.count_tokens(model=MODEL, messages=HELLO)
    more = client.messages.count_tokens(model=MODEL, messages=HELLO, system="Be brief.", tools=TOOLS)
    answer = ask(hermes, max_tokens=1)
    used = answer.usage
    assert few.input_tokens == used.input_tokens + used.cache_creation_input_tokens + used.cache_read_input_tokens
    assert more.input_tokens > few.input_tokens + len("Be brief.")


@pytest.mark.client("anthropic", "models.list", "models.retrieve")
def test_models(hermes: Running) -> None:
    client = connect(hermes)
    page = client.models.list()
    assert [model.id for model in page] == [MODEL] and page.has_more is False
    model = client.models.retrieve(MODEL)
    assert model.type == "model" and model.max_input_tokens == hermes.engine.max_model_len - 1
    assert model.capabilities is not None and not model.capabilities.image_input.supported
    assert client.models.list(after_id=MODEL).data == []
    with pytest.raises(anthropic.BadRequestError, match="after_id"):
        client.models.list(after_id="other")
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.type == "not_found_error"
    plain = httpx.get(f"{hermes.url}/v1/models").json()
    assert plain["object"] == "list", "without the header it is OpenAI's"


@pytest.mark.client("anthropic", "models.list(limit, before_id)")
def test_a_page_of_models() -> None:
    from tests.server.fake_engine import FakeEngine

    running = start(FakeEngine(), apis=DOORS)
    try:
        names = [f"m{number}" for number in range(5)]
        object.__setattr__(running.server.config.app.state.context, "served_names", tuple(names))  # type: ignore[union-attr]
        client = connect(running)
        assert [model.id for model in client.models.list(limit=2)] == names
        first = client.models.list(limit=2)
        assert ([model.id for model in first.data], first.has_more) == (names[:2], True)
        back = client.models.list(limit=2, before_id="m4")
        assert ([model.id for model in back.data], back.has_more) == (names[2:4], True)
    finally:
        running.stop()


def test_json_of_a_line(hermes: Running) -> None:
    """As a program without the client reads it: named events, whose names are their types; one ping."""
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "stream": True}
    headers = {"anthropic-version": "2023-06-01"}
    response = httpx.post(f"{hermes.url}/v1/messages", json=body, headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    names = []
    for event in filter(None, response.text.split("\n\n")):
        name, _, data = event.removeprefix("event: ").partition("\ndata: ")
        assert json.loads(data)["type"] == name
        names.append(name)
    assert names[:2] == ["message_start", "ping"] and names.count("ping") == 1 and names[-1] == "message_stop"
