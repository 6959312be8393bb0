"""Fields that change no text: the official client sends them, the answer is as without them and says what was done."""

import inspect
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from quire.llm import AsyncLLM
from quire.server.doors.openai.bodies import CHAT, COMPLETION
from quire.server.http.limits import Limits
from scripts.house.tree import ROOT
from tests.server.conftest import MODEL, Running, start
from tests.tiny.checkpoints import make_tiny

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
LABELS: dict[str, Any] = {
    "metadata": {"run": "7", "x" * 64: "y" * 512},
    "prompt_cache_key": "user-7",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "store": True,
    "service_tier": "flex",
    "safety_identifier": "s",
    "user": "u",
}
ASKED: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "logprobs": True}


def test_every_parameter_of_the_official_client_is_known() -> None:
    """Honoured, a label, or refused with its reason: none is an unknown field. Of the locked version, so that a new
    release of the client is met when the lock is made anew, and not by chance."""
    if f"openai=={openai.__version__} " not in (ROOT / "requirements/test.txt").read_text(encoding="utf-8"):
        pytest.skip(f"openai {openai.__version__} is not the locked version")
    of_the_client = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    for create, schema in ((ChatCompletions.create, CHAT), (Completions.create, COMPLETION)):
        parameters = set(inspect.signature(create).parameters) - of_the_client
        assert len(parameters) > 15 and parameters <= set(schema.known())


def _said(answer: Any) -> Any:
    return [(choice.message.content, choice.logprobs, choice.finish_reason) for choice in answer.choices]


def test_labels_change_nothing_and_the_answer_says_what_was_done(real: Running) -> None:
    client = real.client()
    plain = client.chat.completions.create(model=MODEL, messages=HELLO, **ASKED)
    labelled = client.chat.completions.create(model=MODEL, messages=HELLO, **ASKED, **LABELS)
    assert _said(labelled) == _said(plain)
    assert labelled.usage is not None and plain.usage is not None
    assert labelled.usage.prompt_tokens == plain.usage.prompt_tokens
    assert (labelled.service_tier, labelled.model_dump()["store"]) == ("default", False)
    assert plain.service_tier is None and "store" not in plain.model_dump()
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, **ASKED, **LABELS, stream=True))
    assert {chunk.service_tier for chunk in chunks} == {"default"}
    with pytest.raises(openai.NotFoundError):  # as the answer said
        client.chat.completions.retrieve(labelled.id)


def test_cache_hints_in_messages_and_parts_change_nothing(real: Running) -> None:
    client = real.client()
    part = {"type": "text", "text": "hello"}
    hints: list[dict[str, Any]] = [
        {"cache_control": {"type": "ephemeral"}},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"prompt_cache_breakpoint": {"mode": "explicit"}},
    ]
    plain = client.chat.completions.create(model=MODEL, messages=HELLO, **ASKED)
    for hint in hints:
        messages: list[Any] = [{"role": "user", "content": [{**part, **hint}]}]
        assert _said(client.chat.completions.create(model=MODEL, messages=messages, **ASKED)) == _said(plain)
    hinted: list[Any] = [{**HELLO[0], "cache_control": None}]
    assert _said(client.chat.completions.create(model=MODEL, messages=hinted, **ASKED)) == _said(plain)


def rendered(client: openai.OpenAI, url: str, messages: list[Any], **body: Any) -> str:
    tokens = httpx.post(f"{url}/tokenize", json={"messages": messages, **body}).json()["tokens"]
    text: str = httpx.post(f"{url}/detokenize", json={"tokens": tokens}).json()["prompt"]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_body={"return_prompt_text": True, **body}
    )
    assert answer.model_dump()["prompt_text"] == text, "/tokenize counts what the chat is computed from"
    return text


READS = (
    "{% if reasoning_effort is defined %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.reasoning_content %}<{{ message.reasoning_content }}>{% endif %}{{ message.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = make_tiny("llama", tmp_path_factory.mktemp("tiny"), tokenizer=True)
    limits = Limits().with_values({"chat_template_characters": 1000})
    instance = start(AsyncLLM(str(directory), max_num_seqs=4), limits=limits)
    yield instance
    instance.stop()
    instance.engine.close()


def test_reasoning_effort_goes_to_the_template_that_reads_it(trusting: Running) -> None:
    client, url = trusting.client(), trusting.url
    assert rendered(client, url, HELLO, chat_template=READS) == "user: hello\n"
    for more in ({}, {"chat_template_kwargs": {"reasoning_effort": "high"}}):
        found = rendered(client, url, HELLO, chat_template=READS, reasoning_effort="high", **more)
        assert found == "effort high\nuser: hello\n"
    plain = rendered(client, url, HELLO)  # the model's own template reads neither
    assert rendered(client, url, HELLO, reasoning_effort="high", verbosity="low") == plain


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_in_the_history_is_the_templates_to_show_or_drop(trusting: Running, name: str) -> None:
    client, url = trusting.client(), trusting.url
    turns = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and?"}]
    thought = [turns[0], {**turns[1], name: "hm"}, turns[2]]
    assert "assistant: <hm>hi\n" in rendered(client, url, thought, chat_template=READS)
    assert rendered(client, url, thought) == rendered(client, url, turns)
