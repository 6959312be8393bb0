"""What is wrong with a shape or a tool, through every door: refused under the door's own name of the field and with the
place or the limit; and the server answers on."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from quire.llm import AsyncLLM
from tests.server.conftest import MODEL, Running, start
from tests.server.tool_models import make_tool_model

HELLO: Any = [{"role": "user", "content": "hello"}]
UNHELD = {"type": "object", "properties": {"a": {"not": {}}}}
UNREAD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
LARGE = {"type": "object", "properties": {f"k{n}": {"description": "x" * 2**17} for n in range(16)}}
LONG = {"type": "string", "minLength": 40}
HELD: dict[str, tuple[Any, str]] = {
    "none": ([1], ""),
    "unheld": (UNHELD, ": the keyword 'not' at #/properties/a cannot be held"),
    "unread": (UNREAD, ": the keyword 'pattern' at #/properties/a cannot be held: regex parse error"),
    "large": (LARGE, " may have at most 262144 bytes, got 2"),
    "long": (LONG, " needs 43 tokens for its shortest answer with its end; 9 are allowed"),
}
"""A schema, and what is said of it behind the field's name."""
SHAPES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "chat": (
        "/v1/chat/completions",
        lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        {"messages": HELLO, "max_tokens": 9},
        "response_format.json_schema.schema",
    ),
    "streamed chat": (
        "/v1/chat/completions",
        lambda schema: {"guided_json": schema},
        {"messages": HELLO, "max_tokens": 9, "stream": True},
        "guided_json",
    ),
    "completions": (
        "/v1/completions",
        lambda schema: {"response_format": {"type": "json_object", "schema": schema}},
        {"prompt": "x", "max_tokens": 9},
        "response_format.schema",
    ),
    "vllm": (
        "/v1/completions",
        lambda schema: {"structured_outputs": {"json": schema}},
        {"prompt": "x", "max_tokens": 9},
        "structured_outputs.json",
    ),
    "responses": (
        "/v1/responses",
        lambda schema: {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}},
        {"input": "x", "max_output_tokens": 9},
        "text.format.schema",
    ),
    "anthropic": (
        "/v1/messages",
        lambda schema: {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        {"model": MODEL, "messages": HELLO, "max_tokens": 9},
        "output_config.format.schema",
    ),
    "ollama": (
        "/api/chat",
        lambda schema: {"format": schema},
        {"model": MODEL, "messages": HELLO, "options": {"num_predict": 9}, "stream": False},
        "format",
    ),
    "tgi": (
        "/generate",
        lambda schema: {"parameters": {"grammar": {"type": "json", "value": schema}, "max_new_tokens": 9}},
        {"inputs": "x"},
        "grammar.value",
    ),
}
"""Route, how it takes a schema, the rest of a body, and the field's name."""


def function(name: Any = "f", schema: Any = None) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {"type": "function", "function": {**named, "parameters": schema or {"type": "object"}}}


def flat(name: Any = "f", schema: Any = None) -> dict[str, Any]:
    return {"type": "function", **function(name, schema)["function"]}


def claude(name: Any = "f", schema: Any = None) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {**named, "input_schema": schema or {"type": "object"}}


TOOLS: dict[str, tuple[Any, Any, str]] = {
    "chat": (function, {"type": "function", "function": {"name": "g"}}, "tools[0].function.name"),
    "responses": (flat, {"type": "function", "name": "g"}, "tools[0].name"),
    "anthropic": (claude, {"type": "tool", "name": "g"}, "tools[0].name"),
    "ollama": (function, None, "tools[0].function.name"),
}
"""How a tool is sent, a choice of one that is absent, and the field of its name."""


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    running: Running = start(AsyncLLM(str(make_tool_model(tmp_path_factory.mktemp("bad") / "model")), max_num_seqs=4))
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client
    running.stop()
    running.engine.close()


def said(http: httpx.Client, route: str, body: dict[str, Any]) -> str:
    """Of a refusal; TGI's clients know 422 as one."""
    response = http.post(route, json=body)
    assert response.status_code == (422 if route == "/generate" else 400), response.text
    error = response.json()["error"]
    return str(error["message"] if isinstance(error, dict) else error)


@pytest.mark.parametrize("wrong", HELD)
@pytest.mark.parametrize("door", SHAPES)
def test_a_schema_is_refused_under_the_name_of_its_field(http: httpx.Client, door: str, wrong: str) -> None:
    route, asked, rest, field = SHAPES[door]
    schema, expected = HELD[wrong]
    message = said(http, route, {**rest, **asked(schema)})
    if wrong in ("none", "long"):  # where a door does not look inside, it names what holds the schema
        field = field.rpartition(".")[0] or field if not message.startswith(field) else field
    assert message.startswith(field + expected), message


@pytest.mark.parametrize("door", TOOLS)
def test_a_tool_is_refused_under_its_place(http: httpx.Client, door: str) -> None:
    (route, _, rest, _), (tool, absent, name) = SHAPES[door], TOOLS[door]
    assert said(http, route, {**rest, "tools": [tool(None)]}).startswith(f"{name} is required")
    schema = name.replace(".name", ".input_schema" if door == "anthropic" else ".parameters")
    unheld = said(http, route, {**rest, "tools": [tool(schema=UNHELD)]})
    assert unheld == f"{schema} cannot be held: the keyword 'not' at #/properties/a cannot be held"
    assert "tools is limited to 131,072 characters" in said(http, route, {**rest, "tools": [tool(schema=LARGE)]})
    if absent is not None:
        refused = said(http, route, {**rest, "tools": [tool()], "tool_choice": absent})
        assert refused.startswith("tool_choice") and "'g', which is no tool of this request (f)" in refused


@pytest.mark.parametrize("door", ["vllm", "chat", "responses"])
def test_other_kinds_are_refused_under_their_names(http: httpx.Client, door: str) -> None:
    route, _, rest, _ = SHAPES[door]
    for shape, expected in (
        ({"jsn": {}}, "unknown field of structured_outputs 'jsn'; did you mean 'json'?"),
        ({"json": {}, "regex": "a"}, "structured_outputs must hold exactly one of"),
        ({"regex": "("}, "structured_outputs.regex: at 1(8): invalid regex"),
        ({"grammar": "start: foo"}, "structured_outputs.grammar: is taken for Lark (no '::='): at 1(8): unknown name"),
        ({"grammar": "root ::= foo"}, "structured_outputs.grammar: is taken for GBNF ('::='), and is none: Rule 'foo'"),
    ):
        assert said(http, route, {**rest, "structured_outputs": shape}).startswith(expected)
    assert http.post(route, json=rest).status_code == 200


def test_names_of_the_past_are_named_as_sent(http: httpx.Client) -> None:
    route, _, rest, _ = SHAPES["completions"]
    for sent, expected in (
        ({"guided_regex": "("}, "guided_regex: at 1(8): invalid regex"),
        ({"guided_grammar": "start: foo"}, "guided_grammar: is taken for Lark"),
        ({"guided_json": {}, "guided_whitespace_pattern": "("}, "guided_whitespace_pattern: is no regular expression"),
    ):
        assert said(http, route, {**rest, **sent}).startswith(expected)
