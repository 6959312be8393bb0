"""Fields beyond OpenAI's own, over the real engine with a tiny random model: each does what it says."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import Running

GREEDY = {"temperature": 0, "ignore_eos": True}
HELLO = [{"role": "user", "content": "hello"}]
MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def http(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url) as session:
        yield session


def ask(http: httpx.Client, route: str, **body: Any) -> dict[str, Any]:
    response = http.post(route, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(http: httpx.Client, route: str, **body: Any) -> list[dict[str, Any]]:
    response = http.post(route, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "hello world"
    answer = ask(http, "/tokenize", prompt=text, return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) > 0
    assert answer["max_model_len"] == MAX_MODEL_LEN
    assert len(answer["token_strs"]) == answer["count"]
    assert ask(http, "/detokenize", tokens=answer["tokens"])["prompt"] == "".join(answer["token_strs"])
    bare = ask(http, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert ask(http, "/detokenize", tokens=bare)["prompt"] == text
    assert answer["tokens"][-len(bare) :] == bare


def test_tokenize_agrees_with_the_prompts_of_both_routes(http: httpx.Client) -> None:
    tokens = ask(http, "/tokenize", prompt="abc")["tokens"]
    answer = ask(http, "/v1/completions", prompt="abc", max_tokens=3, return_token_ids=True, **GREEDY)
    assert answer["choices"][0]["prompt_token_ids"] == tokens
    assert len(answer["choices"][0]["token_ids"]) == 3
    tokens = ask(http, "/tokenize", messages=HELLO)["tokens"]
    answer = ask(http, "/v1/chat/completions", messages=HELLO, max_tokens=3, return_token_ids=True, **GREEDY)
    assert answer["prompt_token_ids"] == tokens
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"] == 3
    open_turn = ask(http, "/tokenize", messages=HELLO, add_generation_prompt=False)["tokens"]
    assert open_turn == tokens[: len(open_turn)] != tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "model": 1}, "model"),
        ({"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
        ({"prompt": "x", "prompts": "y"}, "prompts"),
        ({"messages": [], "prompt": "x"}, "prompt"),
        ({"messages": HELLO, "tools": [1]}, "tools[0]"),
        ({"prompt": "x" * 100_000}, "prompt"),
    ],
)
def test_bad_tokenize(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/tokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("tokens", [None, "x", [-1], [320], [1.0], [True], [2**63]])
def test_bad_detokenize(http: httpx.Client, tokens: Any) -> None:
    response = http.post("/detokenize", json={"tokens": tokens})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


def test_streamed_token_ids_are_those_of_the_whole(http: httpx.Client) -> None:
    for route, source in (("/v1/completions", {"prompt": "ab"}), ("/v1/chat/completions", {"messages": HELLO})):
        body = {**source, "max_tokens": 6, "n": 2, "seed": 1, "ignore_eos": True, "return_token_ids": True}
        whole = ask(http, route, **body)
        streamed: dict[int, list[int]] = {0: [], 1: []}
        prompts = []
        for event in events(http, route, **body):
            prompts.append(event.get("prompt_token_ids", event["choices"][0].get("prompt_token_ids")))
            streamed[event["choices"][0]["index"]] += event["choices"][0].get("token_ids", [])
        assert streamed == {choice["index"]: choice["token_ids"] for choice in whole["choices"]}
        expected = whole.get("prompt_token_ids") or whole["choices"][0]["prompt_token_ids"]
        assert [item for item in prompts if item is not None] == [expected] * 2


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, slice(-2, None)),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, slice(-2, None)),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, slice(None, 2)),
        ({"truncate_prompt_tokens": 99}, slice(None)),
        ({"truncate_prompt_tokens": -1}, slice(None)),
    ],
)
def test_truncation(http: httpx.Client, options: dict[str, Any], kept: slice) -> None:
    tokens = [5, 6, 7, 8, 9]
    answer = ask(http, "/v1/completions", prompt=tokens, max_tokens=2, return_token_ids=True, **GREEDY, **options)
    assert answer["choices"][0]["prompt_token_ids"] == tokens[kept]
    assert answer["usage"]["prompt_tokens"] == len(tokens[kept])
    alone = ask(http, "/v1/completions", prompt=tokens[kept], max_tokens=2, return_token_ids=True, **GREEDY)
    assert answer["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]


def test_truncation_makes_what_is_too_long_fit(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": list(range(300)) * 2, "max_tokens": 4, "return_token_ids": True, **GREEDY}
    assert http.post("/v1/completions", json=body).status_code == 400
    answer = ask(http, "/v1/completions", **body, truncate_prompt_tokens=-1)
    assert answer["choices"][0]["prompt_token_ids"] == body["prompt"][-(MAX_MODEL_LEN - 4) :]
    assert len(answer["choices"][0]["token_ids"]) == 4


def test_truncated_echo_shows_what_was_read(http: httpx.Client) -> None:
    answer = ask(http, "/v1/completions", prompt="abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "ef"


def test_max_tokens_past_the_context_is_refused_with_the_numbers(http: httpx.Client) -> None:
    for stream in (False, True):
        response = http.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 510, "stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
        assert "509" in error["message"]
    assert len(ask(http, "/v1/completions", prompt=[1] * 511)["choices"][0]["text"]) >= 0  # a default is cut short
    response = http.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": None, "min_tokens": 511})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "min_tokens")


def test_usage_goes_on_in_every_event(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for route, source in (("/v1/completions", {"prompt": "ab"}), ("/v1/chat/completions", {"messages": HELLO})):
        found = events(http, route, **source, max_tokens=5, **GREEDY, stream_options=options)
        counts = [event["usage"]["completion_tokens"] for event in found]
        assert counts == sorted(counts)
        assert (counts[0] <= 1, counts[-1]) == (True, 5)
        assert found[-1]["choices"] == []
        alone = events(
            http, route, **source, max_tokens=5, **GREEDY, stream_options={"continuous_usage_stats": True}
        )  # fmt: skip
        assert alone[-1]["choices"]
        assert alone[-1]["usage"]["completion_tokens"] == 5
    for bad in ({"include_obfuscation": True}, {"include_usages": True}, {"include_usage": 1}):
        body = {"prompt": "x", "stream": True, "stream_options": bad}
        assert http.post("/v1/completions", json=body).json()["error"]["param"] == "stream_options"


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_tokens_come_together_by_the_interval(http: httpx.Client, route: str) -> None:
    source = {"prompt": "ab"} if route == "/v1/completions" else {"messages": HELLO}
    body = {**source, "max_tokens": 10, "n": 2, "seed": 1, "ignore_eos": True, "return_token_ids": True}
    found: dict[int, list[int]] = {}
    texts = {1: "", 4: ""}
    for interval in texts:
        counts: dict[int, list[int]] = {0: [], 1: []}
        for event in events(http, route, **body, stream_interval=interval):
            choice = event["choices"][0]
            texts[interval] += choice.get("text", choice.get("delta", {}).get("content", "")) * (choice["index"] == 0)
            if choice.get("token_ids"):
                counts[choice["index"]].append(len(choice["token_ids"]))
        assert counts[0] == counts[1]
        found[interval] = counts[0]
    assert found == {1: [1] * 10, 4: [1, 4, 4, 1]}
    assert texts[1] == texts[4] != ""


def test_timings_and_server_timing(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": [3, 4, 5], "max_tokens": 5, **GREEDY})
    timings = response.json()["timings"]
    assert (timings["predicted_n"], timings["prompt_n"] + timings["cache_n"]) == (5, 3)
    assert all(timings[name] >= 0 for name in ("queue_ms", "prompt_ms", "predicted_ms"))
    assert timings["ttft_ms"] == pytest.approx(timings["queue_ms"] + timings["prompt_ms"], abs=0.01)
    spans = dict(item.split(";dur=") for item in response.headers["server-timing"].split(", "))
    assert set(spans) == {"queue", "prefill", "decode", "total"}
    assert float(spans["total"]) == pytest.approx(sum(float(spans[name]) for name in list(spans)[:3]), abs=0.01)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        found = events(http, "/v1/chat/completions", messages=HELLO, max_tokens=4, **GREEDY, **options)
        assert [event.get("timings", {}).get("predicted_n") for event in found] == [None] * (len(found) - 1) + [4]
    with http.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 3, "stream": True}) as streamed:
        assert streamed.headers["server-timing"].startswith("queue;dur=")


def test_cached_tokens_are_in_the_usage(http: httpx.Client) -> None:
    prompt = [7, *range(100, 140)]
    first = ask(http, "/v1/completions", prompt=prompt, max_tokens=1, cache_salt="cached")
    again = ask(http, "/v1/completions", prompt=prompt, max_tokens=1, cache_salt="cached")
    other = ask(http, "/v1/completions", prompt=prompt, max_tokens=1, cache_salt="other")
    found = [item["usage"]["prompt_tokens_details"]["cached_tokens"] for item in (first, again, other)]
    assert (found[0], found[1] >= 32, found[2]) == (0, True, 0)
    assert again["timings"]["cache_n"] == found[1]


def test_echo_of_a_chat_is_the_assistants_own_beginning(http: httpx.Client) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, "}]
    body = {"messages": begun, "continue_final_message": True, "max_tokens": 4, **GREEDY}
    plain = ask(http, "/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    assert ask(http, "/v1/chat/completions", **body, echo=True)["choices"][0]["message"]["content"] == "Well, " + plain
    texts = [
        event["choices"][0]["delta"].get("content", "")
        for event in events(http, "/v1/chat/completions", **body, echo=True)
    ]
    assert "".join(texts) == "Well, " + plain
    same = ask(http, "/v1/chat/completions", messages=HELLO, echo=True, max_tokens=4, **GREEDY)
    assert not same["choices"][0]["message"]["content"].startswith("hello")


def test_tokens_named_by_id(http: httpx.Client) -> None:
    extras = {"return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 3, **GREEDY}
    choice = ask(http, "/v1/completions", prompt="ab", logprobs=2, **extras)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{item}" for item in choice["token_ids"]]
    assert all(name.startswith("token_id:") for best in choice["logprobs"]["top_logprobs"] for name in best)
    choice = ask(http, "/v1/chat/completions", messages=HELLO, logprobs=True, top_logprobs=1, **extras)["choices"][0]
    named = [item["token"] for item in choice["logprobs"]["content"]]
    assert named == [f"token_id:{item}" for item in choice["token_ids"]]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        *[({"truncate_prompt_tokens": value}, "truncate_prompt_tokens") for value in (0, -2, 1.5, "3", True, 2**31)],
        ({"truncate_prompt_tokens": 3, "truncation_side": "middle"}, "truncation_side"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"allowed_token_ids": [65], "bad_words": ["A"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [256, 9], "min_tokens": 1, "stop_token_ids": [9]}, "allowed_token_ids"),
        *[({"repetition_penalty": value}, "repetition_penalty") for value in (5e-324, 0.0009)],
        *[({"stream_interval": value}, "stream_interval") for value in (0, -1, 1.5, "2", True)],
        ({"return_tokens_as_token_ids": "yes"}, "return_tokens_as_token_ids"),
    ],
)
def test_bad_extras(http: httpx.Client, options: dict[str, Any], param: str) -> None:
    for route, source in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": HELLO})):
        response = http.post(f"/v1/{route}", json={**source, **options})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_masks_and_stops(http: httpx.Client) -> None:
    """Allowed tokens, bias, bad words, stop tokens and strings, minimum: each decides what comes."""
    base = {"prompt": "ab", "max_tokens": 6, "return_token_ids": True, **GREEDY}

    def ids(**options: Any) -> list[int]:
        found: list[int] = ask(http, "/v1/completions", **base, **options)["choices"][0]["token_ids"]
        return found

    free = ids()
    assert set(ids(allowed_token_ids=[40, 41])) <= {40, 41}
    assert ids(logit_bias={"50": 100}) == [50] * 6
    assert ids(logit_bias={str(free[0]): -100})[0] != free[0]
    stopped = ask(http, "/v1/completions", **base, stop_token_ids=[free[2]])["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", free[2])
    assert stopped["token_ids"] == free[: free.index(free[2]) + 1]
    assert len(ids(stop_token_ids=[free[0]], min_tokens=4)) >= 4
    text = ask(http, "/detokenize", tokens=[50])["prompt"]
    biased = {"logit_bias": {"50": 100}, "stop": [text * 3]}
    cut = ask(http, "/v1/completions", **base, **biased)["choices"][0]
    kept = ask(http, "/v1/completions", **base, **biased, include_stop_str_in_output=True)["choices"][0]
    assert (cut["text"], kept["text"], cut["stop_reason"]) == ("", text * 3, text * 3)
    banned = ask(http, "/v1/completions", **base, logit_bias={"50": 100}, bad_words=[text])["choices"][0]
    assert text not in banned["text"]
