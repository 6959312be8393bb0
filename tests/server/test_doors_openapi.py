"""The description of the doors beside OpenAI's says what their parsers do, and what they answer."""

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.server.doors.all import DOORS
from quire.server.doors.anthropic.parse import parse_count, parse_messages
from quire.server.doors.ollama import bodies as ollama
from quire.server.doors.ollama.parse import parse_chat, parse_generate
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from quire.server.http.openapi import document
from tests.server.conftest import MODEL, start
from tests.server.fake_engine import FakeEngine
from tests.server.test_openapi import MESSAGES, VALUES

LIMITS, DEFAULTS = Limits(), SamplingParams()
DOCUMENT = document(DOORS, LIMITS, needs_key=False)
HELLO = {"model": MODEL, "messages": MESSAGES}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "MessageRequest": (lambda body: parse_messages(body, DEFAULTS, LIMITS), {**HELLO, "max_tokens": 4}),
    "TokenCountRequest": (lambda body: parse_count(body, DEFAULTS, LIMITS), HELLO),
    "OllamaChatRequest": (lambda body: parse_chat(body, DEFAULTS, LIMITS), HELLO),
    "OllamaGenerateRequest": (lambda body: parse_generate(body, DEFAULTS, LIMITS), {"model": MODEL, "prompt": "x"}),
    "OllamaShowRequest": (lambda body: ollama.SHOW.read(body, LIMITS), {"model": MODEL}),
    "OllamaPullRequest": (lambda body: ollama.PULL.read(body, LIMITS), {"model": MODEL}),
    "OllamaDeleteRequest": (lambda body: ollama.DELETE.read(body, LIMITS), {"model": MODEL}),
    "OllamaCopyRequest": (lambda body: ollama.COPY.read(body, LIMITS), {"source": MODEL, "destination": "x"}),
}
MORE: list[Any] = [
    *({"type": "auto"}, {"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2}),
    *({"type": "ephemeral"}, {"user_id": "u"}, {"effort": "low"}, {"format": {"type": "json_schema", "schema": {}}}),
    *("5m", "1h30m", "0", "0s", "soon", "json", "yaml", "max", "standard", "auto", {"num_ctx": 8}, {"num_predict": -1}),
    *({"mirostat": 0}, {"mirostat": 1}, {"seed": -1}, {"stop": "x"}, {"top_p": 2}, {"nonsense": 1}, {"edits": []}),
    *([{"name": "f", "input_schema": {}}], [{"function": {"name": "f"}}], [{"type": "text", "text": "x"}]),
]
TOGETHER: dict[str, Any] = {
    # What a schema of single fields cannot say: field -> values that another field bears not, or none.
    "keep_alive": lambda value: str(value).strip("-0.s") == "",
    "thinking": lambda value: True,
    "messages": lambda value: True,
    "format": lambda value: isinstance(value, dict),
    "output_config": lambda value: True,
    "name": lambda value: isinstance(value, str),
}


@pytest.mark.parametrize("name", BODIES)
def test_schema_and_parser_agree_on_every_field(name: str) -> None:
    validator = jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    )
    parse, base = BODIES[name]
    disagreements, num_accepted = [], 0
    for field in [*DOCUMENT["components"]["schemas"][name]["properties"], "unknown"]:
        for value in [*VALUES, *MORE]:
            body = {**base, field: value}
            try:
                parse(body)
                does = True
            except (InvalidRequestError, ApiError):
                does = False
            says = validator.is_valid(body)
            num_accepted += does
            if says != does and not (says and TOGETHER.get(field, lambda value: False)(value)):
                disagreements.append((field, str(value)[:40], f"schema {says}, parser {does}"))
    assert not disagreements, disagreements
    assert num_accepted > 5


def test_no_two_apis_give_one_name_to_two_schemas() -> None:
    found: dict[str, Any] = {}
    for door in DOORS:
        for name, schema in door.describe(LIMITS)[1].items():
            assert found.setdefault(name, schema) == schema, name
        assert all(not path.startswith("/") or path not in found for path in door.describe(LIMITS)[0])


def test_answers_are_as_described() -> None:
    running = start(FakeEngine(), apis=DOORS)
    try:
        with httpx.Client(base_url=running.url) as http:
            for route, (name, schema) in {
                "/v1/messages": ("MessageRequest", BODIES["MessageRequest"][1]),
                "/v1/messages/count_tokens": ("TokenCountRequest", HELLO),
                "/api/chat": ("OllamaChatRequest", {**HELLO, "stream": False}),
                "/api/generate": ("OllamaGenerateRequest", {"model": MODEL, "prompt": "x", "stream": False}),
                "/api/show": ("OllamaShowRequest", {"model": MODEL}),
                "/api/pull": ("OllamaPullRequest", {"model": MODEL, "stream": False}),
            }.items():
                described = DOCUMENT["paths"][route]["post"]
                body = described["requestBody"]["content"]["application/json"]["schema"]
                assert body == {"$ref": f"#/components/schemas/{name}"}
                for asked, status in (
                    (schema, 200),
                    ({**schema, "nonsense": 1}, 400),
                    ({**schema, "model": "no"}, 400 if route == "/api/pull" else 404),
                ):
                    response = http.post(route, json=asked)
                    assert response.status_code == status, response.text
                    _check(response, described)
            for route in ("/api/tags", "/api/ps", "/api/version"):
                _check(http.get(route), DOCUMENT["paths"][route]["get"])
    finally:
        running.stop()


def _check(response: httpx.Response, described: dict[str, Any]) -> None:
    schema = described["responses"][str(response.status_code)]["content"]["application/json"]["schema"]
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema_rs.validator_for(whole).validate(json.loads(response.text))
