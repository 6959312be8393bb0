"""TGI's API, judged by its own client's types (huggingface_hub) and over a fake and a tiny real engine."""

import json
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError
from huggingface_hub.inference._generated.types import text_generation as types
from prometheus_client.parser import text_string_to_metric_families

from quire.errors import InvalidRequestError
from quire.isolation.supervisor import SupervisedChannel
from quire.llm import AsyncLLM
from quire.server.doors.tgi.parse import parse_generate
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from tests.server.conftest import Running, start
from tests.server.fake_engine import FakeEngine
from tests.tiny.checkpoints import make_tiny

LIMITS = Limits()


def parsed(parameters: dict[str, Any], **body: Any) -> Any:
    raw = {"inputs": "x", "parameters": parameters, **body}
    return parse_generate(raw, LIMITS, stream=None, shows_prompt=True)


@pytest.fixture
def hub(running: Running, monkeypatch: pytest.MonkeyPatch) -> InferenceClient:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return InferenceClient(running.url)


@pytest.fixture
def real_hub(real: Running, monkeypatch: pytest.MonkeyPatch) -> InferenceClient:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return InferenceClient(real.url)


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data:") for line in lines)
    return [json.loads(line[5:]) for line in lines]


# The client, unchanged.


@pytest.mark.client(
    "huggingface_hub",
    "text_generation",
    "text_generation(stream)",
    "text_generation(return_full_text)",
)
def test_the_client_generates(hub: InferenceClient) -> None:
    assert hub.text_generation("say", max_new_tokens=4, return_full_text=False) == "abcd"
    assert hub.text_generation("say", max_new_tokens=4, return_full_text=True) == "sayabcd"
    said = list(hub.text_generation("say", max_new_tokens=4, stream=True))
    assert said == ["a", "b", "c", "d"]


@pytest.mark.client(
    "huggingface_hub",
    "text_generation(details, decoder_input_details, top_n_tokens)",
    "text_generation(details, stream)",
)
def test_the_client_reads_details(hub: InferenceClient) -> None:
    found = hub.text_generation(
        "say", max_new_tokens=3, details=True, decoder_input_details=True, top_n_tokens=2, return_full_text=False
    )
    assert isinstance(found, types.TextGenerationOutput) and found.details is not None
    assert (found.generated_text, found.details.finish_reason, found.details.generated_tokens) == ("abc", "length", 3)
    assert [token.text for token in found.details.prefill] == list("say")
    assert [token.logprob for token in found.details.prefill] == [None, -0.5, -0.5]
    assert [(token.id, token.text, token.logprob, token.special) for token in found.details.tokens] == [
        (97, "a", -0.5, False), (98, "b", -0.5, False), (99, "c", -0.5, False),
    ]  # fmt: skip
    tops = found.details.top_tokens
    assert tops is not None and [len(one) for one in tops] == [2, 2, 2]
    *_, last = hub.text_generation("say", max_new_tokens=3, details=True, stream=True, return_full_text=True)
    assert isinstance(last, types.TextGenerationStreamOutput) and last.details is not None
    assert (last.index, last.token.text, last.generated_text) == (3, "c", "sayabc")
    assert (last.details.finish_reason, last.details.input_length, last.details.seed) == ("length", 3, None)


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_knows_a_refusal(hub: InferenceClient, stream: bool) -> None:
    for options in ({"max_new_tokens": 600}, {"watermark": True}, {"adapter_id": "x"}, {"top_k": -3}):
        with pytest.raises(ValidationError, match=r"max_new_tokens|watermark|adapter_id|top_k"):
            list(hub.text_generation("say", stream=stream, **options))  # type: ignore[call-overload]


def test_the_client_knows_a_full_server(hub: InferenceClient, running: Running) -> None:
    running.engine.is_full = True
    try:
        with pytest.raises(OverloadedError):
            hub.text_generation("say")
    finally:
        running.engine.is_full = False


@pytest.mark.client("huggingface_hub", "chat_completion", "chat_completion(stream)")
def test_the_client_chats(hub: InferenceClient) -> None:
    """It names no model, where it has an address: then it sends one of its own."""
    messages = [{"role": "user", "content": "x"}]
    assert hub.chat_completion(messages, max_tokens=3).choices[0].message.content == "abc"
    streamed = list(hub.chat_completion(messages, max_tokens=3, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in streamed if event.choices) == "abc"


# Routes.


@pytest.mark.parametrize("path", ["/generate", "/"])
def test_an_answer_stands_alone_or_in_a_list(http: httpx.Client, path: str) -> None:
    response = http.post(path, json={"inputs": "say", "parameters": {"max_new_tokens": 3}})
    found = {"generated_text": "abc" if path == "/generate" else "sayabc"}
    assert response.json() == (found if path == "/generate" else [found])
    headers = response.headers
    assert headers["x-compute-characters"] == "3" and headers["x-request-id"].startswith("tgi-")


def test_a_stream_says_what_the_whole_says(real: Running) -> None:
    body = {"inputs": "Hello there", "parameters": {"max_new_tokens": 40, "details": True, "top_n_tokens": 3}}
    for more in ({}, {"do_sample": True, "seed": 2**64 - 3, "typical_p": 0.8, "top_k": 30, "stop": ["e", "\u00e9"]}):
        body["parameters"] |= more  # type: ignore[operator]
        whole = httpx.post(f"{real.url}/generate", json=body).json()
        events = events_of(httpx.post(f"{real.url}/generate_stream", json=body).text)
        assert [event["index"] for event in events] == list(range(1, len(events) + 1))
        assert [event["token"] for event in events] == whole["details"]["tokens"]
        assert [event["top_tokens"] for event in events] == whole["details"]["top_tokens"]
        text = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
        assert text == whole["generated_text"] == events[-1]["generated_text"]
        details = events[-1]["details"]
        assert {name: whole["details"][name] for name in details if name != "input_length"} | {
            "input_length": 11
        } == details
        assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])


def test_the_tokens_are_those_of_the_other_door(real: Running) -> None:
    parameters = {"max_new_tokens": 12, "details": True, "do_sample": True, "seed": 5, "temperature": 0.9, "top_p": 0.8}
    mine = httpx.post(f"{real.url}/generate", json={"inputs": "Hello", "parameters": parameters}).json()
    body = {"prompt": "Hello", "max_tokens": 12, "seed": 5, "temperature": 0.9, "top_p": 0.8, "return_token_ids": True}
    (other,) = httpx.post(f"{real.url}/v1/completions", json=body).json()["choices"]
    assert [token["id"] for token in mine["details"]["tokens"]] == other["token_ids"]
    assert mine["generated_text"] == other["text"] and mine["details"]["seed"] == 5


@pytest.mark.client("huggingface_hub", "text_generation(best_of, do_sample, details)", "text_generation(seed)")
def test_the_best_of_several_is_the_most_probable(real_hub: InferenceClient) -> None:
    found = real_hub.text_generation("Hello", best_of=4, do_sample=True, details=True, max_new_tokens=6)
    assert found.details is not None and found.details.best_of_sequences is not None
    sequences = [found.details, *found.details.best_of_sequences]
    means = [math.fsum(token.logprob for token in one.tokens) / len(one.tokens) for one in sequences]
    assert len(sequences) == 4 and means == sorted(means, reverse=True) and means[0] > means[-1]
    seeds = [one.seed for one in sequences]
    assert len({*seeds}) == 4
    for one in sequences[:2]:  # each can be had again by its seed
        again = real_hub.text_generation("Hello", do_sample=True, details=True, max_new_tokens=6, seed=one.seed)
        assert again.details is not None and [t.id for t in again.details.tokens] == [t.id for t in one.tokens]


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        ({"type": "regex", "value": "[0-9]{2}-[a-c]"}, lambda text: text[2] == "-" and len(text) == 4),
        ({"type": "json", "value": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                                    "additionalProperties": False}}, lambda text: type(json.loads(text)["a"]) is bool),
        ({"type": "json", "value": '{"enum": [17]}'}, lambda text: json.loads(text) == 17),
        ({"type": "json_schema", "value": {"name": "n", "schema": {"enum": ["x"]}}},
         lambda text: json.loads(text) == "x"),
    ],
)  # fmt: skip
def test_answers_are_held_to_a_grammar(real: Running, grammar: Any, fits: Any) -> None:
    body = {"inputs": "Hello", "parameters": {"grammar": grammar, "max_new_tokens": 60, "details": True}}
    found = httpx.post(f"{real.url}/generate", json=body).json()
    assert fits(found["generated_text"]) and found["details"]["finish_reason"] == "eos_token"


@pytest.mark.parametrize("value", ["{", {"type": "strange"}])
def test_a_grammar_that_does_not_compile_is_named(real: Running, value: Any) -> None:
    body = {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": value}}}
    response = httpx.post(f"{real.url}/generate", json=body)
    assert response.status_code == 422 and "grammar" in response.json()["error"]
    assert "structured_outputs" not in response.text


def test_an_answer_keeps_the_stop_string_that_ended_it(http: httpx.Client, real: Running) -> None:
    body: dict[str, Any] = {"inputs": "Hello", "parameters": {"max_new_tokens": 60, "details": True}}
    text = httpx.post(f"{real.url}/generate", json=body).json()["generated_text"]
    body["parameters"]["stop"] = [text[3:5]]
    found = httpx.post(f"{real.url}/generate", json=body).json()
    assert found["generated_text"] == text[: text.index(text[3:5]) + 2]
    assert found["details"]["finish_reason"] == "stop_sequence"


def test_a_prompt_is_cut_at_its_beginning(real: Running) -> None:
    details = {"details": True, "decoder_input_details": True, "max_new_tokens": 2}
    body = {"inputs": "Hello there", "parameters": {"truncate": 5, **details}}
    found = httpx.post(f"{real.url}/generate", json=body).json()
    assert "".join(token["text"] for token in found["details"]["prefill"]) == "there"
    assert len(found["details"]["tokens"]) == 2


def test_a_length_left_open_is_what_fits(running: Running, http: httpx.Client) -> None:
    assert http.post("/generate", json={"inputs": "x" * 500}).json()["generated_text"] == ("abcdefghijkl")
    assert running.engine.calls[-1]["params"].max_tokens == 12


def test_tokenize_is_one_route_in_two_forms(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"inputs": "ab"}).json() == [
        {"id": 97, "text": "a", "start": 0, "stop": 1},
        {"id": 98, "text": "b", "start": 1, "stop": 2},
    ]
    assert http.post("/tokenize", json={"prompt": "ab"}).json()["tokens"] == [97, 98]
    mine, other = http.post("/tokenize", json={"inputs": 3}), http.post("/tokenize", json={"prompt": 3})
    assert (mine.status_code, set(mine.json())) == (422, {"error", "error_type"})
    assert (other.status_code, set(other.json())) == (400, {"error"})


def test_a_conversation_is_written_and_cut(real: Running) -> None:
    messages = [{"role": "user", "content": "hi"}]
    found = httpx.post(f"{real.url}/chat_tokenize", json={"messages": messages, "model": "tgi"}).json()
    text, tokens = found["templated_text"], found["tokenize_response"]
    assert text == "<|user|>hi<|assistant|>" and "".join(token["text"] for token in tokens) == text
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in tokens)
    ids = httpx.post(f"{real.url}/tokenize", json={"messages": messages}).json()["tokens"]
    assert [token["id"] for token in tokens] == ids


def test_the_server_says_what_it_is_bound_by(http: httpx.Client) -> None:
    found = http.get("/info").json()
    assert (found["model_id"], found["max_total_tokens"], found["max_input_tokens"]) == ("tiny", 512, 511)
    assert http.get("/health").status_code == 200 and http.get("/").json()["name"] == "quire"


def test_metrics_have_its_names_on_request() -> None:
    instance = start(FakeEngine(), metrics_prefix="tgi")
    try:
        found = {item.name for item in text_string_to_metric_families(httpx.get(f"{instance.url}/metrics").text)}
    finally:
        instance.stop()
    assert found == {"tgi_batch_current_size", "tgi_request_count", "tgi_request_success"}, "those that the fake counts"


# Bad input.


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": 0}, "temperature"), ({"top_p": 1.5}, "top_p"),
        ({"typical_p": 0}, "typical_p"), ({"top_k": 0}, "top_k"), ({"seed": 2**64}, "seed"), ({"seed": -1}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"stop": "x"}, "stop"), ({"stop": [""]}, "stop"), ({"stop": ["x"] * 65}, "stop"),
        ({"truncate": 0}, "truncate"),
        ({"top_n_tokens": 21, "details": True}, "top_n_tokens"),
        ({"best_of": 2}, "sampling"), ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"best_of": 0}, "best_of"), ({"watermark": True}, "watermark"), ({"adapter_id": "a"}, "adapter_id"),
        ({"grammar": {"type": "regex"}}, "value"), ({"grammar": {"type": "lark", "value": "x"}}, "json_schema"),
        ({"grammar": {"type": "regex", "value": {}}}, "regular expression"),
        ({"grammar": {"type": "json_schema", "value": {"name": "x"}}}, "schema"),
        ({"max_new_token": 1}, "max_new_tokens"), ({"details": 1}, "details"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(http: httpx.Client, parameters: dict[str, Any], word: str) -> None:
    response = http.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert response.status_code == 422 and set(response.json()) == {"error", "error_type"}
    assert word in response.json()["error"] and response.json()["error_type"] == "validation"
    (event,) = events_of(http.post("/generate_stream", json={"inputs": "x", "parameters": parameters}).text)
    assert event == response.json(), "its clients look for errors of a stream in the events"


@pytest.mark.parametrize(
    ("body", "word"),
    [({"inputs": ""}, "inputs"), ({}, "inputs"), ({"inputs": "x", "parameters": {"top_n_tokens": 2}}, "details"),
     ({"inputs": "x", "parameters": []}, "parameters"),
     ({"inputs": "x", "stream": True}, "generate_stream"), ({"inputs": "x", "input": 1}, "inputs")],
)  # fmt: skip
def test_a_body_is_refused_by_its_field(http: httpx.Client, body: dict[str, Any], word: str) -> None:
    response = http.post("/generate", json=body)
    assert response.status_code == 422 and word in response.json()["error"]


def test_values_that_ask_for_nothing_pass() -> None:
    """What the clients send where a caller sets nothing."""
    nothing = dict.fromkeys(("best_of", "temperature", "top_k", "top_p", "typical_p", "seed", "grammar", "adapter_id"))
    call = parsed({**nothing, "watermark": False, "stop": [], "do_sample": False, "details": False, "truncate": None})
    assert call.params.temperature == 0.0 and not call.is_sampled and call.shows_prompt


@pytest.mark.parametrize("one", [{"do_sample": True}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
def test_what_only_sampling_has_samples(one: dict[str, Any]) -> None:
    call = parsed(one)
    assert call.is_sampled and call.params.temperature == one.get("temperature", 1.0)
    assert call.seed_of(0) is not None and call.seed_of(0) == (call.params.seed or 0) % 2**64
    assert not parsed({"temperature": 1.0}).is_sampled


@pytest.mark.parametrize(
    ("parameters", "more"),
    [({"best_of": 2, "do_sample": True}, {"stream": True}), ({"decoder_input_details": True}, {"stream": True})],
)
def test_what_a_stream_has_not(parameters: dict[str, Any], more: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="stream: false"):
        parsed(parameters, **more)


def test_limits_hold() -> None:
    with pytest.raises(ApiError, match="characters"):
        parsed({"stop": ["x" * 1000] * 33})
    instance = start(FakeEngine(), limits=LIMITS.with_values({"prompt_tokens": 5, "logprobs": 30, "sequences": 2}))
    try:
        with httpx.Client(base_url=instance.url) as http:
            for inputs, parameters, word in (
                ("x" * 6, {}, "5 tokens"),
                ("x", {"details": True, "max_new_tokens": 20, "top_n_tokens": 1}, "30 log-probabilities"),
                ("x", {"best_of": 3, "do_sample": True}, "2 sequences"),
            ):
                response = http.post("/generate", json={"inputs": inputs, "parameters": parameters})
                assert response.status_code == 422 and word in response.json()["error"]
            other = http.post("/v1/completions", json={"prompt": "x" * 6})
            assert other.status_code == 400 and other.json()["error"]["param"] == "prompt"
    finally:
        instance.stop()


def test_errors_of_the_http_side_have_its_shape() -> None:
    instance = start(FakeEngine(), api_key="k")
    try:
        with httpx.Client(base_url=instance.url) as http:
            for method, path in (("POST", "/generate"), ("GET", "/info"), ("POST", "/chat_tokenize"), ("POST", "/")):
                response = http.request(method, path, json={"inputs": "x"})
                assert (response.status_code, response.json()["error_type"]) == (401, "invalid_api_key")
            http.headers["authorization"] = "Bearer k"
            assert http.post("/generate", content=b"{").json()["error_type"] == "unsupported_media_type"
            refused = http.put("/")
            assert refused.status_code == 405 and refused.headers["allow"] == "GET, HEAD, POST"
            instance.engine.is_full = True
            full = http.post("/generate", json={"inputs": "x"})
            assert (full.status_code, full.json()["error_type"]) == (429, "overloaded")
            assert "retry-after" in full.headers
    finally:
        instance.stop()


def test_a_request_that_fails_while_it_runs(http: httpx.Client) -> None:
    response = http.post("/generate", json={"inputs": "fail"})
    assert (response.status_code, response.json()) == (424, {"error": "the row broke", "error_type": "generation"})
    *_, last = events_of(http.post("/generate_stream", json={"inputs": "fail"}).text)
    assert last == response.json()


def test_the_death_of_the_engine_ends_a_stream() -> None:
    instance = start(FakeEngine())
    try:
        *tokens, last = events_of(httpx.post(f"{instance.url}/generate_stream", json={"inputs": "die"}).text)
        assert len(tokens) == 2 and last["error_type"] == "incomplete_generation"
    finally:
        instance.stop()


# The death of the core.


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = make_tiny("llama", tmp_path_factory.mktemp("tiny"), tokenizer=True)
    instance = start(AsyncLLM(str(directory), max_num_seqs=4, core_process=True))
    yield instance
    instance.stop()
    instance.engine.close()


def test_a_stream_goes_on_after_the_death_of_the_core(mortal: Running) -> None:
    parameters = {"max_new_tokens": 150, "do_sample": True, "seed": 9, "details": True, "top_n_tokens": 2,
                  "repetition_penalty": 1.1, "typical_p": 0.9}  # fmt: skip
    body = {"inputs": "Hello", "parameters": parameters}
    expected = events_of(httpx.post(f"{mortal.url}/generate_stream", json=body, timeout=120).text)
    for _ in range(20):  # on a busy machine the core may be done before the kill
        events: list[dict[str, Any]] = []
        with httpx.stream("POST", f"{mortal.url}/generate_stream", json=body, timeout=120) as response:
            for line in response.iter_lines():
                events += [json.loads(line[5:])] if line else []
                if len(events) == 10 and line:
                    channel = mortal.engine._engine.channel
                    assert isinstance(channel, SupervisedChannel) and channel.pid is not None
                    os.kill(channel.pid, signal.SIGKILL)
        assert events == expected
        if mortal.engine._engine.channel.health.num_died:
            return
    raise AssertionError("no kill came in time")
