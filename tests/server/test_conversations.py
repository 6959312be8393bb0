"""OpenAI's client, unchanged, against /v1/conversations."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.conversations import Conversation, ConversationItem, ConversationItemList
from pydantic import TypeAdapter

from quire.server.doors.openai.responses.keep import Keeper
from quire.server.http.limits import Limits
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine
from tests.server.test_responses_client import memory


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    limits = Limits().with_values({"input_items": 8})
    instance = start(FakeEngine(), store=memory(), api_key=["a", "b"], limits=limits)
    yield instance
    instance.stop()


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="a", max_retries=0)


def message(text: str) -> Any:
    return {"type": "message", "role": "user", "content": text}


def texts(items: Any) -> list[str]:
    return [item.content[0].text for item in items]


@pytest.mark.client(
    "openai",
    "conversations.create(items, metadata)",
    "conversations.retrieve",
    "conversations.update(metadata)",
    "conversations.delete",
    "conversations.items.create(items)",
    "conversations.items.list(limit)",
    "conversations.items.list(order, after)",
    "conversations.items.retrieve",
    "conversations.items.delete",
)
def test_a_conversation(client: openai.OpenAI) -> None:
    made = client.conversations.create(items=[message("one")], metadata={"a": "b"})
    Conversation.model_validate(made.to_dict(), strict=True)
    assert client.conversations.retrieve(made.id) == made and made.metadata == {"a": "b"}
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    added = client.conversations.items.create(made.id, items=[message("two"), message("three")])
    ConversationItemList.model_validate(added.to_dict(), strict=True)
    listed = list(client.conversations.items.list(made.id, limit=2))
    for item in listed:
        TypeAdapter(ConversationItem).validate_python(item.to_dict(), strict=True)
    assert texts(listed) == ["three", "two", "one"]
    assert texts(client.conversations.items.list(made.id, order="asc", after=listed[2].id)) == ["two", "three"]  # type: ignore[arg-type]
    assert client.conversations.items.retrieve(listed[1].id, conversation_id=made.id) == listed[1]  # type: ignore[arg-type]
    client.conversations.items.delete(listed[1].id, conversation_id=made.id)  # type: ignore[arg-type]
    assert texts(client.conversations.items.list(made.id)) == ["three", "one"]
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(listed[1].id, conversation_id=made.id)  # type: ignore[arg-type]
    assert client.conversations.delete(made.id).deleted is True
    for call in (client.conversations.retrieve, client.conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


@pytest.mark.client("openai", "responses.create(conversation)", "responses.create(conversation, store)")
def test_responses_go_on_with_it_and_add_to_it(client: openai.OpenAI, running: Running) -> None:
    made = client.conversations.create(items=[message("one")])
    first = client.responses.create(input="two", conversation=made.id, max_output_tokens=3)
    assert first.conversation is not None and first.conversation.id == made.id
    client.responses.create(input="three", conversation={"id": made.id}, max_output_tokens=3, store=False)
    told = [item["messages"] for item in running.engine.calls if "messages" in item][-1]
    assert [item["content"] for item in told] == ["one", "two", "abc", "three"]
    assert texts(client.conversations.items.list(made.id, order="asc")) == ["one", "two", "abc", "three", "abc"]
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    client.responses.create(input=[reference, message("what?")])
    told = [item["messages"] for item in running.engine.calls if "messages" in item][-1]
    assert told[0] == {"role": "assistant", "content": "abc"}


def test_a_response_adds_nothing_to_one_that_was_deleted_meanwhile(client: openai.OpenAI, running: Running) -> None:
    made = client.conversations.create()
    response = client.responses.create(input="held", conversation=made.id, background=True)
    assert wait_until(lambda: running.engine.num_running == 1)
    client.conversations.delete(made.id)
    running.engine.released.set()
    try:
        assert wait_until(lambda: client.responses.retrieve(response.id).status == "completed")
    finally:
        running.engine.released.clear()
    store = running.server._context.store
    assert store is not None and asyncio.run(store.parts(made.id)) == []


def test_others_do_not_see_it(client: openai.OpenAI, running: Running) -> None:
    made = client.conversations.create(items=[message("one")])
    item = next(iter(client.conversations.items.list(made.id))).id
    other = openai.OpenAI(base_url=f"{running.url}/v1", api_key="b", max_retries=0)
    for call in (
        lambda: other.conversations.retrieve(made.id),
        lambda: other.conversations.update(made.id, metadata={}),
        lambda: other.conversations.delete(made.id),
        lambda: other.conversations.items.list(made.id),
        lambda: other.conversations.items.create(made.id, items=[message("x")]),
        lambda: other.conversations.items.retrieve(item, conversation_id=made.id),  # type: ignore[arg-type]
        lambda: other.responses.create(input="x", conversation=made.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.BadRequestError, match="no item"):
        other.responses.create(input=[{"type": "item_reference", "id": item}])  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": [{"type": "message"}]}, "items[0].role"),
        ({"items": [{"type": "item_reference", "id": "x"}]}, "items[0].id"),
        ({"items": [message("x")] * 21}, "items"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"name": "x"}, "name"),
    ],
)
def test_a_refusal_names_the_field(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/conversations", cast_to=object, body=body)
    assert caught.value.param == param


def test_it_holds_no_more_than_a_response_reads(client: openai.OpenAI) -> None:
    made = client.conversations.create(items=[message("x")] * 8)
    with pytest.raises(openai.BadRequestError, match="limited to 8"):
        client.conversations.items.create(made.id, items=[message("x")])
    for query in ({"limit": "0"}, {"limit": "101"}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            client.get(f"/conversations/{made.id}/items", cast_to=object, options={"params": query})


def test_what_it_goes_on_from_is_read_up_to_a_size() -> None:
    limits = Limits().with_values({"input_bytes": 600})
    instance = start(FakeEngine(), store=memory(), limits=limits)
    client = instance.client()
    try:
        made = client.conversations.create(items=[message("x" * 100)])
        (item,) = client.conversations.items.list(made.id)
        reference: Any = {"type": "item_reference", "id": item.id}
        chained = client.responses.create(input=[reference, reference])
        calls: list[Any] = [
            lambda: client.responses.create(input=[reference] * 3),
            lambda: client.responses.create(input="y", previous_response_id=chained.id),
            lambda: client.conversations.items.create(made.id, items=[reference] * 3),
        ]
        client.responses.create(input="y", conversation=made.id)
        client.conversations.items.create(made.id, items=[message("x" * 100), message("x" * 100)])
        for call in [*calls, lambda: client.responses.create(input="y", conversation=made.id)]:
            with pytest.raises(openai.APIStatusError, match="limited to 600 bytes") as caught:
                call()
            assert (caught.value.status_code, caught.value.code) == (413, "input_too_large")
    finally:
        instance.stop()


def test_what_is_said_after_it_was_deleted_is_not_kept() -> None:
    store = memory()
    keeper = Keeper(store, "a", "conv_1", keeps_response=False)
    asyncio.run(keeper.finish({"id": "resp_1", "output": [{"id": "msg_2"}]}, [{"id": "msg_1"}]))
    assert asyncio.run(store.find_part("a", "msg_1")) is None and asyncio.run(store.sizes("conv_1")) == {}
    asyncio.run(store.close())
