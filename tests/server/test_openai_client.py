"""The official client against the server: every call, sync, async and streamed."""

import openai
import pytest

from quire.server.http.keys import cache_namespace
from tests.server.conftest import MODEL, Running, start
from tests.server.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.client("openai", "completions.create(max_tokens, seed)")
def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=5, seed=2)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("cdefg", "length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)


@pytest.mark.client("openai", "chat.completions.create(temperature, max_tokens, stop, seed, top_p)")
def test_chat_is_sampled_as_asked(running: Running, client: openai.OpenAI) -> None:
    asked = {"temperature": 0.5, "max_tokens": 7, "stop": ["zz"], "seed": 3, "top_p": 0.25}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, **asked)  # type: ignore[call-overload]
    assert answer.usage.completion_tokens == 7
    params = running.engine.calls[-1]["params"]
    assert {name: getattr(params, name) for name in asked} == asked


def test_completion_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    assert len(client.completions.create(model=MODEL, prompt="abc").choices[0].text) == 16


@pytest.mark.client("openai", "completions.create(stream)")
def test_completion_streamed_is_the_same(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="abc", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcde"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.client("openai", "completions.create(n)")
def test_completion_of_many_prompts_with_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["abc", "xy"], n=2, max_tokens=3)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "abc"),
        (1, "bcd"),
        (2, "abc"),
        (3, "bcd"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)


@pytest.mark.client("openai", "completions.create(stream, n, stream_options)")
def test_completion_of_many_prompts_streamed(client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}
    usage = None
    for chunk in client.completions.create(
        model=MODEL, prompt=["a", "b", "c"], n=2, max_tokens=4, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "abcd", 1: "bcde", 2: "abcd", 3: "bcde", 4: "abcd", 5: "bcde"}
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 24)


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]]])
def test_completion_of_token_ids(client: openai.OpenAI, prompt: list[int]) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, echo=True)
    assert answer.choices[0].text == "hiab"


@pytest.mark.client("openai", "completions.create(echo, logprobs)")
def test_completion_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="xyz", max_tokens=2, echo=True, logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert answer.choices[0].text == "xyzab"
    assert found.tokens == list("xyzab")
    assert found.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert found.text_offset == [0, 1, 2, 3, 4]
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] is None
    assert found.top_logprobs[4] == {"b": -0.5, "C": -2.0}


def test_completion_that_only_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="xyz", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "xyz"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == list("xyz")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_completion_streamed_offsets_go_on(client: openai.OpenAI) -> None:
    offsets = [
        offset
        for chunk in client.completions.create(
            model=MODEL, prompt="xyz", max_tokens=3, echo=True, logprobs=0, stream=True
        )
        for offset in (chunk.choices[0].logprobs.text_offset or [] if chunk.choices[0].logprobs else [])
    ]
    assert offsets == [0, 1, 2, 3, 4, 5]


@pytest.mark.client("openai", "completions.create(stop, logit_bias, top_k, min_p)")
def test_stop_and_vllm_extras_reach_the_parameters(client: openai.OpenAI, running: Running) -> None:
    extras = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 1}
    more = {"stop_token_ids": [3], "bad_words": ["no"], "allowed_token_ids": [1, 2], "priority": 4, "cache_salt": "s"}
    answer = client.completions.create(
        model=MODEL, prompt="p", max_tokens=9, stop=["ef"], logit_bias={"7": 3}, extra_body=extras | more
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abcd", "stop")
    call = running.engine.calls[-1]
    params = call["params"]
    assert {name: getattr(params, name) for name in extras} == extras
    assert (params.stop_token_ids, params.bad_words, params.allowed_token_ids) == ([3], ["no"], [1, 2])
    assert params.logit_bias == {7: 3.0}
    assert (call["priority"], call["cache_salt"]) == (4, cache_namespace("", "s"))


def test_temperature_comes_from_the_model_unless_given(client: openai.OpenAI, running: Running) -> None:
    client.completions.create(model=MODEL, prompt="p", max_tokens=1)
    assert running.engine.calls[-1]["params"].temperature == 0.5
    client.completions.create(model=MODEL, prompt="p", max_tokens=1, temperature=0.9)
    assert running.engine.calls[-1]["params"].temperature == 0.9


@pytest.mark.client("openai", "chat.completions.create", "chat.completions.create(n)")
def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=2, max_completion_tokens=3)
    assert answer.object == "chat.completion"
    assert [choice.message.content for choice in answer.choices] == ["abc", "bcd"]
    assert [choice.message.role for choice in answer.choices] == ["assistant", "assistant"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_chat_without_max_tokens_has_no_bound_of_its_own(client: openai.OpenAI, running: Running) -> None:
    client.chat.completions.create(model=MODEL, messages=HELLO)
    assert running.engine.calls[-1]["params"].max_tokens is None


@pytest.mark.client("openai", "chat.completions.create(stream, stream_options)")
def test_chat_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert [delta.content for delta in deltas[1:]] == ["a", "b", "c", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.client(
    "openai",
    "chat.completions.create(logprobs, top_logprobs)",
    "chat.completions.create(stream, logprobs)",
)
def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    first = found.content[0]
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert [(item.token, item.logprob) for item in first.top_logprobs] == [("a", -0.5), ("C", -2.0)]
    streamed = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2, stream=True
    )
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    content = [entry for piece in pieces if piece for entry in piece.content or []]
    assert content == found.content


def test_chat_content_parts_and_template_options(client: openai.OpenAI, running: Running) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": "so", "name": "x"}],  # type: ignore[list-item,misc]
        max_tokens=1,
        extra_body={"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}},
    )
    call = running.engine.calls[-2]
    assert call["messages"] == [
        {"role": "system", "content": "one\ntwo"},
        {"role": "assistant", "content": "so", "name": "x"},
    ]
    assert call["continue_final_message"] is True
    assert call["add_generation_prompt"] is False
    assert call["chat_template_kwargs"] == {"enable_thinking": False}


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hi", max_tokens=1, extra_body={"prompt_logprobs": 1})
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["prompt_logprobs"] == [
        None,
        {"105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"}},
    ]


@pytest.mark.client(
    "openai async",
    "completions.create(stream)",
    "chat.completions.create(stream)",
    "models.list",
    "models.retrieve",
)
async def test_async_client(running: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(model=MODEL, prompt="abc", max_tokens=3)
        assert answer.choices[0].text == "abc"
        stream = await client.completions.create(model=MODEL, prompt="abc", max_tokens=3, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "abc"
        chat = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
        assert chat.choices[0].message.content == "abc"
        pieces = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in pieces]) == "abc"
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL


@pytest.mark.client("openai", "models.list", "models.retrieve")
def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == (MODEL, "quire", "model")
    assert client.models.retrieve("directory-name").id == "directory-name"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="abc")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_bad_value_names_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"


def test_errors_of_the_engine(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 600}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[1, 256])
    assert caught.value.param == "prompt"
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model=MODEL, prompt="fail")
    assert failed.value.code == "request_failed"


def test_failure_in_mid_stream_is_an_error(client: openai.OpenAI) -> None:
    texts = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in client.completions.create(model=MODEL, prompt="fail", stream=True):
            texts.append(chunk.choices[0].text)
    assert texts == ["a", "b"]
    assert "the row broke" in str(caught.value)


def test_key(running: Running) -> None:
    locked = start(FakeEngine(), api_key="secret")
    try:
        with pytest.raises(openai.AuthenticationError) as caught:
            locked.client().models.list()
        assert caught.value.code == "invalid_api_key"
        assert openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret").models.list().data[0].id == MODEL
    finally:
        locked.stop()


def test_bad_words_are_encoded_once_for_all_prompts(client: openai.OpenAI, running: Running) -> None:
    before = running.engine.num_bad_words_encoded
    extras = {"bad_words": ["no", "never"]}
    client.completions.create(model=MODEL, prompt=["a", "b", "c"], n=2, max_tokens=1, extra_body=extras)
    assert running.engine.num_bad_words_encoded == before + 1
    assert [call["bad_words"] for call in running.engine.calls[-3:]] == [(tuple(b"no"), tuple(b"never"))] * 3
