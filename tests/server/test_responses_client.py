"""OpenAI's client, unchanged, against /v1/responses: what it types, it validates here, every event too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from quire.llm import AsyncLLM
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from quire.server.http.stored import AddParts, Put
from quire.server.store.database import SqliteStore
from quire.text.parsers.choose import choose
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine
from tests.server.tool_models import THINKING

EVENT = TypeAdapter(ResponseStreamEvent)
TEXT_EVENTS = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
               "output_text.done", "content_part.done", "output_item.done", "completed"]  # fmt: skip
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


def memory() -> SqliteStore:
    return SqliteStore(None, most_bytes=2**26, days=1)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    instance = start(FakeEngine(), store=memory())
    yield instance
    instance.stop()


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return running.client()


@pytest.fixture
def engine(running: Running) -> Iterator[FakeEngine]:
    """One that says what it is told to, in the format of Qwen 3."""
    plain = running.engine.answer_format
    running.engine.answer_format = choose(THINKING, {})
    yield running.engine
    running.engine.says, running.engine.answer_format = None, plain


def valid(response: Any) -> Response:
    return Response.model_validate(response.to_dict(), strict=True)


def read(stream: Any) -> list[Any]:
    """All events, each of which its type validates, and which are numbered through."""
    events = list(stream)
    for event in events:
        EVENT.validate_python(event.to_dict(), strict=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def kinds(events: list[Any]) -> list[str]:
    """Their types, of deltas in a row one."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for number, name in enumerate(names) if not number or name != names[number - 1]]


@pytest.mark.client("openai", "responses.create(input, instructions, max_output_tokens)")
def test_text(client: openai.OpenAI, running: Running) -> None:
    response = valid(client.responses.create(input="hello", instructions="be short", max_output_tokens=5))
    assert response.id.startswith("resp_") and response.output_text == "abcde"
    assert (response.status, response.incomplete_details and response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert response.usage is not None and response.usage.output_tokens == 5
    assert running.engine.calls[-2]["messages"] == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hello"},
    ]
    whole = valid(client.responses.create(input="hello"))
    assert (whole.status, whole.incomplete_details, whole.output[0].type) == ("completed", None, "message")


@pytest.mark.client("openai", "responses.create(stream)", "responses.stream")
def test_events_of_text(client: openai.OpenAI) -> None:
    events = read(client.responses.create(input="hello", stream=True))
    assert kinds(events) == TEXT_EVENTS
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == "abcdefghijklmnopqrst"
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    with client.responses.stream(model="tiny", input="hello") as stream:
        assert stream.get_final_response().output_text == text


@pytest.mark.client("openai", "responses.create(tools, stream)", "responses.stream(tools)")
def test_events_of_reasoning_and_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Taipei"}}\n</tool_call>'
    engine.says = f"<think>\nwhere?\n</think>\n\nLet me see.\n{call}\n{call}"
    events = read(client.responses.create(input="weather?", tools=[WEATHER], stream=True))
    item = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    arguments = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert kinds(events) == [
        *("created", "in_progress"),
        *(*item[0], "reasoning_text.delta", "reasoning_text.done", *item[1]),
        *(*item[0], "output_text.delta", "output_text.done", *item[1]),
        *arguments,
        *arguments,
        "completed",
    ]
    response = events[-1].response
    assert [part.type for part in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output[0].content[0].text.strip() == "where?" and response.output_text.strip() == "Let me see."
    assert json.loads(response.output[3].arguments) == {"city": "Taipei"}
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    with client.responses.stream(model="tiny", input="weather?", tools=[WEATHER]) as stream:
        parsed = stream.get_final_response()
    assert parsed.output[2].parsed_arguments == {"city": "Taipei"}  # type: ignore[union-attr]


@pytest.mark.client("openai", "responses.create(previous_response_id, tools)")
def test_the_result_of_a_call_goes_on_from_it(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.says = (
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Taipei"}}\n</tool_call>'
    )
    first = client.responses.create(input="weather?", tools=[WEATHER])
    call = first.output[-1]
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    engine.says = "<think>\n\n</think>\n\nTake an umbrella."
    kept = client.responses.create(input=[result], previous_response_id=first.id, tools=[WEATHER], instructions="x")
    by_hand = client.responses.create(
        input=[{"role": "user", "content": "weather?"}, *first.output, result],  # type: ignore[list-item]
        tools=[WEATHER],
        instructions="x",
        store=False,
    )
    told = [item["messages"] for item in engine.calls if "messages" in item][-2:]
    assert told[0] == told[1] and [message["role"] for message in told[0]] == ["system", "user", "assistant", "tool"]
    assert told[0][2]["tool_calls"][0]["function"]["name"] == "weather"
    assert told[0][2]["reasoning_content"].strip() == "hm"
    assert kept.output_text == by_hand.output_text and kept.previous_response_id == first.id


def test_each_turn_stands_after_those_before_it(client: openai.OpenAI, running: Running) -> None:
    name = None
    for text in ("one", "two", "three"):
        name = client.responses.create(input=text, previous_response_id=name, max_output_tokens=2).id
    told = [item["messages"] for item in running.engine.calls if "messages" in item][-1]
    assert [message["content"] for message in told] == ["one", "ab", "two", "ab", "three"]


@pytest.mark.client("openai", "responses.parse(text_format)")
def test_parse(client: openai.OpenAI, engine: FakeEngine) -> None:
    class Place(BaseModel):
        city: str

    engine.says = '<think>\n\n</think>\n\n{"city": "Taipei"}'
    parsed = client.responses.parse(model="tiny", input="where?", text_format=Place)
    assert parsed.output_parsed == Place(city="Taipei")
    held = [item["params"] for item in engine.calls if "params" in item][-1].structured_outputs
    assert held is not None and "city" in str(held)


@pytest.mark.client(
    "openai",
    "responses.retrieve",
    "responses.input_items.list(limit)",
    "responses.input_items.list(order, after)",
    "responses.delete",
    "responses.create(metadata, include)",
)
def test_retrieve_input_items_and_delete(client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"m{number}"} for number in range(5)]
    made = client.responses.create(
        input=items, metadata={"a": "b"}, user="me", include=["message.output_text.logprobs"]
    )
    found = valid(client.responses.retrieve(made.id))
    assert found.to_dict() == made.to_dict() and found.metadata == {"a": "b"} and found.store is True
    page = client.responses.input_items.list(made.id, limit=2)
    ResponseItemList.model_validate(page.to_dict())
    texts = [item.content[0].text for item in client.responses.input_items.list(made.id, limit=2)]  # type: ignore[union-attr]
    assert texts == ["m4", "m3", "m2", "m1", "m0"] and page.has_more  # type: ignore[attr-defined]
    ordered = client.responses.input_items.list(made.id, order="asc", after=page.data[0].id)
    assert list(ordered) == []
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(made.id)
    assert caught.value.code == "not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input="x", previous_response_id=made.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_what_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    made = client.responses.create(input="x", store=False)
    assert made.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


@pytest.mark.client("openai", "responses.create(background)")
def test_background(client: openai.OpenAI, running: Running) -> None:
    made = valid(client.responses.create(input="held", background=True))
    assert made.status == "queued" and made.output == []
    assert client.responses.retrieve(made.id).status == "queued"
    running.engine.released.set()
    assert wait_until(lambda: client.responses.retrieve(made.id).status == "completed")
    running.engine.released.clear()
    assert valid(client.responses.retrieve(made.id)).output_text == "abcdefghijklmnopqrst"


@pytest.mark.client("openai", "responses.create(background, stream)", "responses.retrieve(stream, starting_after)")
def test_a_background_stream_is_followed_from_any_event(client: openai.OpenAI, running: Running) -> None:
    stream = client.responses.create(input="held", background=True, stream=True)
    seen = [next(stream) for _ in range(5)]
    stream.close()
    name = seen[0].response.id  # type: ignore[union-attr]
    follower = client.responses.retrieve(name, stream=True, starting_after=seen[-1].sequence_number)
    running.engine.released.set()
    rest = list(follower)
    running.engine.released.clear()
    numbers = [event.sequence_number for event in [*seen, *rest]]
    assert numbers == list(range(len(numbers))) and rest[-1].type == "response.completed"
    assert wait_until(lambda: client.responses.retrieve(name).status == "completed")
    again = read(client.responses.retrieve(name, stream=True))
    assert [event.to_dict() for event in again] == [event.to_dict() for event in [*seen, *rest]]


@pytest.mark.parametrize(("refused", "status"), [("the end", "failed"), ("the events", "completed")])
def test_one_in_the_background_that_the_store_does_not_take(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch, refused: str, status: str
) -> None:
    store: Any = running.server._context.store
    write = store.write

    async def refusing(*changes: Any) -> None:
        ends = any(isinstance(one, Put) and one.item.body["status"] == "completed" for one in changes)
        events = any(isinstance(one, AddParts) and one.place.endswith("/events") for one in changes)
        if ends if refused == "the end" else events:
            raise ApiError(507, "full")
        await write(*changes)

    monkeypatch.setattr(store, "write", refusing)
    events = read(client.responses.create(input="ab", background=True, stream=True))
    name = events[0].response.id
    assert wait_until(lambda: client.responses.retrieve(name).status == status)
    found = client.responses.retrieve(name)
    assert (found.output_text == "") is (status == "failed") and (found.error is None) is (status == "completed")


@pytest.mark.client("openai", "responses.cancel")
def test_cancel(client: openai.OpenAI, running: Running) -> None:
    made = client.responses.create(input="held", background=True)
    assert wait_until(lambda: running.engine.num_running == 1)
    assert valid(client.responses.cancel(made.id)).status == "cancelled"
    assert running.engine.num_running == 0 and client.responses.retrieve(made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled"
    foreground = client.responses.create(input="x")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(foreground.id)


def test_a_failure_is_said_in_each_way(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="the row broke"):
        client.responses.create(input="fail")
    events = read(client.responses.create(input="fail", stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.error.message == "the row broke"
    assert events[-1].response.output[0].status == "incomplete"
    made = client.responses.create(input="fail", background=True)
    assert wait_until(lambda: client.responses.retrieve(made.id).status == "failed")


@pytest.mark.client("openai", "responses.create(truncation)")
def test_truncation_leaves_out_the_oldest(client: openai.OpenAI, running: Running) -> None:
    items: Any = [{"role": "user", "content": letter * 90} for letter in "abcdefgh"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input=items)
    assert caught.value.param == "input"
    assert client.responses.create(input=items, truncation="auto").truncation == "auto"
    kept = [item["messages"] for item in running.engine.calls if "messages" in item][-1]
    assert 1 < len(kept) < 8 and kept[-1]["content"] == "h" * 90
    with pytest.raises(openai.BadRequestError):
        client.responses.create(input=[{"role": "user", "content": "x" * 600}], truncation="auto")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "c"}]}, "input[0].arguments"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": 10**6}, "max_output_tokens"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]},
         "tools[0].parameters"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "x", "reasoning": {"summary": "detailed"}}, "reasoning"),
        ({"input": "x", "include": ["web_search_call.action.sources"]}, "include"),
        ({"input": "x", "top_logprobs": 3}, "top_logprobs"),
        ({"input": "x", "background": True, "store": False}, "background"),
        ({"input": "x", "previous_response_id": "resp_1", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "max_tool_calls": 3}, "max_tool_calls"),
        ({"input": "x", "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"input": "x", "temprature": 1}, "temprature"),
        ({"input": "x", "n": 2}, "n"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", cast_to=object, body=body)
    assert caught.value.param is not None and caught.value.param.startswith(param), caught.value.message
    assert param.partition(".")[0].partition("[")[0] in caught.value.message


def test_limits_and_keys() -> None:
    limits = Limits().with_values({"input_items": 3, "background_responses": 1})
    instance = start(FakeEngine(), store=memory(), api_key=["a", "b"], limits=limits)
    a, b = (openai.OpenAI(base_url=f"{instance.url}/v1", api_key=key, max_retries=0) for key in "ab")
    try:
        with pytest.raises(openai.BadRequestError, match=r"3 items.*got 4"):
            a.responses.create(input=[{"role": "user", "content": "x"}] * 4)
        made = a.responses.create(input="x")
        following = a.responses.create(input="x", previous_response_id=made.id)
        with pytest.raises(openai.BadRequestError, match="input is limited to 3"):
            a.responses.create(input="x", previous_response_id=following.id)
        for call in (b.responses.retrieve, b.responses.delete, b.responses.cancel, b.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        with pytest.raises(openai.NotFoundError):
            b.responses.create(input="x", previous_response_id=made.id)
        a.responses.create(input="held", background=True)
        with pytest.raises(openai.RateLimitError, match="background"):
            a.responses.create(input="held", background=True)
        b.responses.create(input="held", background=True)
        instance.engine.released.set()
    finally:
        instance.stop()


def test_without_a_store_answers_are_given_and_not_kept() -> None:
    instance = start(FakeEngine())
    client = instance.client()
    try:
        assert client.responses.create(input="x").to_dict()["store"] is False
        with pytest.raises(openai.InternalServerError, match="no store"):
            client.responses.create(input="x", background=True)
        with pytest.raises(openai.InternalServerError, match="no store"):
            client.responses.retrieve("resp_1")
    finally:
        instance.stop()


def test_a_real_model_says_the_same_as_the_chat(tiny_model: Path) -> None:
    engine = AsyncLLM(str(tiny_model), max_num_seqs=4)
    instance = start(engine, store=memory())
    client = instance.client()
    try:
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=20, temperature=0, logprobs=True
        )
        made = client.responses.create(
            input="hi", max_output_tokens=20, temperature=0, include=["message.output_text.logprobs"]
        )
        assert made.output_text == chat.choices[0].message.content
        part = made.output[0].content[0]  # type: ignore[union-attr]
        assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
        told = [(item.token, item.logprob) for item in chat.choices[0].logprobs.content]
        assert [(item.token, item.logprob) for item in part.logprobs] == told  # type: ignore[union-attr]
        events = read(
            client.responses.create(
                input="hi", max_output_tokens=20, temperature=0, stream=True, include=["message.output_text.logprobs"]
            )
        )
        assert events[-1].response.output_text == made.output_text
        assert events[-1].response.usage == made.usage and made.usage is not None
        assert chat.usage is not None and chat.usage.prompt_tokens == made.usage.input_tokens
    finally:
        instance.stop()
        engine.close()
