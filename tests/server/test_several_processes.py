"""`quire serve` with two models and one that cannot be loaded: each as it would be alone, and its death its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire.llm import AsyncLLM
from tests.conftest import PATIENCE_S
from tests.server.conftest import start, wait_until
from tests.tiny.checkpoints import make_tiny

NAMES = {"small": "llama", "large": "qwen3"}
"""And the family of each."""
ASKED: dict[str, Any] = {"prompt": "Hello", "max_tokens": 60, "logprobs": 3, "temperature": 1.0, "seed": 5}


@dataclass
class Server:
    """One under test."""

    process: "subprocess.Popen[str]"
    url: str = ""
    said: list[str] = field(default_factory=list)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def cores(self) -> list[int]:
        """Processes of the models that are there, in the order in which they began."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(word) for path in tasks for word in path.read_text().split())

    def read_until(self, text: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if text in line:
                return
        raise AssertionError("".join(self.said))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("several")
    found = {name: make_tiny(kind, root / name, dtype="bfloat16", tokenizer=True) for name, kind in NAMES.items()}
    broken = make_tiny("llama", root / "broken", dtype="bfloat16", tokenizer=True)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    return {**found, "broken": broken}


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = tmp_path_factory.mktemp("config") / "quire.yaml"
    entries = "".join(f"  - model: {path}\n    max_num_seqs: 8\n" for path in models.values())
    config.write_text(f"models:\n{entries}port: 0\nquiet: true\nenable_log_requests: true\n")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "quire", "serve", "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": path}
    served = Server(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    served.read_until("ready on ")
    served.url = served.said[-1].split("ready on ")[1].strip().removesuffix("/v1")
    assert served.process.stderr is not None
    threading.Thread(target=lambda: served.said.extend(served.process.stderr or ()), daemon=True).start()
    yield served
    served.process.kill()
    served.process.wait(PATIENCE_S)


def choices(client: openai.OpenAI, model: str, **changes: Any) -> list[Any]:
    return [item.to_dict() for item in client.completions.create(model=model, **{**ASKED, **changes}).choices]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_a_server_of_one_model(server: Server, models: dict[str, Path], name: str) -> None:
    alone = start(AsyncLLM(str(models[name]), max_num_seqs=8), served_model_name=name)
    try:
        expected = choices(alone.client(), name, n=3)
        assert choices(server.client(), name, n=3) == expected
        assert all(len(item["logprobs"]["tokens"]) == len(item["logprobs"]["token_logprobs"]) > 0 for item in expected)
    finally:
        alone.stop()
        alone.engine.close()


def test_one_that_cannot_be_loaded_is_said_by_name_and_the_others_serve(server: Server) -> None:
    assert any("model 'broken' could not be loaded: " in line and "model.safetensors" in line for line in server.said)
    assert any("loading small, large, broken" in line for line in server.said)
    cards = {card.id: card.to_dict() for card in server.client().models.list()}
    assert {name: card["status"] for name, card in cards.items()} == {
        "small": "ready", "large": "ready", "broken": "failed",
    }  # fmt: skip
    assert httpx.get(f"{server.url}/readyz").status_code == 200, "those that are there serve"
    assert httpx.get(f"{server.url}/readyz?model=broken").status_code == 503
    assert httpx.get(f"{server.url}/readyz?model=large").status_code == 200


def test_a_killed_core_is_one_models_own_and_no_stream_sees_it(server: Server) -> None:
    long = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    whole = {name: choices(server.client(), name, **long) for name in NAMES}
    texts: dict[str, list[Any]] = {name: [] for name in NAMES}

    def read(name: str) -> None:
        for event in server.client().completions.create(model=name, stream=True, **{**ASKED, **long}):
            texts[name].extend(choice.to_dict() for choice in event.choices)

    threads = [threading.Thread(target=read, args=(name,), daemon=True) for name in NAMES]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: all(len(found) > 10 for found in texts.values()))
    small, large = server.cores
    os.kill(small, signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert wait_until(lambda: httpx.get(f"{server.url}/readyz?model=small").status_code == 200)
    for name, found in texts.items():
        assert "".join(item["text"] for item in found) == whole[name][0]["text"], name
        logprobs = [value for item in found if item["logprobs"] for value in item["logprobs"]["token_logprobs"]]
        assert logprobs == whole[name][0]["logprobs"]["token_logprobs"], name
    assert large in server.cores and small not in server.cores
    text = httpx.get(f"{server.url}/metrics").text
    died = dict(
        re.findall(r'quire:engine_core_restarts_total{engine="0",model_name="(\w+)",reason="died"} (\S+)', text)
    )
    assert died == {"small": "1.0", "large": "0.0"}, text
    assert wait_until(lambda: any("model 'small': the engine's core exited (signal 9)" in line for line in server.said))
    assert any(" model=large " in line for line in server.said), "the log of requests names it"


def test_explain_and_the_live_view_know_the_model(server: Server) -> None:
    answer = server.client().completions.create(model="large", **ASKED)
    found = httpx.get(f"{server.url}/v1/requests/{answer.id}/explain").json()["data"]
    assert [item["model"] for item in found] == ["large"]
    for query, name in (("", "small"), ("?model=large", "large"), ("?model=small", "small")):
        frame = httpx.get(f"{server.url}/ui/frame{query}").json()
        names = {item["name"].partition(" ")[0] for item in (*frame["requests"], *frame["ended"])}
        assert frame["model"] == name and any(answer.id in item for item in names) == (name == "large")
    assert httpx.get(f"{server.url}/ui/frame?model=broken").status_code == 503
    assert httpx.get(f"{server.url}/ui/frame?model=cow").status_code == 404
