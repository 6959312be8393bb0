"""Calls of official clients that no other file of tests makes, and what is refused of each call.

The page of what works with which client is made from the marks (`scripts/compatibility_page.py`).
"""

import inspect
import warnings
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import anthropic
import httpx
import huggingface_hub.constants
import ollama
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from scripts.client_calls import CLIENTS, calls_of
from scripts.compatibility_marks import asked_of, marks
from tests.conftest import PATIENCE_S
from tests.server.conftest import MODEL, Running, start, wait_until
from tests.server.fake_engine import FakeEngine
from tests.server.test_responses_client import memory

HELLO: Any = [{"role": "user", "content": "hello"}]
TEXT: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 3}
TOOL: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
REFUSALS = (openai.BadRequestError, anthropic.BadRequestError, ollama.ResponseError, ValidationError)


@pytest.fixture(scope="module")
def kept() -> Iterator[Running]:
    """With a store."""
    instance = start(FakeEngine(), store=memory())
    yield instance
    instance.stop()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def clients(kept: Running) -> dict[str, Any]:
    """One of each, under the names of the marks."""
    return {
        "openai": kept.client(),
        "anthropic": anthropic.Anthropic(base_url=kept.url, api_key="none", max_retries=0),
        "ollama": ollama.Client(kept.url, timeout=PATIENCE_S),
        "huggingface_hub": InferenceClient(kept.url),
    }


# What is refused, of each call.


BATCH: dict[str, Any] = {"input_file_id": "file-2", "endpoint": "/v1/responses", "completion_window": "24h"}
LEAST: dict[tuple[str, str], dict[str, Any]] = {
    ("openai", "chat.completions.create"): TEXT,
    ("openai", "responses.create"): {"model": MODEL, "input": "hello"},
    ("openai", "beta.responses.create"): {"model": MODEL, "input": "hello"},
    ("openai", "responses.input_tokens.count"): {"model": MODEL, "input": "hello"},
    ("openai", "batches.create"): BATCH,
    ("anthropic", "messages.create"): TEXT,
    ("anthropic", "beta.messages.create"): TEXT,
    ("anthropic", "messages.count_tokens"): {"model": MODEL, "messages": HELLO},
    ("anthropic", "beta.messages.count_tokens"): {"model": MODEL, "messages": HELLO},
    ("ollama", "chat"): {"model": MODEL, "messages": HELLO},
    ("ollama", "generate"): {"model": MODEL, "prompt": "hello"},
    ("ollama", "pull"): {"model": MODEL},
    ("huggingface_hub", "text_generation"): {"prompt": "hello"},
}
VALUES: dict[str, Any] = {
    **{
        "logprobs": True,
        "watermark": True,
        "insecure": True,
        "adapter_id": "a",
        "template": "a",
        "suffix": "a",
        "images": ["aGk="],
    },
    **dict.fromkeys(("top_logprobs", "width", "height", "steps"), 5),
}


FILES = ("file", "image", "recording")


@pytest.mark.client_refused(
    "openai",
    "chat.completions.create(audio, function_call, functions, modalities, moderation, prediction, web_search_options)",
    "responses.create(access_programs, background_options, context_management, image, max_tool_calls, moderation, "
    "prompt)",
    "beta.responses.create(multi_agent, context_management, moderation, prompt)",
    "responses.input_tokens.count(personality)",
    "batches.create(output_expires_after)",
)
@pytest.mark.client_refused(
    "anthropic",
    "messages.create(container, diagnostics, inference_geo)",
    "beta.messages.create(billing_policy, compaction, container, context_management, diagnostics, fallbacks, "
    "fallback_credit_token, inference_geo, mcp_servers, thread)",
    "beta.messages.count_tokens(billing_policy, compaction, context_management, mcp_servers)",
)
@pytest.mark.client_refused(
    "ollama",
    "chat(logprobs, top_logprobs)",
    "generate(suffix, template, images, logprobs, top_logprobs, width, height, steps)",
    "pull(insecure)",
)
@pytest.mark.client_refused("huggingface_hub", "text_generation(adapter_id, watermark)")
def test_an_argument_that_is_refused_is_named(request: pytest.FixtureRequest, clients: dict[str, Any]) -> None:
    for mark in request.node.iter_markers("client_refused"):
        for asked in asked_of(mark.args):
            call = attrgetter(asked.call)(clients[asked.client])
            for argument in asked.arguments:
                given = {argument: VALUES.get(argument, {"type": "x"})}
                with pytest.raises(REFUSALS, match=argument):
                    call(**LEAST[asked.client, asked.call], **given)


@pytest.mark.client_refused("ollama", "create", "create_blob", "push", "embed", "embeddings")
def test_calls_of_ollama_that_are_refused(clients: dict[str, Any], tmp_path: Path) -> None:
    client, path = clients["ollama"], tmp_path / "blob"
    path.write_bytes(b"x")
    for refused in (
        lambda: client.create("mine", from_=MODEL),
        lambda: client.create_blob(path),
        lambda: client.push(MODEL),
        lambda: client.embed(MODEL, "x"),
        lambda: client.embeddings(MODEL, "x"),
    ):
        with pytest.raises(ollama.ResponseError, match="not supported"):
            refused()


@pytest.mark.client_refused(
    "openai",
    "audio.speech.create",
    "audio.transcriptions.create",
    "audio.translations.create",
    "audio.voice_consents.create",
    "audio.voice_consents.delete",
    "audio.voice_consents.list",
    "audio.voice_consents.retrieve",
    "audio.voice_consents.update",
    "audio.voices.create",
    "audio.voices.delete",
    "embeddings.create",
    "fine_tuning.alpha.graders.run",
    "fine_tuning.alpha.graders.validate",
    "fine_tuning.checkpoints.permissions.create",
    "fine_tuning.checkpoints.permissions.delete",
    "fine_tuning.checkpoints.permissions.list",
    "fine_tuning.checkpoints.permissions.retrieve",
    "fine_tuning.jobs.cancel",
    "fine_tuning.jobs.checkpoints.list",
    "fine_tuning.jobs.create",
    "fine_tuning.jobs.list",
    "fine_tuning.jobs.list_events",
    "fine_tuning.jobs.pause",
    "fine_tuning.jobs.resume",
    "fine_tuning.jobs.retrieve",
    "images.create_variation",
    "images.edit",
    "images.generate",
    "moderations.create",
)
def test_calls_of_openai_that_are_refused(request: pytest.FixtureRequest, clients: dict[str, Any]) -> None:
    for asked in asked_of(next(request.node.iter_markers("client_refused")).args):
        call = attrgetter(asked.call)(clients["openai"])
        needed = [name for name, one in inspect.signature(call).parameters.items() if one.default is one.empty]
        needed += ["prompt", "type"] if asked.call == "audio.voices.create" else []
        given: dict[str, Any] = {name: b"x" if name in FILES else "x" for name in needed}
        with warnings.catch_warnings(), pytest.raises(openai.BadRequestError, match="not supported: ") as caught:
            warnings.simplefilter("ignore", DeprecationWarning)
            call(**given)
        assert caught.value.code == "unsupported_route", asked.call


@pytest.mark.client_refused(
    "anthropic",
    "files.upload",
    "files.list",
    "files.retrieve_metadata",
    "files.download",
    "files.delete",
    "beta.files.upload",
    "beta.files.list",
    "beta.files.retrieve_metadata",
    "beta.files.download",
    "beta.files.delete",
)
def test_files_of_anthropic_are_not_those_of_openai(clients: dict[str, Any]) -> None:
    """Both are at /v1/files: a header says whose."""
    openai_file = clients["openai"].files.create(file=("a.jsonl", b"{}"), purpose="batch")
    for files in (clients["anthropic"].files, clients["anthropic"].beta.files):
        for refused in (
            lambda: files.upload(file=("a.txt", b"x")),  # noqa: B023 - called at once
            lambda: files.list(),  # noqa: B023
            lambda: files.retrieve_metadata(openai_file.id),  # noqa: B023
            lambda: files.download(openai_file.id),  # noqa: B023
            lambda: files.delete(openai_file.id),  # noqa: B023
        ):
            with pytest.raises(anthropic.BadRequestError, match="not supported") as caught:
                refused()
            assert caught.value.type == "invalid_request_error"
    assert clients["openai"].files.retrieve(openai_file.id) == openai_file


def test_what_is_absent_is_told_in_the_clients_own_shape(kept: Running) -> None:
    """One call of each resource that has no route; `tests/law/test_compatibility.py` knows that none has one."""
    known = {(mark.asked.client, mark.asked.call.split(".")[0]) for mark in marks()}
    for name, shape in (("openai", {"error"}), ("anthropic", {"type", "error", "request_id"})):
        first = {call.name.split(".")[0]: call for call in reversed(calls_of(name).values()) if call.routes}
        absent = [call for resource, call in first.items() if (name, resource) not in known]
        with httpx.Client(base_url=kept.url, headers=list(CLIENTS[name].headers)) as http:
            for call in absent:
                response = http.request(*call.routes[0], **({} if call.routes[0][0] == "GET" else {"json": {}}))
                assert response.status_code in (404, 405) and {*response.json()} == shape, call.name
        assert len(absent) > 2


@pytest.mark.client_refused("openai", "responses.retrieve(include, include_obfuscation)",
                            "responses.input_items.list(include)", "conversations.items.list(include)",
                            "conversations.items.retrieve(include)", "conversations.items.create(include)")  # fmt: skip
@pytest.mark.client("openai", "responses.retrieve(include)", "conversations.items.list(include)")
@pytest.mark.client("anthropic", "models.list(lifecycle)")
def test_what_a_query_asks_for_is_there_or_refused(clients: dict[str, Any]) -> None:
    client, listed = clients["openai"], clients["anthropic"].models.list
    made = client.responses.create(input="hello", max_output_tokens=2)
    item: Any = {"type": "message", "role": "user", "content": "a"}
    name = client.conversations.create(items=[item]).id
    items = client.conversations.items
    (kept_item,) = items.list(name, include=["message.output_text.logprobs"])
    assert client.responses.retrieve(made.id, include=["reasoning.encrypted_content"]).to_dict() == made.to_dict()
    sources: Any = {"include": ["web_search_call.action.sources"]}
    for refused in (
        lambda: client.responses.retrieve(made.id, **sources),
        lambda: client.responses.input_items.list(made.id, **sources),
        lambda: items.list(name, **sources),
        lambda: items.retrieve(kept_item.id, conversation_id=name, **sources),
        lambda: items.create(name, items=[item], **sources),
        lambda: client.responses.retrieve(made.id, include_obfuscation=True),
    ):
        with pytest.raises(openai.BadRequestError, match=r"include must be|include_obfuscation is not supported"):
            refused()
    assert [len(listed(lifecycle=stages).data) for stages in (["active", "retired"], ["retired"])] == [1, 0]
    with pytest.raises(anthropic.BadRequestError, match="lifecycle"):
        listed(lifecycle=["new"])


# What passes.


@pytest.mark.client("openai", "responses.input_tokens.count(input, instructions, tools)",
                    "responses.input_tokens.count(previous_response_id)",
                    "responses.input_tokens.count(conversation, truncation)")  # fmt: skip
def test_input_tokens_are_those_that_a_response_reads(clients: dict[str, Any]) -> None:
    client = clients["openai"]
    tool: Any = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": True}
    asked: Any = {"model": MODEL, "input": "hello", "instructions": "be brief", "tools": [tool]}
    made = client.responses.create(**asked, max_output_tokens=2)
    counted = client.responses.input_tokens.count(**asked)
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", made.usage.input_tokens)
    for before in (
        {"previous_response_id": made.id},
        {"conversation": client.conversations.create(items=[{"type": "message", "role": "user", "content": "a"}]).id},
    ):
        counted = client.responses.input_tokens.count(input="more", truncation="auto", **before)
        made_after = client.responses.create(input="more", truncation="auto", **before, max_output_tokens=2)
        assert counted.input_tokens == made_after.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.responses.input_tokens.count(input="x", extra_body={"temperature": 1})


@pytest.mark.client("openai", "beta.responses.create(input)", "beta.responses.create(stream)",
                    "beta.responses.create(background)", "beta.responses.retrieve", "beta.responses.input_items.list",
                    "beta.responses.cancel", "beta.responses.delete", "beta.responses.input_tokens.count")  # fmt: skip
def test_responses_by_their_beta_names(clients: dict[str, Any], kept: Running) -> None:
    responses = clients["openai"].beta.responses
    made = responses.create(model=MODEL, input="hello", max_output_tokens=3)
    assert responses.retrieve(made.id).to_dict() == made.to_dict() and made.usage.output_tokens == 3
    assert [item.content[0].text for item in responses.input_items.list(made.id)] == ["hello"]
    assert responses.input_tokens.count(model=MODEL, input="hello").input_tokens == made.usage.input_tokens
    *_, last = responses.create(model=MODEL, input="hello", stream=True)
    assert last.type == "response.completed"
    held = responses.create(model=MODEL, input="held", background=True)
    assert wait_until(lambda: kept.engine.num_running == 1)
    assert responses.cancel(held.id).status == "cancelled" and kept.engine.num_running == 0
    responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(made.id)


@pytest.mark.client("openai", "files.wait_for_processing", "files.delete", "files.retrieve_content")
def test_a_file_is_processed_at_once(clients: dict[str, Any]) -> None:
    files = clients["openai"].files
    made = files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
    assert files.wait_for_processing(made.id, poll_interval=0.01).status == "processed"
    with pytest.warns(DeprecationWarning):
        assert files.retrieve_content(made.id) == "{}\n"
    assert files.delete(made.id).deleted


@pytest.mark.client("openai", "completions.create(suffix)")
def test_a_suffix_where_the_tokenizer_has_the_tokens(clients: dict[str, Any]) -> None:
    """Else it is refused: `test_gap_and_best.py`."""
    answer = clients["openai"].completions.create(model=MODEL, prompt="a", suffix="b", max_tokens=2)
    assert answer.usage.prompt_tokens == 3


@pytest.mark.client("openai", "completions.create(best_of, n)")
def test_the_best_of_several_completions(clients: dict[str, Any]) -> None:
    create = clients["openai"].completions.create
    assert len(create(model=MODEL, prompt="a", best_of=3, n=2, max_tokens=2).choices) == 2


@pytest.mark.client("anthropic", "beta.messages.create", "beta.messages.create(stream, betas)",
                    "beta.messages.count_tokens", "beta.messages.stream", "beta.messages.parse",
                    "beta.messages.thread", "beta.models.list", "beta.models.retrieve")  # fmt: skip
def test_messages_by_their_beta_names(clients: dict[str, Any], kept: Running) -> None:
    beta = clients["anthropic"].beta
    made = beta.messages.create(**TEXT)
    assert made.content[0].text == "abc" and made.stop_reason == "max_tokens"
    assert beta.messages.parse(**TEXT).content[0].text == "abc"
    *_, last = beta.messages.create(**TEXT, stream=True, betas=["interleaved-thinking-2025-05-14"])
    assert last.type == "message_stop"
    with beta.messages.stream(**TEXT) as stream:
        assert "".join(stream.text_stream) == "abc"
    count = beta.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    used = made.usage
    assert count == used.input_tokens + used.cache_creation_input_tokens + used.cache_read_input_tokens
    assert [model.id for model in beta.models.list()] == [MODEL] and beta.models.retrieve(MODEL).id == MODEL
    thread = beta.messages.thread(model=MODEL, max_tokens=2, unsupported_request_behavior="continue_unthreaded")
    for turn in ("one", "two"):  # the client sends the whole conversation, as it is told to
        assert thread.send({"role": "user", "content": turn}).content[0].text == "ab"
    told = [call["messages"] for call in kept.engine.calls if "messages" in call][-1]
    assert [message["content"] for message in told] == ["one", "ab", "two"]


@pytest.mark.client("anthropic", "messages.create(metadata, service_tier, user_profile_id, workspace_id)",
                    "messages.create(thinking)")  # fmt: skip
def test_what_else_messages_take(clients: dict[str, Any], kept: Running) -> None:
    create = clients["anthropic"].messages.create
    labels: Any = {"metadata": {"user_id": "u"}, "user_profile_id": "p", "workspace_id": "w"}
    sampled = {"temperature": 0.25, "top_p": 0.5, "top_k": 7}
    assert create(**TEXT, **labels, service_tier="auto", extra_body=sampled).usage.service_tier == "standard"
    params = [call["params"] for call in kept.engine.calls if "params" in call][-1]
    assert (params.temperature, params.top_p, params.top_k) == (0.25, 0.5, 7)
    assert create(**TEXT, thinking={"type": "disabled"}).content[0].text == "abc"


@pytest.mark.client("ollama", "generate(prompt)", "generate(stream)", "generate(system, keep_alive)", "chat(think)")
def test_what_ollama_answers(clients: dict[str, Any]) -> None:
    client, few = clients["ollama"], {"num_predict": 3}
    assert client.generate(MODEL, prompt="x", options=few).response == "abc"
    parts = list(client.generate(MODEL, prompt="x", options=few, stream=True))
    assert "".join(part.response for part in parts) == "abc" and parts[-1].done
    assert client.generate(MODEL, prompt="x", system="s", keep_alive="5m", options=few).done_reason == "length"
    assert client.chat(MODEL, HELLO, think=False, options=few).message.content == "abc"


@pytest.mark.client("huggingface_hub", "chat_completion(tools, tool_choice)", "chat_completion(logprobs, top_logprobs)",
                    "chat_completion(stop, seed, temperature, top_p, logit_bias)",
                    "chat_completion(stream, stream_options)", "text_generation(stop, truncate)", "health_check",
                    "get_endpoint_info")  # fmt: skip
def test_what_else_the_hubs_client_asks(clients: dict[str, Any], kept: Running) -> None:
    client: InferenceClient = clients["huggingface_hub"]
    found = client.chat_completion(HELLO, tools=[TOOL], tool_choice="auto", max_tokens=3).choices[0]
    assert found.message.content == "abc"
    found = client.chat_completion(HELLO, logprobs=True, top_logprobs=2, max_tokens=2).choices[0]
    assert [entry.token for entry in found.logprobs.content] == ["a", "b"]
    sampled: Any = {"temperature": 0.5, "top_p": 0.5, "logit_bias": {"5": 1}}
    assert client.chat_completion(HELLO, stop=["cd"], seed=1, **sampled).choices[0].message.content == "b"
    events = list(client.chat_completion(HELLO, stream=True, stream_options={"include_usage": True}, max_tokens=2))
    assert events[-1].usage.completion_tokens == 2
    assert client.text_generation("x" * 9, stop=["cd"], truncate=3, max_new_tokens=9, return_full_text=False) == "ab"
    endpoint = InferenceClient(kept.url, provider="hf-inference")
    assert endpoint.health_check() and endpoint.get_endpoint_info()["max_total_tokens"] == kept.engine.max_model_len


@pytest.mark.client("huggingface_hub", "text_generation(grammar)",
                    "text_generation(do_sample, seed, temperature, top_k, top_p, typical_p, repetition_penalty)",
                    "chat_completion(response_format)")  # fmt: skip
def test_shapes_and_sampling_through_the_hubs_client(real: Running) -> None:
    client = InferenceClient(real.url)
    shape: Any = {"type": "regex", "value": "[0-9]{3}"}
    assert client.text_generation("x", grammar=shape, max_new_tokens=8, return_full_text=False).isdigit()
    sampled: Any = {"do_sample": True, "seed": 5, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "typical_p": 0.9}
    texts = {client.text_generation("x", **sampled, repetition_penalty=1.1, max_new_tokens=9) for _ in range(2)}
    assert len(texts) == 1
    schema: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    said = client.chat_completion(HELLO, response_format=schema, max_tokens=20).choices[0].message.content
    assert said in ('"yes"', '"no"')


# The asynchronous classes.


@pytest.mark.client("anthropic async", "messages.create(stream)", "messages.stream", "messages.count_tokens",
                    "models.list")  # fmt: skip
async def test_anthropic_async(kept: Running) -> None:
    async with anthropic.AsyncAnthropic(base_url=kept.url, api_key="none", max_retries=0) as client:
        assert [event.type async for event in await client.messages.create(**TEXT, stream=True)][-1] == "message_stop"
        async with client.messages.stream(**TEXT) as stream:
            assert "".join([text async for text in stream.text_stream]) == "abc"
        assert (await client.messages.count_tokens(model=MODEL, messages=HELLO)).input_tokens > 5
        assert [model.id async for model in client.models.list()] == [MODEL]


@pytest.mark.client("ollama async", "chat", "chat(stream)", "generate", "list", "show")
async def test_ollama_async(kept: Running) -> None:
    client, few = ollama.AsyncClient(kept.url, timeout=PATIENCE_S), {"num_predict": 3}
    assert (await client.chat(MODEL, HELLO, options=few)).message.content == "abc"
    parts = [part async for part in await client.chat(MODEL, HELLO, options=few, stream=True)]
    assert "".join(part.message.content for part in parts) == "abc"
    assert (await client.generate(MODEL, "x", options=few)).response == "abc"
    assert [card.model for card in (await client.list()).models] == [MODEL]
    assert (await client.show(MODEL)).capabilities


@pytest.mark.client("huggingface_hub async", "text_generation", "text_generation(stream)", "chat_completion(stream)")
async def test_the_hubs_client_async(kept: Running) -> None:
    async with AsyncInferenceClient(kept.url) as client:
        assert await client.text_generation("x", max_new_tokens=3, return_full_text=False) == "abc"
        streamed = await client.text_generation("x", max_new_tokens=3, stream=True)
        assert "".join([text async for text in streamed]) == "abc"
        events = [event async for event in await client.chat_completion(HELLO, max_tokens=3, stream=True)]
        assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == "abc"
