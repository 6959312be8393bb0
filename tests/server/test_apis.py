"""A second API stands beside OpenAI's: a folder of its own over the same HTTP side, with its own shapes and framing."""

import ast
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any

import httpx
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.server.doors.openai.routes import OPENAI
from quire.server.http.context import Api, ServerContext
from quire.server.http.errors import ApiError
from quire.server.http.schema import Field, Refused, RequestSchema
from quire.server.http.streams import Framing, deliver
from scripts.house.tree import ROOT
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine

KEY = {"authorization": "Bearer k"}


class Body(msgspec.Struct):
    text: Annotated[str, Field("what to go on from", limit="label_characters")]
    stream: Annotated[bool, Field("in lines")] = False
    tools: Annotated[Any, Refused("there are none")] = None


BODY = RequestSchema(Body)


def toy_error(error: ApiError) -> dict[str, Any]:
    return {"oops": error.message, "field": error.param}


LINES = Framing("application/x-ndjson", lambda content: content + b"\n", b'{"done":true}\n', toy_error)


class Toy:
    def __init__(self, context: ServerContext, body: Body) -> None:
        params = SamplingParams(max_tokens=3, output_kind=RequestOutputKind.DELTA)
        self._outputs = context.engine.generate(body.text, params)

    async def whole(self) -> bytes:
        return json.dumps({"said": "".join([piece["said"] async for piece in self.events()])}).encode()

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        async for output in self._outputs:
            if output.error is not None:
                raise ApiError(500, output.error)
            yield {"said": output.outputs[0].text}

    def headers(self) -> dict[str, str]:
        return {}


async def say(request: Request) -> Response:
    context: ServerContext = request.app.state.context
    body = await context.bodies.read(request, lambda raw: BODY.read(raw, context.limits))
    return await deliver(request, Toy(context, body), LINES if body.stream else None)


TOY = Api(
    prefix="/toy/",
    routes=(Route("/toy/say", say, methods=["POST"]),),
    queued_paths=frozenset({"/toy/say"}),
    error_body=toy_error,
    name="toy",
    describe=lambda limits: ({"/toy/say": {"post": {"operationId": "say"}}}, {"Toy": BODY.json_schema(limits)[0]}),
)


@pytest.fixture(scope="module")
def both() -> Iterator[Running]:
    instance = start(FakeEngine(), apis=[OPENAI, TOY], api_key="k")
    yield instance
    instance.stop()


@pytest.fixture
def http(both: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=both.url, headers=KEY) as session:
        yield session


def test_both_answer(http: httpx.Client) -> None:
    assert http.post("/toy/say", json={"text": "x"}).json() == {"said": "abc"}
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).json()["choices"][0]["text"] == "abc"


def test_a_stream_has_the_framing_of_its_api(http: httpx.Client) -> None:
    response = http.post("/toy/say", json={"text": "x", "stream": True})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines == [{"said": "a"}, {"said": "b"}, {"said": "c"}, {"done": True}]
    failed = http.post("/toy/say", json={"text": "fail", "stream": True}).text.splitlines()
    assert json.loads(failed[-1]) == {"oops": "the row broke", "field": None}, "and no end after it"


@pytest.mark.parametrize(
    ("body", "field"),
    [({"txt": "x"}, "txt"), ({"text": 5}, "text"), ({}, "text"), ({"text": "x", "tools": []}, "tools")],
)
def test_a_refusal_names_the_field_in_the_shape_of_its_api(http: httpx.Client, body: Any, field: str) -> None:
    response = http.post("/toy/say", json=body)
    assert (response.status_code, response.json()["field"]) == (400, field)
    assert set(response.json()) == {"oops", "field"} and field in response.json()["oops"]


def test_a_limit_holds_for_every_api(http: httpx.Client) -> None:
    response = http.post("/toy/say", json={"text": "x" * 513})
    assert response.status_code == 400 and "512" in response.json()["oops"]


@pytest.mark.parametrize(
    ("method", "path", "status", "is_toy"),
    [
        ("GET", "/toy/say", 405, True),
        ("GET", "/toy/none", 404, True),
        ("GET", "/v1/none", 404, False),
        ("GET", "/none", 404, False),
        ("POST", "/toy/say", 415, True),
        ("POST", "/v1/completions", 415, False),
    ],
)
def test_an_error_of_the_http_side_has_the_shape_of_its_path(
    http: httpx.Client, method: str, path: str, status: int, is_toy: bool
) -> None:
    response = http.request(method, path)
    assert (response.status_code, "oops" in response.json(), "error" in response.json()) == (status, is_toy, not is_toy)


def test_a_key_is_needed_and_a_full_queue_refuses_in_the_shape_of_the_path(both: Running, http: httpx.Client) -> None:
    assert "oops" in httpx.post(f"{both.url}/toy/say", json={"text": "x"}).json()
    assert http.get("/livez").status_code == 200  # the connection's first request: later ones are not read unparsed
    both.engine.is_full = True
    try:
        for path, name in (("/toy/say", "oops"), ("/v1/completions", "error")):
            for ask in (http.post, lambda url, **options: httpx.post(both.url + url, headers=KEY, **options)):
                response = ask(path, json={})
                assert (response.status_code, response.headers["retry-after"]) == (503, "3"), "before the body is read"
                assert name in response.json()
    finally:
        both.engine.is_full = False


def test_the_description_has_both(http: httpx.Client) -> None:
    found = http.get("/openapi.json").json()
    assert {"/toy/say", "/v1/completions", "/livez"} <= set(found["paths"])
    toy = found["components"]["schemas"]["Toy"]
    assert toy["required"] == ["text"] and toy["properties"]["text"]["maxLength"] == 512


def test_the_http_side_knows_no_api() -> None:
    for path in (ROOT / "src/quire/server/http").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in imported if name.startswith("quire.server.doors")], path.name


def test_requests_are_counted_by_api_and_status(both: Running, http: httpx.Client) -> None:
    def counts() -> dict[Any, float]:
        found = both.server.config.app.state.context.counts.metrics()  # type: ignore[union-attr]
        return {metric.labels: metric.value for metric in found}

    counted = counts()
    for path, body in (("/toy/say", {"text": "x"}), ("/toy/say", {}), ("/v1/completions", {"prompt": "x"})):
        http.post(path, json=body)
    http.get("/livez")
    http.get("/v1/responses/resp_1")  # there is no store
    # A request is counted when its last byte has left, which may be after the client has read it.
    assert wait_until(lambda: sum(counts().values()) == sum(counted.values()) + 5)
    grown = {labels: value - counted.get(labels, 0) for labels, value in counts().items()}
    assert {tuple(dict(labels).values()): value for labels, value in grown.items() if value} == {
        ("toy", "200"): 1,
        ("toy", "400"): 1,
        ("openai", "200"): 1,
        ("openai", "503"): 1,
        ("server", "200"): 1,
    }
