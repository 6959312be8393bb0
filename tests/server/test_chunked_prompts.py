"""A prompt that the engine computes in several steps, as it does under load: the answer does not show it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from quire.llm import AsyncLLM
from tests.server.conftest import MODEL, Running, start
from tests.tiny.checkpoints import make_tiny

PROMPTS = ["The naïve 分頁 👍🏽 of a prompt that takes several steps.", "Short."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), tokenizer=True)


@pytest.fixture(scope="module", params=[2, 7, 16, 512])
def chunked(request: pytest.FixtureRequest, directory: Path) -> Iterator[Running]:
    instance = start(AsyncLLM(str(directory), max_num_seqs=2, max_num_batched_tokens=request.param))
    yield instance
    instance.stop()
    instance.engine.close()


def test_echo_with_logprobs_streams_what_it_sends_whole(chunked: Running, directory: Path) -> None:
    """Offsets of the prompt against those of the library that made the tokens."""
    client = chunked.client()
    options: dict[str, Any] = {
        "model": MODEL, "prompt": PROMPTS, "n": 2, "seed": 3, "max_tokens": 6, "logprobs": 2, "echo": True,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.completions.create(**options).choices
    found: dict[int, list[Any]] = {index: ["", [], [], []] for index in range(4)}
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            assert choice.logprobs is not None
            parts = found[choice.index]
            parts[0] += choice.text
            parts[1] += choice.logprobs.tokens or []
            parts[2] += choice.logprobs.token_logprobs or []
            parts[3] += choice.logprobs.text_offset or []
    encode = PreTrainedTokenizerFast.from_pretrained(directory)
    for choice in whole:
        assert choice.logprobs is not None
        assert found[choice.index] == [
            choice.text, choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.text_offset,
        ]  # fmt: skip
        prompt = PROMPTS[choice.index // 2]
        expected = [begin for begin, _ in encode(prompt, return_offsets_mapping=True)["offset_mapping"]]
        offsets = choice.logprobs.text_offset or []
        assert offsets[: len(expected) + 1] == [*expected, len(prompt)]
        assert offsets == sorted(offsets) and offsets[-1] < len(choice.text)


def test_a_stream_of_a_scored_prompt(chunked: Running) -> None:
    events = list(
        chunked.client().completions.create(
            model=MODEL, prompt=PROMPTS[0], max_tokens=0, logprobs=1, echo=True, stream=True
        )
    )
    (first,) = [chunk.choices[0] for chunk in events if chunk.choices[0].text]
    assert first.text == PROMPTS[0] and first.logprobs is not None
    assert first.logprobs.token_logprobs and None not in first.logprobs.token_logprobs[1:]


def test_too_long_a_prompt_says_what_clients_look_for(chunked: Running) -> None:
    """litellm looks for the first words, in lower case; langchain-openai for the code."""
    client = chunked.client()
    say: Any = [{"role": "user", "content": "x" * 600}]
    for ask, param in (
        (lambda: client.completions.create(model=MODEL, prompt="x" * 600), "prompt"),
        (lambda: client.chat.completions.create(model=MODEL, messages=say), "messages"),
        (lambda: client.completions.create(model=MODEL, prompt="x", max_tokens=512), "max_tokens"),
        (lambda: client.completions.create(model=MODEL, prompt="x" * 100_000), "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        text = caught.value.body["message"]  # type: ignore[index]
        assert text.startswith("This model's maximum context length is 512 tokens. However, ")
        assert "Please reduce the length of the messages" in text
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)


def test_a_panic_of_the_tokenizer_is_the_request_s_own_error(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    instance = start(AsyncLLM(str(tmp_path)))
    try:
        client = instance.client()
        say: Any = [{"role": "user", "content": "x"}]
        for size in (1, 5000):
            for ask in (
                lambda size=size: client.completions.create(model=MODEL, prompt="x" * size),
                lambda size=size: client.completions.create(model=MODEL, prompt="x" * size, stream=True),
                lambda size=size: client.completions.create(model=MODEL, prompt=[1], extra_body={"bad_words": ["x"]}),
            ):
                with pytest.raises(openai.BadRequestError, match="the tokenizer fails on this text"):
                    ask()
        with pytest.raises(openai.BadRequestError, match="the tokenizer fails on this text"):
            client.chat.completions.create(model=MODEL, messages=say)
        assert client.completions.create(model=MODEL, prompt=[1, 2], max_tokens=2).choices[0].finish_reason
    finally:
        instance.stop()
        instance.engine.close()
