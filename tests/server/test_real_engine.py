"""The same server over the real engine with a tiny random model: streams equal answers, and nothing is left over."""

import json
import re
import socket
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import MODEL, Running, wait_until

HELLO: Any = [{"role": "user", "content": "hello"}]
TOTALS = ("prompt_tokens", "prompt_tokens_cached")


@pytest.fixture(scope="module")
def client(real: Running) -> openai.OpenAI:
    return real.client()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_equals_answer(client: openai.OpenAI, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": MODEL, "prompt": ["one", "another"], "n": 2, "seed": 7, "temperature": temperature,
        "max_tokens": 24, "logprobs": 3, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.completions.create(**options)
    texts, tokens = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += zip(
                    choice.logprobs.tokens or [], choice.logprobs.token_logprobs or [], strict=True
                )
    assert texts == [choice.text for choice in whole.choices]
    for choice, streamed in zip(whole.choices, tokens, strict=True):
        assert choice.logprobs is not None
        assert streamed == list(zip(choice.logprobs.tokens or [], choice.logprobs.token_logprobs or [], strict=True))
        assert choice.finish_reason == "length"


def test_seed_repeats_and_siblings_differ(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, n=3, seed=5, temperature=1.0, max_tokens=16
        )
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert ask() == first
    assert len(set(first)) == 3


def test_chat_logprobs_have_exact_bytes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    content = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert content
    assert len(content) == 12
    assert answer.choices[0].message.content == b"".join(bytes(item.bytes or []) for item in content).decode(
        errors="replace"
    )
    for item in content:
        assert len(item.top_logprobs) == 2
        assert item.top_logprobs[0].logprob == item.logprob  # greedy: the chosen one is the best
        assert item.top_logprobs[0].logprob >= item.top_logprobs[1].logprob


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abcd", max_tokens=0, echo=True, logprobs=1)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == ["a", "b", "c", "d"]
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert all(value is not None and value < 0 for value in found.token_logprobs[1:])


def test_errors_name_the_field(client: openai.OpenAI) -> None:
    for changes, param in (
        ({"prompt": [1, 320]}, "prompt"),
        ({"prompt": "x" * 512}, "prompt"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [320]}}, "stop_token_ids"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": MODEL, "prompt": "x", **changes})  # type: ignore[call-overload]
        assert caught.value.param == param


@pytest.mark.parametrize("stream", [True, False])
def test_closed_connection_frees_its_blocks(real: Running, stream: bool) -> None:
    body = {"prompt": ["a" * 40, "b" * 40], "n": 2, "max_tokens": 450, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    aborted = _metric(real, "quire:request_success_total", 'finished_reason="abort"')
    with socket.create_connection(("127.0.0.1", int(real.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert wait_until(lambda: _metric(real, "quire:kv_cache_usage_perc") > 0)
    assert wait_until(lambda: not real.engine.has_work)
    for name in ("quire:num_requests_running", "quire:kv_cache_usage_perc", "quire:num_requests_waiting"):
        assert wait_until(lambda name=name: _metric(real, name) == 0)
    assert _metric(real, "quire:request_success_total", 'finished_reason="abort"') == aborted + 4


def _metric(real: Running, name: str, label: str = "") -> float:
    for line in httpx.get(f"{real.url}/metrics").text.splitlines():
        if line.startswith(f"{name}{{") and label in line:
            return float(line.rsplit(" ", 1)[1])
    raise KeyError(name)


def test_metrics_by_source_and_reason(real: Running) -> None:
    def read() -> dict[str, float]:
        lines = httpx.get(f"{real.url}/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {re.sub(r'model_name="[^"]*",|engine="0",?', "", name): float(value) for name, value in pairs}

    def source(found: dict[str, float], name: str) -> float:
        return next(value for key, value in found.items() if "by_source_total" in key and f'source="{name}"' in key)

    body = {"prompt": list(range(7, 60)), "max_tokens": 3, "n": 2, "cache_salt": "metrics"}
    before = read()
    for _ in range(2):
        assert httpx.post(f"{real.url}/v1/completions", json=body).status_code == 200
    after = read()
    gained = {name: source(after, name) - source(before, name) for name in ("local_compute", "local_cache_hit")}
    totals = {name: next(v for k, v in after.items() if k.startswith(f"quire:{name}_total")) for name in TOTALS}
    assert gained["local_cache_hit"] >= 48 and gained["local_compute"] > 0
    assert source(after, "local_compute") + source(after, "local_cache_hit") == totals["prompt_tokens"]
    assert source(after, "local_cache_hit") == totals["prompt_tokens_cached"]
    waiting = [value for key, value in after.items() if key.startswith("quire:num_requests_waiting_by_reason")]
    assert len(waiting) == 3 and sum(waiting) == 0
    config = next(key for key in after if key.startswith("quire:cache_config_info"))
    assert 'block_size="16"' in config and 'enable_prefix_caching="True"' in config and "num_gpu_blocks=" in config
    longest = "quire:request_max_num_generation_tokens_count"
    assert sum(v - before.get(k, 0) for k, v in after.items() if k.startswith(longest)) == 2
