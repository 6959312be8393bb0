"""A server on a free loopback port, in a thread, for the whole session."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

from quire.llm import AsyncLLM
from quire.server.doors.all import DOORS
from quire.server.http.app import create_app
from quire.server.http.listen import bind
from quire.server.http.models import ServedModels
from quire.server.http.serve import GracefulServer
from tests.conftest import PATIENCE_S
from tests.server.client_calls import watched
from tests.server.fake_engine import FakeEngine
from tests.tiny.checkpoints import make_tiny

MODEL = "tiny"
for _name in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, _name, PATIENCE_S)  # of every HTTP client that names no timeout


@dataclass
class Running:
    """One server under test."""

    url: str
    engine: Any
    server: GracefulServer
    thread: threading.Thread

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def stop(self) -> None:
        self.server.drain()
        self.thread.join(PATIENCE_S)
        if self.thread.is_alive():
            raise TimeoutError("the server did not stop")


def start(engine: Any, *, drain_s: float = 5.0, header_s: float = 30.0, **options: Any) -> Running:
    options = {"apis": DOORS, **options}
    names = {} if isinstance(engine, ServedModels) else {"served_model_name": MODEL, "model_names": ["directory-name"]}
    app = create_app(engine, **{**names, **options})
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = GracefulServer(app, drain_s=drain_s, header_s=header_s, on_ready=ready.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    if not ready.wait(PATIENCE_S):
        raise TimeoutError("the server did not start")
    return Running(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, server, thread)


def wait_until(condition: Any) -> bool:
    """True as soon as `condition()` holds."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


@pytest.fixture(autouse=True)
def calls_of_clients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold what a test says that it asks of a client against what it asks."""
    if not any(request.node.iter_markers(name) for name in ("client", "client_refused")):
        yield
        return
    with watched(request.node):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test that says what works with a client may not be skipped."""
    report = yield
    marks = (item.get_closest_marker(name) for name in ("client", "client_refused"))
    if report.skipped and any(mark is not None for mark in marks):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} says what works with a client, and was skipped"
    return report


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    instance = start(FakeEngine())
    yield instance
    instance.stop()


@pytest.fixture(scope="session")
def client(running: Running) -> openai.OpenAI:
    return running.client()


@pytest.fixture(scope="session")
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url) as session:
        yield session


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over the real engine with a tiny random model of 512 positions."""
    directory = make_tiny("llama", tmp_path_factory.mktemp("tiny"), tokenizer=True)
    instance = start(AsyncLLM(str(directory), max_num_seqs=16))
    yield instance
    instance.stop()
    instance.engine.close()
