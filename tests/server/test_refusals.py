"""Bodies, fields and routes that are refused: with 4xx, in OpenAI's shape, naming the field, telling nothing else."""

import json
import re
from typing import Any

import httpx
import pytest

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.server.doors.openai.bodies import CHAT, COMPLETION
from quire.server.doors.openai.parse import parse_chat, parse_completion
from quire.server.http.limits import Limits
from tests.server.conftest import MODEL, Running

PRIVATE = re.compile(r'0x[0-9a-f]{6,}|/home|/usr|site-packages|Traceback|File "')
CHAT_BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT_BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 1}
JSON_HEADERS = {"content-type": "application/json"}


def check_shape(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not PRIVATE.search(response.text)
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        *[("temperature", value, 400) for value in (-1, 101, "1", True, [], 1e300)],
        *[("n", value, 400) for value in (0, -1, 1.5, "2", True, 129, 2**63, [])],
        *[("top_p", value, 400) for value in (0, 1.1, "x")],
        *[("top_k", value, 400) for value in (-2, 1.5, 2**31)],
        *[("min_p", value, 400) for value in (-0.1, 1.1)],
        *[("seed", value, 400) for value in (2**63, -(2**63) - 1, 1.5, "1")],
        *[("max_tokens", value, 400) for value in (0, -2, 2**31, 1.5, "5", True, -1.0)],
        *[("stop", value, 400) for value in (5, [5], [""], ["x"] * 65, "x" * 1025, {"a": 1})],
        *[("logit_bias", value, 400) for value in ([1], {"x": 1}, {"-1": 1}, {"1": 101}, {"1": "a"}, {"٣": 1})],
        *[("stop_token_ids", value, 400) for value in (["1"], [-1], [2**31], [1.0], "1", [1] * 4097)],
        *[("allowed_token_ids", value, 400) for value in ([], [-1], {})],
        *[("bad_words", value, 400) for value in ([""], [1], ["w"] * 257)],
        *[("presence_penalty", value, 400) for value in (-2.1, 2.1)],
        *[("repetition_penalty", value, 400) for value in (0, 2.1)],
        *[("stream", value, 400) for value in ("true", 1, [])],
        *[("stream_options", value, 400) for value in ({"include_usage": True}, [], 1)],
        *[("priority", value, 400) for value in ("1", 1.5, 2**40)],
        *[("cache_salt", value, 400) for value in (1, "x" * 257)],
        *[("ignore_eos", value, 400) for value in ("no", 0)],
        *[("user", value, 400) for value in (1, "x" * 513)],
        ("model", 5, 400),
        ("model", "other\r\nx", 404),
    ],
)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_bad_values(http: httpx.Client, route: str, field: str, value: Any, status: int) -> None:
    body = {**(CHAT_BODY if "chat" in route else TEXT_BODY), field: value}
    response = http.post(f"/v1/{route}", json=body)
    assert response.status_code == status, response.text
    assert check_shape(response)["param"] in (field, None if field == "user" else field)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "contents": 1}]}, "messages[0].contents"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": "x"}] * 2049}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"echo": 1}, "echo"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": [[[[[[[[[1]]]]]]]]]}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "foo": 1}]}]},
            "messages[0].content[0].foo",
        ),
        ({"messages": [{"role": "user", "content": [{"text": 1, "type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": "x", "cache_control": {"type": "for ever"}}]},
            "messages[0].cache_control.type",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "reasoning": "a", "reasoning_content": "b"}]},
            "messages[0].reasoning",
        ),
        ({"best_of": 2}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"store": 1}, "store"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(place): "x" for place in range(17)}}, "metadata"),
        ({"metadata": {"x" * 65: ""}}, "metadata"),
        ({"metadata": {"x": "y" * 513}}, "metadata"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"verbosity": "chatty"}, "verbosity"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "reasoning_effort"),
        ({"prompt_cache_key": "x" * 513}, "prompt_cache_key"),
        ({"prompt_cache_options": {"ttl": "1y"}}, "prompt_cache_options"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"top_logprobs": False}, "top_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"detokenize": False}, "detokenize"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_bad_chat(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    response = http.post("/v1/chat/completions", json={**CHAT_BODY, **changes})
    assert response.status_code == 400, response.text
    assert check_shape(response)["param"] == param


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": {"prompt": "x"}}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 64, "n": 5}, "n"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options"),
    ],
)
def test_bad_completion(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    response = http.post("/v1/completions", json={**TEXT_BODY, **changes})
    assert response.status_code == 400, response.text
    assert check_shape(response)["param"] == param


def test_unknown_field_names_the_nearest(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={**TEXT_BODY, "temprature": 1})
    error = check_shape(response)
    assert error["param"] == "temprature"
    assert error["message"] == "unknown field 'temprature'; did you mean 'temperature'?"


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False},
        {"metadata": None, "user": "me", "n": None, "stop": None, "service_tier": "auto"},
        {"stream_options": None, "modalities": ["text"], "logit_bias": None, "best_of": 1, "seed": None},
        {"max_tokens": 1, "max_completion_tokens": 1, "num_predict": 1, "top_k": -1},
        {"top_logprobs": 0, "best_of": 1},
        {"n": 2, "best_of": 2},
    ],
)
def test_neutral_values_are_let_through(http: httpx.Client, changes: dict[str, Any]) -> None:
    assert http.post("/v1/chat/completions", json={**CHAT_BODY, **changes}).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"n": 1, "n": 2}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\x00"}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": "x"} trailing',
    ],
)
def test_malformed_json(http: httpx.Client, data: bytes) -> None:
    response = http.post("/v1/completions", content=data, headers=JSON_HEADERS)
    assert response.status_code == 400, response.text
    assert check_shape(response)["code"] == "malformed_json"


def test_pairs_of_surrogates_are_text(http: httpx.Client) -> None:
    data = json.dumps({**TEXT_BODY, "prompt": "\N{SLIGHTLY SMILING FACE}"}).encode()
    assert b"\\ud83d" in data
    assert http.post("/v1/completions", content=data, headers=JSON_HEADERS).status_code == 200


def test_body_too_large_by_header_and_by_count(http: httpx.Client) -> None:
    data = b" " * (Limits().body_bytes.value + 1)
    for content in (data, iter([data[: len(data) // 2], data[len(data) // 2 :]])):
        response = http.post("/v1/completions", content=content, headers=JSON_HEADERS)
        assert response.status_code == 413
        assert check_shape(response)["code"] == "request_too_large"


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {**JSON_HEADERS, "content-encoding": "gzip"}])
def test_unsupported_media_type(http: httpx.Client, headers: dict[str, str]) -> None:
    response = http.post("/v1/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    check_shape(response)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("BREW", "/v1/models", 405),
        ("GET", "/v1/unknown", 404),
        ("POST", "/v1/completions/", 404),
        ("POST", "//v1/completions", 404),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
    ],
)
def test_routing(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, str(http.base_url).rstrip("/") + path)
    assert response.status_code == status
    check_shape(response)


def test_long_error_texts_are_cut(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={**TEXT_BODY, "seed": int("9" * 4000)})
    assert response.status_code == 400
    assert len(response.text) < 1200


RESERVED = "messages tokenize add_generation_prompt continue_final_message chat_template tools documents self".split()


@pytest.mark.parametrize("name", RESERVED)
def test_arguments_of_a_template_set_no_field_of_the_request(real: Running, name: str) -> None:
    """Refused by the engine, for the library too."""
    body = {"messages": CHAT_BODY["messages"], "chat_template_kwargs": {name: "x"}}
    for route in ("/v1/chat/completions", "/tokenize"):
        response = httpx.post(real.url + route, json=body)
        assert (response.status_code, check_shape(response)["param"]) == (400, "chat_template_kwargs"), response.text
        assert repr(name) in response.json()["error"]["message"]


def test_a_message_is_gone_on_with_or_answered(real: Running) -> None:
    """Both at once are refused by the engine, for the library too."""
    messages = [*CHAT_BODY["messages"], {"role": "assistant", "content": "so"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    for route in ("/v1/chat/completions", "/tokenize"):
        response = httpx.post(real.url + route, json=body)
        assert (response.status_code, check_shape(response)["param"]) == (400, "continue_final_message")
        assert "add_generation_prompt" in response.json()["error"]["message"]


def test_every_refused_field_is_refused_by_name() -> None:
    for schema, parse, body in ((COMPLETION, parse_completion, TEXT_BODY), (CHAT, parse_chat, CHAT_BODY)):
        for name, refused in schema.refused.items():
            with pytest.raises(InvalidRequestError) as caught:
                parse({**body, name: {"anything": "else"}}, SamplingParams(), Limits())
            assert caught.value.param == name
            for neutral in (None, *refused.neutral):
                parse({**body, name: neutral}, SamplingParams(), Limits())
