"""The API's description says what the parsers do."""

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.server.doors.openai.batches.routes import BATCH
from quire.server.doors.openai.bodies import MAX_TOKENS
from quire.server.doors.openai.parse import (
    check_token_ids,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from quire.server.doors.openai.responses.bodies import CONVERSATION, CONVERSATION_ITEMS, CONVERSATION_UPDATE
from quire.server.doors.openai.responses.parse import chat_of, parse_input, parse_response
from quire.server.doors.openai.routes import OPENAI
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from quire.server.http.openapi import document
from tests.server.conftest import Running, start
from tests.server.fake_engine import FakeEngine
from tests.server.test_http import _paths

LIMITS = Limits()
DOCUMENT = document([OPENAI], LIMITS, needs_key=False)
DEFAULTS = SamplingParams()
MESSAGES = [{"role": "user", "content": "x"}]
ITEM = {"type": "message", "role": "user", "content": "x"}


def _parse_response(body: dict[str, Any]) -> None:
    parsed, items = parse_response(body, LIMITS)
    chat_of(parsed, items, DEFAULTS, LIMITS)


def _parse_input(body: dict[str, Any]) -> None:
    parsed, items = parse_input(body, LIMITS)
    chat_of(parsed, items, DEFAULTS, LIMITS)


BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "CompletionRequest": (lambda body: parse_completion(body, DEFAULTS, LIMITS), {"prompt": "x"}),
    "ChatCompletionRequest": (lambda body: parse_chat(body, DEFAULTS, LIMITS), {"messages": MESSAGES}),
    "TokenizeRequest": (lambda body: parse_tokenize(body, LIMITS), {"prompt": "x"}),
    "ResponseRequest": (lambda body: _parse_response(body), {"input": "x"}),
    "InputTokensRequest": (lambda body: _parse_input(body), {"input": "x"}),
    "ConversationRequest": (lambda body: CONVERSATION.read(body, LIMITS), {}),
    "ConversationUpdateRequest": (lambda body: CONVERSATION_UPDATE.read(body, LIMITS), {"metadata": {}}),
    "ConversationItemsRequest": (lambda body: CONVERSATION_ITEMS.read(body, LIMITS), {"items": [ITEM]}),
    "BatchRequest": (
        lambda body: BATCH.read(body, LIMITS),
        {"input_file_id": "x", "endpoint": "/v1/completions", "completion_window": "24h"},
    ),
    "DetokenizeRequest": (lambda body: check_token_ids(parse_detokenize(body, LIMITS), 2**31), {"tokens": [1]}),
}
VALUES: list[Any] = [
    *(None, True, False, "", "x", "1", "left", "auto", "x" * 600, "x" * 1025),
    *(-101, -100, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 20, 21, 64, 100, 128, 129),
    *(2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63)),
    *([], [1], [0.5], ["x"], [""], [None], [[1]], [[]], [-1], [2**31], ["x"] * 65, ["x"] * 257, [1] * 4097, ["text"]),
    *({}, {"1": 1}, {"1": 101}, {"x": 1}, {"-1": 1}, {"include_usage": True}, {"type": "text"}, {"a": {}}, {"a b": 1}),
    *(MESSAGES, [{"role": "user"}], [{"role": "x", "content": "x"}], [{"role": "user", "content": ["x"], "name": "n"}]),
    *("low", "24h", "flex", {"a": "x" * 513}, {"x" * 65: ""}, {str(place): "" for place in range(17)}, {"ttl": "5m"}),
]  # fmt: skip
TOGETHER = {
    # What a schema of single fields cannot say: field -> values that stand in another field's way.
    "min_tokens": lambda value: value > 16,
    "stream_options": lambda value: True,
    "top_logprobs": lambda value: True,
    "truncation_side": lambda value: True,
    "max_tokens": lambda value: value == 0,
    "continue_final_message": lambda value: True,
    "logprob_token_ids": lambda value: bool(value),
    "structured_outputs": lambda value: value == {},
    "guided_whitespace_pattern": lambda value: True,
    "best_of": lambda value: value != 1,
    "length_penalty": lambda value: True,
    "messages": lambda value: value == [{"role": "user"}],
    "input": lambda value: value == [{"role": "user"}],
}
LATER = [("prompt", [-1]), ("prompt", [2**31]), ("input", None), ("input", [])]
"""Refused by the engine, which knows the vocabulary; or let through beside `previous_response_id`."""


def _accepts(parse: Any, body: dict[str, Any]) -> bool:
    try:
        parse(body)
    except (InvalidRequestError, ApiError):
        return False
    return True


@pytest.mark.parametrize("name", BODIES)
def test_schema_and_parser_agree_on_every_field(name: str) -> None:
    schemas = DOCUMENT["components"]["schemas"]
    validator = jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    )
    parse, base = BODIES[name]
    forms = schemas[name].get("anyOf", [schemas[name]])
    known = sorted({field for form in forms for field in form["properties"]})
    assert known
    disagreements = []
    for field in [*known, "unknown", "max_token"]:
        for value in VALUES:
            body = {**base, field: value}
            says, does = validator.is_valid(body), _accepts(parse, body)
            if (field, value) in LATER:
                continue
            excused = says and value is not None and TOGETHER.get(_canonical(field), lambda value: False)(value)
            if says != does and not excused:
                disagreements.append((field, str(value)[:40], f"schema {says}, parser {does}"))
    assert not disagreements, disagreements


def _canonical(field: str) -> str:
    return "max_tokens" if field in MAX_TOKENS else field


def test_every_route_is_described(http: httpx.Client, running: Running) -> None:
    found = http.get("/openapi.json")
    assert found.status_code == 200
    described = {path.replace("{name}", "{name:path}") for path in found.json()["paths"]}
    assert described <= set(_paths(running.server.config.app))
    posted = {path for path in described if path not in ("/", "/livez", "/readyz", "/health", "/metrics", "/version")}
    assert len(posted) == 38
    assert "security" not in found.json()


def test_the_description_needs_the_key_and_says_so() -> None:
    locked = start(FakeEngine(), api_key=["one", "two"])
    try:
        assert httpx.get(f"{locked.url}/openapi.json").status_code == 401
        for key in ("one", "two"):
            found = httpx.get(f"{locked.url}/openapi.json", headers={"authorization": f"Bearer {key}"})
            assert found.json()["security"] == [{"key": []}]
    finally:
        locked.stop()


def test_answers_are_as_described(real: Running) -> None:
    with httpx.Client(base_url=real.url) as http:
        extras: dict[str, Any] = {"return_token_ids": True, "prompt_logprobs": 1, "max_tokens": 3}
        for route, body in (
            ("/v1/completions", {"prompt": ["ab", "c"], "n": 2, "logprobs": 2, **extras}),
            ("/v1/completions", {"prompt": "ab", "max_tokens": 2, "store": True, "service_tier": "flex"}),
            ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **extras}),
            ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "temperature": 0}),
            ("/tokenize", {"prompt": "ab", "return_token_strs": True}),
            ("/tokenize", {"messages": MESSAGES}),
            ("/detokenize", {"tokens": [1, 2]}),
        ):
            described = DOCUMENT["paths"][route]["post"]
            _check(http.post(route, json=body), described)
            _check(http.post(route, json={**body, "nonsense": 1}), described)
        for route in ("/v1/models", "/v1/models/tiny", "/v1/models/none", "/", "/version", "/livez", "/readyz"):
            name = "/v1/models/{name}" if route.startswith("/v1/models/") else route
            _check(http.get(route), DOCUMENT["paths"][name]["get"])
        explained = DOCUMENT["paths"]["/v1/requests/{request_id}/explain"]["get"]
        known = http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2}).headers["x-request-id"]
        for name in (known, "cmpl-none"):
            _check(http.get(f"/v1/requests/{name}/explain"), explained)


def _check(response: httpx.Response, described: dict[str, Any]) -> None:
    schema = described["responses"][str(response.status_code)]["content"]["application/json"]["schema"]
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema_rs.validator_for(whole).validate(json.loads(response.text))
