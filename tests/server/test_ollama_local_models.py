"""Ollama's client, unchanged, against the routes for models on the server's machine; a stand-in for the hub."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from quire.engine.front import ModelFiles
from quire.server.doors.all import DOORS
from quire.server.http.app import Observability
from quire.weights.local_models import LocalModels
from tests.conftest import PATIENCE_S
from tests.server.conftest import MODEL, Running, start, wait_until
from tests.server.fake_engine import FakeEngine
from tests.weights.test_hub import Hub, hub

__all__ = ["hub"]
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def models(hub: Hub, tmp_path: Path) -> LocalModels:
    hub.moves = False
    return LocalModels(tmp_path / "cache", hub.endpoint)


@pytest.fixture
def running(models: LocalModels) -> Iterator[Running]:
    instance = start(FakeEngine(), apis=DOORS, local_models=models)
    yield instance
    instance.stop()


def connect(running: Running, **headers: str) -> ollama.Client:
    return ollama.Client(running.url, timeout=PATIENCE_S, headers=headers)


@pytest.mark.client("ollama", "pull", "pull(stream)", "delete")
def test_a_model_is_pulled_and_deleted(running: Running, models: LocalModels) -> None:
    client = connect(running)
    parts = list(client.pull("owner/model:v2", stream=True))
    assert (parts[0].status, parts[-1].status) == ("pulling manifest", "success")
    assert all(part.completed is None or part.completed <= (part.total or 0) for part in parts)
    (pulled,) = models.all()
    assert pulled.id == "owner/model"
    assert client.pull("owner/model:v2").status == "success"
    assert client.delete("owner/model:v2").status == "success" and models.all() == []
    for call in (lambda: client.delete("owner/model"), lambda: client.delete(f"{MODEL}x")):
        with pytest.raises(ollama.ResponseError, match="is not on this machine") as caught:
            call()
        assert caught.value.status_code == 404
    for name in ("owner/none", "a" * 6000):
        with pytest.raises(ollama.ResponseError, match=r"owner/none|at most 256 characters") as caught:
            client.pull(name)
        assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="owner/none"):
        list(client.pull("owner/none", stream=True))


def test_what_is_served_stays(models: LocalModels) -> None:
    directory = models.pull("owner/model").directory
    for names, where in ((["Owner/Model"], "/x"), (["mine", str(directory)], "/x"), (["pet"], str(directory))):
        engine = FakeEngine()
        engine.model_files = ModelFiles("safetensors", 1, 0.0, "", where)
        instance = start(engine, apis=DOORS, local_models=models, served_model_name=names)
        try:
            client = connect(instance)
            for name in (names[0], "owner/model", "owner/model:main"):
                with pytest.raises(ollama.ResponseError, match="of a running server stays") as caught:
                    client.delete(name)
                assert caught.value.status_code == 400
        finally:
            instance.stop()
    assert directory.exists()


@pytest.mark.client("ollama", "copy")
def test_a_copy_is_a_further_name(running: Running) -> None:
    client = connect(running)
    client.copy(MODEL, "mine:latest")
    assert [card.model for card in client.list().models] == [MODEL, "mine"]
    for name in ("mine", "mine:latest"):
        answer = client.chat(name, HELLO, options={"num_predict": 2})
        assert (answer.model, answer.message.content) == (name, "ab")
    client.copy("mine", "again")
    client.delete("mine")
    assert [card.model for card in client.list().models] == [MODEL, "again"]
    for refused, status in (
        (lambda: client.chat("mine", HELLO), 404),
        (lambda: client.copy("mine", "x"), 404),
        (lambda: client.copy(MODEL, ""), 400),
        (lambda: client.copy(MODEL, "x" * 129), 400),
        (lambda: client.copy("again", MODEL), 400),
    ):
        with pytest.raises(ollama.ResponseError) as caught:
            refused()
        assert caught.value.status_code == status
    for number in range(63):
        client.copy(MODEL, f"copy{number}")
    with pytest.raises(ollama.ResponseError, match="limited to 64") as caught:
        client.copy(MODEL, "more")
    assert caught.value.status_code == 429


def test_bodies_of_the_go_client_with_the_older_name(running: Running, models: LocalModels) -> None:
    """`api/types.go`: ShowRequest, PullRequest and DeleteRequest write `name`, and their empty fields, always."""
    empty: dict[str, dict[str, Any]] = {"show": {"system": "", "template": "", "verbose": False, "options": None},
             "pull": {"insecure": False, "username": "", "password": "", "stream": False}}  # fmt: skip
    with httpx.Client(base_url=running.url, timeout=PATIENCE_S) as http:
        for names in ({"name": MODEL}, {"model": MODEL, "name": MODEL}):
            assert http.post("/api/show", json={**names, **empty["show"]}).json()["modelfile"] == f"FROM {MODEL}\n"
            assert http.post("/api/pull", json={**names, **empty["pull"]}).json() == {"status": "success"}
        assert http.post("/api/show", json={"name": MODEL, "options": {}}).status_code == 200
        assert http.post("/api/pull", json={"name": "owner/model", **empty["pull"]}).status_code == 200
        assert http.request("DELETE", "/api/delete", json={"name": "owner/model"}).status_code == 200
        assert models.all() == []
        for path, body, text in (
            ("show", {"model": MODEL, "name": "x"}, "name and model are one field and differ"),
            ("show", {"model": MODEL, "template": "x"}, "template is not supported"),
            ("show", {"model": MODEL, "system": "x"}, "system is not supported"),
            ("show", {"model": MODEL, "options": {"seed": 1}}, "options is not supported"),
            ("pull", {"model": MODEL, "username": "x"}, "username is not supported"),
            ("pull", {"model": MODEL, "password": "x"}, "password is not supported"),
        ):
            refused = http.post(f"/api/{path}", json=body)
            assert refused.status_code == 400 and text in refused.json()["error"]


def test_they_are_for_the_operator_alone(models: LocalModels) -> None:
    options: dict[str, Any] = {"api_key": "k", "observability": Observability(admin_api_key="a")}
    instance = start(FakeEngine(), apis=DOORS, local_models=models, **options)
    try:
        for key, status in (("k", 403), ("a", None)):
            client = connect(instance, authorization=f"Bearer {key}")
            for call in (
                lambda client=client: client.pull("owner/model"),
                lambda client=client: client.copy(MODEL, "x"),
                lambda client=client: client.delete("owner/model"),
            ):
                if status is None:
                    call()
                else:
                    with pytest.raises(ollama.ResponseError) as caught:
                        call()
                    assert caught.value.status_code == status
    finally:
        instance.stop()


class Slow:
    """A pull that goes on until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()

    def pull(self, name: str, show: Any) -> None:
        self.begun.set()
        try:
            while True:
                show(1, 2)
        finally:
            self.ended.set()


def test_a_server_that_stops_ends_a_pull() -> None:
    slow = Slow()
    instance = start(FakeEngine(), apis=DOORS, local_models=slow, drain_s=PATIENCE_S)
    with httpx.stream("POST", f"{instance.url}/api/pull", json={"model": "a/b"}, timeout=PATIENCE_S) as response:
        lines = response.iter_lines()
        assert "pulling manifest" in next(lines)
        instance.server.drain()
        assert "stopping" in [*lines][-1]
    instance.stop()
    assert slow.ended.wait(PATIENCE_S)


def ask(instance: Running) -> int:
    with httpx.stream("POST", f"{instance.url}/api/pull", json={"model": "a/b"}, timeout=PATIENCE_S) as response:
        return response.status_code


def test_a_client_that_leaves_ends_its_pull_and_one_goes_at_a_time() -> None:
    slow = Slow()
    instance = start(FakeEngine(), apis=DOORS, local_models=slow)
    try:
        with httpx.stream("POST", f"{instance.url}/api/pull", json={"model": "a/b"}, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            assert "pulling manifest" in next(lines) and '"total":2' in next(lines)
            with pytest.raises(ollama.ResponseError, match="a/b is being pulled") as caught:
                connect(instance).pull("c/d")
            assert caught.value.status_code == 503
        assert slow.ended.wait(PATIENCE_S)
        assert wait_until(lambda: ask(instance) == 200), "the next can be pulled"
    finally:
        instance.stop()
