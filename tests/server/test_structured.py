"""Answers held to a shape, as the official client and vLLM's users ask for them, over a real engine."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from quire.llm import LLM, AsyncLLM
from quire.sampling_params import SamplingParams
from quire.server.doors.openai.shapes import take_shape
from quire.structured.checker import ShapeChecker
from quire.structured_params import StructuredOutputsParams
from tests.server.conftest import MODEL, PATIENCE_S, start, wait_until

HELLO: Any = [{"role": "user", "content": "hello"}]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    mood: Literal["good", "bad"]
    ages: list[int] = pydantic.Field(max_length=3)


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Any:
    engine = AsyncLLM(str(tiny_model), max_model_len=512, max_num_seqs=8)
    running = start(engine)
    yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    running.stop()


@pytest.mark.client("openai", "chat.completions.parse(response_format)", "chat.completions.stream(response_format)")
def test_pydantic_models_are_parsed_whole_and_streamed(client: openai.OpenAI) -> None:
    for seed in range(4):
        asked: Any = dict(
            model=MODEL, messages=HELLO, response_format=Person, temperature=1.5, seed=seed, max_tokens=120
        )
        whole = client.chat.completions.parse(**asked).choices[0]
        assert whole.finish_reason == "stop" and isinstance(whole.message.parsed, Person)
        with client.chat.completions.stream(**asked) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.parsed == whole.message.parsed


def test_every_name_of_a_shape_holds(client: openai.OpenAI, tiny_model: Path) -> None:
    """The same answer as the library's for the same shape."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"response_format": named}, {"json": schema}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_object", "schema": schema}}, {"json": schema}),
        ({"response_format": {"type": "json_object", "value": schema}}, {"json": schema}),
        ({"structured_outputs": {"json": json.dumps(schema)}}, {"json": schema}),
        ({"structured_outputs": {"yaml": schema}}, {"yaml": schema}),
        ({"guided_json": schema}, {"json": schema}),
        ({"guided_json": schema, "guided_whitespace_pattern": "  ?"}, {"json": schema, "whitespace_pattern": "  ?"}),
        ({"guided_regex": "[ab]{5}", "guided_decoding_backend": "xgrammar"}, {"regex": "[ab]{5}"}),
        ({"guided_choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
        ({"guided_grammar": 'root ::= "x" | "yy"'}, {"grammar": 'root ::= "x" | "yy"'}),
    ]
    with LLM(str(tiny_model), max_model_len=512) as llm:
        for body, shape in asked:
            params = SamplingParams(max_tokens=60, seed=1, temperature=1.0, structured_outputs=shape)  # type: ignore[arg-type]
            (expected,) = llm.generate("hello", params, use_tqdm=False)
            given = client.completions.create(
                model=MODEL, prompt="hello", max_tokens=60, seed=1, temperature=1.0, extra_body=body
            )
            assert given.choices[0].text == expected.outputs[0].text and given.choices[0].finish_reason == "stop", body


def as_format(**values: Any) -> dict[str, Any]:
    return {"response_format": values}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        (as_format(type="xml"), "response_format", "text, json_object or json_schema"),
        (as_format(type="json_object", json_schema={}), "response_format", "json_object has no field 'json_schema'"),
        (as_format(type="json_object", schema=7), "response_format", "response_format.schema"),
        (as_format(type="json_object", value=7), "response_format", "response_format.value"),
        (as_format(type="json_object", value={}, schema={}), "response_format", "send one"),
        (as_format(type=["text"]), "response_format", "text, json_object or json_schema"),
        (as_format(type="json_schema", json_schema={"schema": {}, "strict": 1}), "response_format", "true or false"),
        (as_format(type="json_schema", json_schema={"schema": {}, "name": 3}), "response_format", "64 characters"),
        (as_format(type="json_schema"), "response_format", ".json_schema must be an object with a schema"),
        (as_format(type="json_schema", json_schema={"schema": {}, "shema": 1}), "response_format", "'shema'"),
        (as_format(type="json_schema", json_schema={"schema": 3}), "response_format", ".json_schema.schema"),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs", "'uniqueItems' at #"),
        ({"structured_outputs": {"yaml": {"uniqueItems": True}}}, "structured_outputs", "'uniqueItems' at #"),
        ({"structured_outputs": {"yaml": {}, "json": {}}}, "structured_outputs", "two: json and yaml"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs", "did you mean 'regex'"),
        ({"guided_choice": []}, "guided_choice", "guided_choice must be a list"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "send one"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "needs guided_json"),
        ({"guided_json": {"type": "string", "minLength": 40}}, "guided_json", "43 tokens"),
        ({"guided_json": {}, "ignore_eos": True}, "ignore_eos", "nothing may follow"),
        ({"guided_regex": "ab", "allowed_token_ids": [5]}, None, "no token is left"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_that_names_it(
    client: openai.OpenAI, body: dict[str, Any], param: str | None, text: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, stream=stream, extra_body=body)
    assert text in caught.value.message and caught.value.param == param
    assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices


def test_forced_text_does_not_pass_a_mask(client: openai.OpenAI) -> None:
    """A word that the grammar forces and the request excludes leaves no token, one by one or at once."""
    for extra in ({}, {"logprobs": True}):
        asked: Any = dict(model=MODEL, messages=HELLO, max_tokens=40, **extra)
        shape = {"structured_outputs": {"regex": "[xy]abcdefgh"}, "bad_words": ["d"]}
        with pytest.raises(openai.BadRequestError, match="no token is left"):
            client.chat.completions.create(**asked, extra_body=shape)


@pytest.mark.parametrize("stream", [False, True])
def test_names_of_the_past_are_noted_in_a_header_and_once_in_the_log(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """A `Deprecation` as RFC 9745 has it, beside a link that httpx reads."""
    running = start(AsyncLLM(str(tiny_model), max_model_len=512, max_num_seqs=2))
    old = {"guided_regex": "a", "guided_decoding_backend": "xgrammar", "guided_json": None}
    try:
        for path, body in (
            ("chat/completions", {"messages": HELLO, **old}),
            ("completions", {"prompt": "x", **old}),
            ("completions", {"prompt": "x", "structured_outputs": {"regex": "a"}, "guided_regex": None}),
        ):
            answer = httpx.post(f"{running.url}/v1/{path}", json={"stream": stream, "max_tokens": 5, **body})
            assert answer.status_code == 200
            if "structured_outputs" in body:
                assert not {"deprecation", "link"} & answer.headers.keys()
                continue
            assert re.fullmatch("@[0-9]+", answer.headers["deprecation"])
            assert int(answer.headers["deprecation"][1:]) % 86400 == 0
            link = answer.links["deprecation"]
            assert "guided_regex is deprecated: use structured_outputs.regex" in link["title"]
            assert "guided_decoding_backend" in link["title"] and "guided_json" not in link["title"]
            described = httpx.get(f"{running.url}{link['url']}").json()["components"]["schemas"]
            marked = {
                name
                for schema in described.values()
                for name, one in schema.get("properties", {}).items()
                if one.get("deprecated")
            }
            assert marked == {
                *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
                *("guided_whitespace_pattern", "guided_decoding_backend"),
            }
    finally:
        running.stop()
    noted = [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]
    assert len(noted) == 1 and "guided_regex" in noted[0]


def test_without_keys_shapes_of_one_network_do_not_keep_those_of_others(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends many that take long makes others wait for one or two of them, not for all."""
    checked, gate, source = list[str | None](), threading.Event(), ShapeChecker.source

    def held(self: ShapeChecker, params: StructuredOutputsParams) -> str:
        if not self.knows(params):
            checked.append(params.regex)
            gate.wait(PATIENCE_S)
        return source(self, params)

    monkeypatch.setattr(ShapeChecker, "source", held)
    engine = AsyncLLM(str(tiny_model), max_model_len=512, max_num_seqs=8)
    running = start(engine)

    def ask(regex: str, address: str) -> int:
        with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=PATIENCE_S) as client:
            body = {"prompt": "x", "max_tokens": 5, "structured_outputs": {"regex": regex}}
            return client.post(f"{running.url}/v1/completions", json=body).status_code

    def num_waiting() -> int:
        work = engine._shape_work
        return 0 if work is None or not checked else sum(map(len, work._short._waiting.values()))

    try:
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(ask, f"a{number}", "127.0.0.1") for number in range(5)]
            assert wait_until(lambda: num_waiting() == 4)
            answers.append(pool.submit(ask, "b", "127.0.0.2"))
            assert wait_until(lambda: num_waiting() == 5)
            gate.set()
            assert {one.result() for one in answers} == {200}
    finally:
        gate.set()
        running.stop()
    assert len(checked) == 6 and checked.index("b") <= 2


def test_a_text_format_asks_for_nothing() -> None:
    for body in ({}, {"response_format": {"type": "text"}}, {"guided_decoding_backend": "auto"}):
        values: dict[str, Any] = {**body, "temperature": 1.0}
        take_shape(values)
        assert values == {"temperature": 1.0}
