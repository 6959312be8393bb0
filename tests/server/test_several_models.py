"""Several models in one server: every door's own client chooses by the model's name, and one's trouble is its own."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import huggingface_hub.constants
import ollama
import openai
import pytest
from huggingface_hub import InferenceClient
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.queue import ANYBODY
from quire.errors import OverloadedError
from quire.server.http.models import ServedModel, ServedModels
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine
from tests.server.test_responses_client import memory

HELLO: Any = [{"role": "user", "content": "hello"}]


def model(*names: str, says: str | None = None, **changes: Any) -> ServedModel:
    engine = None
    if says is not None:
        engine = FakeEngine()
        engine.says = says
    return ServedModel(names, frozenset(names), engine, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def table() -> ServedModels:
    return ServedModels([
        model("cat", says="miaow"),
        model("dog", "hound", says="wuff"),
        model("whale"),
        model("dodo", failure="the weights do not fit into memory"),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def zoo(table: ServedModels) -> Iterator[Running]:
    running = start(table, store=memory())
    yield running
    running.stop()


def status_of(running: Running, path: str) -> tuple[int, Any]:
    answer = httpx.get(running.url + path)
    return answer.status_code, answer.json()


def test_the_client_of_openai_chooses(zoo: Running) -> None:
    client = zoo.client()
    said = {}
    for name in ("cat", "dog", "hound"):
        answer = client.chat.completions.create(model=name, messages=HELLO)
        said[answer.model] = answer.choices[0].message.content
        assert client.completions.create(model=name, prompt="x").choices[0].text == said[name]
        assert client.responses.create(model=name, input="x").output_text == said[name]
        streamed = client.chat.completions.create(model=name, messages=HELLO, stream=True)
        assert "".join(event.choices[0].delta.content or "" for event in streamed) == said[name]
    assert said == {"cat": "miaow", "dog": "wuff", "hound": "wuff"}
    unnamed = httpx.post(f"{zoo.url}/v1/completions", json={"prompt": "x"}).json()
    assert (unnamed["model"], unnamed["choices"][0]["text"]) == ("cat", "miaow"), "the first stands for no name"


def test_what_is_left_out_is_the_chosen_models_own_default(zoo: Running, table: ServedModels) -> None:
    dog = [*table][1].engine
    assert isinstance(dog, FakeEngine)
    dog.stated_temperature = 0.25
    bodies: dict[str, Any] = {"/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": HELLO}}
    bodies |= {"/v1/responses": {"input": "x"}, "/v1/messages": {"messages": HELLO, "max_tokens": 9}}
    bodies |= {"/api/generate": {"prompt": "x", "stream": False}}
    try:
        for path, body in bodies.items():
            assert httpx.post(zoo.url + path, json={"model": "hound", **body}).status_code == 200, path
            assert dog.calls[-1]["params"].temperature == 0.25, path
    finally:
        dog.stated_temperature = 0.5


def test_models_are_listed_with_what_they_can(zoo: Running) -> None:
    cards = {card.id: card.to_dict() for card in zoo.client().models.list()}
    assert [*cards] == ["cat", "dog", "hound", "whale", "dodo"]
    assert {name: card["status"] for name, card in cards.items()} == {
        **dict.fromkeys(("cat", "dog", "hound"), "ready"), "whale": "loading", "dodo": "failed",
    }  # fmt: skip
    dog = zoo.client().models.retrieve("dog").to_dict()
    assert dog == cards["dog"] and dog["max_model_len"] == FakeEngine.max_model_len
    assert dog["tasks"] == ["generate"] and dog["capabilities"] == ["completion", "tools"]
    assert cards["whale"]["max_model_len"] is None and cards["whale"]["capabilities"] == []


def test_an_unknown_model_is_404_with_what_is_served(zoo: Running) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/responses/input_tokens", {"input": "x"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 3}),
        ("/v1/messages/count_tokens", {"messages": HELLO}),
        ("/api/chat", {"messages": HELLO}),
        ("/api/generate", {"prompt": "x"}),
        ("/api/show", {}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [65]}),
        ("/generate?model=cow", {"inputs": "x"}),
        ("/chat_tokenize", {"messages": HELLO}),
    ):
        answer = httpx.post(zoo.url + path, json=body if "?" in path else {"model": "cow", **body})
        assert answer.status_code == 404, path
        assert "'cow'" in answer.text and "cat, dog, hound, whale, dodo" in answer.text, path
    for path in ("/info?model=cow", "/health?model=cow", "/v1/models/cow"):
        assert status_of(zoo, path)[0] == 404


def test_one_that_is_loading_or_could_not_be_loaded_is_503_by_name(zoo: Running) -> None:
    for name, code, text in (("whale", "overloaded", "being loaded"), ("dodo", "model_failed", "could not be loaded")):
        with pytest.raises(openai.InternalServerError, match=text) as caught:
            zoo.client().completions.create(model=name, prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, code) and f"'{name}'" in caught.value.message
        assert ("retry-after" in caught.value.response.headers) == (name == "whale")
        assert "weights" not in caught.value.message, "what is wrong with it is the operator's to know"


def test_the_other_clients_choose(zoo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    claude = anthropic.Anthropic(base_url=zoo.url, api_key="none", max_retries=0)
    local = ollama.Client(zoo.url, timeout=PATIENCE_S)
    for name, said in (("cat", "miaow"), ("dog", "wuff")):
        message: Any = claude.messages.create(model=name, messages=HELLO, max_tokens=20)
        assert (message.model, message.content[0].text) == (name, said)
        assert local.generate(name, "x").response == said
        assert local.chat(f"{name}:latest", HELLO).message.content == said
        assert local.show(name).modelinfo["quire.context_length"] == FakeEngine.max_model_len  # type: ignore[index]
        hub = InferenceClient(f"{zoo.url}/?model={name}")
        assert hub.text_generation("x", max_new_tokens=20, return_full_text=False) == said
        answer: Any = InferenceClient(zoo.url).chat_completion(HELLO, extra_body={"model": name})
        assert (answer.model, answer.choices[0].message.content) == (name, said)
        assert status_of(zoo, f"/info?model={name}")[1]["model_id"] == name
    assert [item.model for item in local.list().models] == ["cat", "dog", "hound"], "those that are there"
    assert [item.model for item in local.ps().models] == ["cat", "dog", "hound"]
    assert [item.id for item in claude.models.list()] == ["cat", "dog", "hound"]
    assert claude.models.retrieve("hound").id == "hound"
    assert status_of(zoo, "/info")[1]["model_id"] == "cat"


def test_lines_of_a_batch_choose(zoo: Running) -> None:
    client = zoo.client()
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": "x"}}
        for name in ("dog", "cat", "cow", "dodo")
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", text), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    ended = client.batches.retrieve(batch.id)
    found = {}
    for name in (ended.output_file_id, ended.error_file_id):
        for line in map(json.loads, client.files.content(str(name)).text.splitlines()):
            found[line["custom_id"]] = line["response"]
    assert found["dog"]["body"]["choices"][0]["text"] == "wuff"
    assert found["cat"]["body"]["choices"][0]["text"] == "miaow"
    assert (found["cow"]["status_code"], found["dodo"]["status_code"]) == (404, 503)


def test_metrics_name_the_model(zoo: Running) -> None:
    zoo.client().completions.create(model="hound", prompt="x")
    text = httpx.get(f"{zoo.url}/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "all of one name stand together"
    samples = [item for family in families for item in family.samples]
    running = {item.labels["model_name"] for item in samples if item.name == "quire:num_requests_running"}
    assert running == {"cat", "dog"}
    asked = {item.labels["model_name"] for item in samples if item.name == "quire:http_requests_total"}
    assert asked >= {"", "dog"} and asked <= {"", "cat", "dog"}


def test_the_whole_is_not_ready_while_one_is_loaded(zoo: Running) -> None:
    states = {"cat": "ready", "dog": "ready", "whale": "loading", "dodo": "failed"}
    for path in ("/health", "/readyz"):
        assert status_of(zoo, path) == (503, {"status": "not ready", "models": states})
        for name, state in states.items():
            assert status_of(zoo, f"{path}?model={name}")[0] == (200 if state == "ready" else 503)
    assert status_of(zoo, "/livez") == (200, {"status": "alive", "models": states})
    assert [status_of(zoo, f"/livez?model={name}")[0] for name in states] == [200, 200, 200, 503]
    families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{zoo.url}/metrics").text)}
    found = families["quire:model_state"].samples
    assert {item.labels["model_name"]: item.labels["state"] for item in found if item.value} == states
    assert len(found) == 5 * len(states)


def test_those_that_serve_are_ready_whatever_befalls_the_others() -> None:
    table = ServedModels([model("cat", says="miaow"), model("dog", says="wuff"), model("dodo", failure="lost")])
    cat, dog = (one.engine for one in [*table][:2])
    assert isinstance(cat, FakeEngine) and isinstance(dog, FakeEngine)
    running = start(table)

    def probes() -> tuple[int, int, list[str]]:
        ready, states = status_of(running, "/readyz")
        return ready, status_of(running, "/livez")[0], [*states["models"].values()]

    try:
        assert probes() == (200, 200, ["ready", "ready", "failed"])
        cat.is_replaced = True
        assert probes() == (200, 200, ["starting", "ready", "failed"])
        dog.is_healthy = False
        assert probes() == (503, 200, ["starting", "dead", "failed"]), "the next core of the cat is on its way"
        cat.is_healthy = False
        assert probes() == (503, 503, ["dead", "dead", "failed"])
    finally:
        running.stop()


@pytest.mark.parametrize("other", [{}, {"failure": "lost"}, {"says": "wuff"}], ids=["loading", "failed", "dead"])
def test_what_cannot_be_asked_has_no_place_for_a_request(other: Any) -> None:
    table = ServedModels([model("cat", says="miaow"), model("other", **other)])
    cat, gone = (one.engine for one in table)
    if isinstance(gone, FakeEngine):
        gone.is_healthy = False
    assert isinstance(cat, FakeEngine)
    table.check_room(ANYBODY)
    cat.is_full = True
    with pytest.raises(OverloadedError, match="no room"):
        table.check_room(ANYBODY)


def test_what_befalls_one_is_not_the_others() -> None:
    table = ServedModels([model("cat", says="miaow"), model("dog", says="wuff")])
    cat, dog = (one.engine for one in table)
    assert isinstance(cat, FakeEngine) and isinstance(dog, FakeEngine)
    running = start(table, api_key={"a": 2, "b": 1})
    headers = {"authorization": "Bearer a"}

    def ask(name: str) -> httpx.Response:
        body = {"model": name, "prompt": "x"}
        return httpx.post(f"{running.url}/v1/completions", json=body, headers=headers)

    try:
        assert cat.weights == dog.weights and sorted(cat.weights.values()) == [1, 2]
        assert status_of(running, "/health") == (200, {"status": "ready"}), "no names without a key"
        assert status_of(running, "/health?model=cow")[1]["error"]["message"] == "this model is not served here"
        cat.is_full = True
        assert (ask("cat").status_code, ask("dog").status_code) == (503, 200)
        dog.is_full = True
        assert httpx.post(f"{running.url}/v1/completions", content=b"{", headers=headers).status_code == 503, "unread"
        dog.is_full = cat.is_healthy = False
        assert (ask("cat").status_code, ask("dog").status_code) == (503, 200)
        cat.is_full = False
        assert (ask("cat").status_code, ask("dog").status_code) == (500, 200)
        paths = ("/readyz", "/readyz?model=cat", "/readyz?model=dog", "/livez", "/livez?model=cat", "/livez?model=dog")
        assert [status_of(running, path)[0] for path in paths] == [200, 503, 200, 200, 503, 200]
        dog.is_healthy = False
        assert status_of(running, "/livez")[0] == 503, "nothing can be served any more"
    finally:
        running.stop()


def test_one_that_comes_later_answers_from_then_on() -> None:
    table = ServedModels([model("cat", says="miaow"), model("dog")])
    running = start(table)
    try:
        with pytest.raises(openai.InternalServerError, match="being loaded"):
            running.client().completions.create(model="dog", prompt="x")
        assert status_of(running, "/readyz")[0] == 503
        running.server.config.app.state.welcome([*table][1], FakeEngine())  # type: ignore[union-attr]
        assert running.client().completions.create(model="dog", prompt="x", max_tokens=3).choices[0].text == "abc"
        assert status_of(running, "/readyz")[0] == 200
    finally:
        running.stop()
