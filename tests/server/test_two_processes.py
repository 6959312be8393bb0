"""`quire serve` as it runs: an HTTP side and a core, each of which is killed, and the signals of a service manager."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.server.conftest import wait_until

BODY = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0, "logprobs": 2, "stream": True}
LONG = {"max_tokens": 480, "n": 64}
"""So many steps and sequences that what is done once it runs is done before its end."""


@dataclass
class Served:
    """A server in processes of its own."""

    process: "subprocess.Popen[str]"
    url: str

    @property
    def core_pid(self) -> int | None:
        """The child that computes."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = [int(word) for path in tasks for word in path.read_text().split()]
        return children[0] if children else None

    @property
    def num_running(self) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("quire:num_requests_running{"))

    def status(self, path: str) -> int:
        return httpx.get(self.url + path).status_code

    def stream(self, **changes: Any) -> Iterator[dict[str, Any]]:
        """Events, without their ids and times; `[DONE]` is an empty one."""
        with httpx.stream("POST", f"{self.url}/v1/completions", json={**BODY, **changes}) as response:
            if response.status_code != 200:
                yield {"status": response.status_code, **json.loads(response.read())}
                return
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    yield {name: event[name] for name in ("choices", "usage", "error") if name in event}
                elif line == "data: [DONE]":
                    yield {}

    def kill(self, how: int = signal.SIGKILL) -> None:
        self.process.send_signal(how)


@pytest.fixture
def serve(tiny_model: Path) -> Iterator[Any]:
    started: list[Served] = []

    def start(*flags: str, descriptors: int | None = None) -> Served:
        def prepare() -> None:
            if descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors // 2, descriptors))

        command = [sys.executable, "-m", "quire", "serve", str(tiny_model), "--port", "0", "--quiet", *flags]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=prepare)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "ready on " in line, line + process.stderr.read()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        started.append(Served(process, line.split("ready on ")[1].strip().removesuffix("/v1")))
        return started[-1]

    yield start
    for served in started:
        core = served.core_pid if served.process.poll() is None else None
        served.process.kill()
        served.process.wait(PATIENCE_S)
        assert core is None or wait_until(lambda pid=core: not _is_alive(pid))


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _collect(served: Served, into: list[Any], **changes: Any) -> threading.Thread:
    def read() -> None:
        with suppress(httpx.TransportError):  # where the server is killed
            into.extend(served.stream(**changes))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_a_killed_core_is_not_seen_on_open_streams(serve: Any) -> None:
    served = serve()
    whole = [list(served.stream(seed=seed)) for seed in range(4)]
    assert all(events[-1] == {} and len(_text(events)[1]) == 400 for events in whole)
    found: list[list[Any]] = [[] for _ in range(4)]
    threads = [_collect(served, found[seed], seed=seed) for seed in range(4)]
    assert wait_until(lambda: all(len(events) > 20 for events in found))
    core = served.core_pid
    os.kill(core, signal.SIGKILL)
    assert served.status("/livez") == 200
    for thread in threads:
        thread.join(PATIENCE_S)
    assert wait_until(lambda: served.status("/readyz") == 200)
    assert [_text(events) for events in found] == [_text(events) for events in whole]
    assert served.core_pid != core
    text = httpx.get(f"{served.url}/metrics").text
    assert re.search(r'quire:engine_core_restarts_total\{.*reason="died"\} 1\.0', text)
    assert re.search(r'quire:engine_core_state\{.*state="serving"\} 1\.0', text)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGUSR1])
def test_a_request_that_outlived_a_core_says_so(serve: Any, how: int) -> None:
    """Also when its sequences were tried one by one, after a death that no caller caused."""
    served = serve()
    body = {**BODY, **LONG, "stream": False}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{served.url}/v1/completions", json=body)
        assert wait_until(lambda: served.num_running == LONG["n"])  # else the one that ends last may still be queued
        os.kill(served.core_pid, how)
    answer = asked.result()
    assert answer.status_code == 200
    url = f"{served.url}/v1/requests/{answer.headers['x-request-id']}/explain"
    (item,) = httpx.get(url).json()["data"]
    assert item["num_restarts"] == 1 and "the engine's core was replaced once meanwhile" in item["sentence"]
    assert item["parts"]["recovering"] > 0 and sum(item["parts"].values()) == pytest.approx(item["total_s"], rel=0.01)


def _text(events: list[Any]) -> Any:
    """What is said, however it was cut into events."""
    choices = [event["choices"][0] for event in events if event.get("choices")]
    logprobs = [item for choice in choices for item in choice["logprobs"]["token_logprobs"]]
    return "".join(choice["text"] for choice in choices), logprobs, events[-1]


def test_sigterm_lets_running_requests_finish(serve: Any) -> None:
    served = serve("--shutdown-timeout", "600", "--hang-timeout", "600")
    found: list[Any] = []
    thread = _collect(served, found, **LONG)
    assert wait_until(lambda: len(found) > 5)
    os.kill(served.core_pid, signal.SIGSTOP)  # while two questions are asked
    served.kill(signal.SIGTERM)
    assert wait_until(lambda: served.status("/readyz") == 503)
    refused = next(served.stream())
    assert refused["status"] == 503
    os.kill(served.core_pid, signal.SIGCONT)
    thread.join(PATIENCE_S)
    assert found[-1] == {} and found[-2]["choices"][0]["finish_reason"] == "length"
    assert served.process.wait(PATIENCE_S) == 0


def test_sigterm_ends_the_rest_with_an_error(serve: Any) -> None:
    served = serve("--shutdown-timeout", "0.1")
    found: list[Any] = []
    thread = _collect(served, found, **LONG)
    assert wait_until(lambda: len(found) > 5)
    core = served.core_pid
    served.kill(signal.SIGTERM)
    assert served.process.wait(PATIENCE_S) == 0
    thread.join(PATIENCE_S)
    assert found[-1]["error"]["type"] == "server_error"
    assert wait_until(lambda: not _is_alive(core))


def test_killing_the_http_side_leaves_no_process(serve: Any) -> None:
    served = serve()
    found: list[Any] = []
    _collect(served, found)
    assert wait_until(lambda: len(found) > 5)
    core = served.core_pid
    assert core is not None and _is_alive(core)
    served.kill()
    served.process.wait(PATIENCE_S)
    assert wait_until(lambda: not _is_alive(core))


def test_signals_of_a_terminal_leave_the_core_to_the_http_side(serve: Any) -> None:
    served = serve()
    for how in (signal.SIGINT, signal.SIGTERM):
        os.kill(served.core_pid, how)
    time.sleep(0.2)
    assert served.status("/readyz") == 200 and list(served.stream(max_tokens=5))[-1] == {}


@pytest.mark.parametrize(("flags", "niceness"), [([], 5), (["--core-niceness", "0"], 0)])
def test_the_core_gives_way_to_the_http_side_with_every_thread(serve: Any, flags: list[str], niceness: int) -> None:
    served = serve(*flags)
    assert list(served.stream(max_tokens=4))[-1] == {}
    front = os.getpriority(os.PRIO_PROCESS, served.process.pid)
    threads = [int(path.name) for path in Path(f"/proc/{served.core_pid}/task").iterdir()]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {min(19, front + niceness)}


@contextmanager
def _killing_every_core(served: Served) -> Iterator[None]:
    """Meanwhile, each core as soon as it is there: none brings a request to its end."""
    is_over = threading.Event()

    def kill() -> None:
        while not is_over.wait(0.002):
            with suppress(ProcessLookupError, FileNotFoundError):
                if (core := served.core_pid) is not None:
                    os.kill(core, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        is_over.set()
        killer.join()


def test_newcomers_are_told_when_to_come_back_while_every_core_is_killed(serve: Any) -> None:
    """Those that are there wait, and lose nothing."""
    served, body = serve(), {**BODY, "stream": False, "seed": 3}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, f"{served.url}/v1/completions", json={**body, **LONG})
        assert wait_until(lambda: served.num_running > 0)
        with _killing_every_core(served):
            assert wait_until(lambda: 'state="paused"} 1.0' in httpx.get(f"{served.url}/metrics").text)
            found = httpx.post(f"{served.url}/v1/completions", json=body)
            assert found.status_code == 503 and 1 <= int(found.headers["Retry-After"]) <= 62
            assert served.status("/readyz") == 503 and served.status("/livez") == 200
        assert not waiting.done()
        answer = waiting.result()
    assert answer.status_code == 200
    assert (
        answer.json()["choices"] == httpx.post(f"{served.url}/v1/completions", json={**body, **LONG}).json()["choices"]
    )


def test_silent_connections_and_a_death_end_nothing(serve: Any) -> None:
    """More than there are descriptors: the soft limit is raised, and the silent ones make room."""
    served = serve(descriptors=400)
    limits = Path(f"/proc/{served.process.pid}/limits").read_text()
    assert re.search(r"Max open files +400 +400", limits)
    address = ("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection(address, PATIENCE_S))
        os.kill(served.core_pid, signal.SIGKILL)
        assert wait_until(lambda: served.status("/readyz") == 503 or served.core_pid is not None)
        assert wait_until(lambda: served.status("/readyz") == 200)
        assert list(served.stream(max_tokens=5))[-1] == {} and served.status("/livez") == 200


def test_one_process_when_asked(serve: Any) -> None:
    served = serve("--no-core-process")
    assert served.core_pid is None and list(served.stream(max_tokens=5))[-1] == {}


def test_numbers_of_many_digits_are_refused_unconverted(serve: Any) -> None:
    url = f"{serve('--no-core-process').url}/v1/completions"
    bodies = [f'{{"prompt": "a", "seed": {"7" * digits}}}' for digits in (640, 641)]
    answers = [httpx.post(url, content=body, headers={"Content-Type": "application/json"}) for body in bodies]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert [answer.json()["error"]["code"] for answer in answers][1] == "malformed_json"
    assert [answer.json()["error"]["param"] for answer in answers] == ["seed", None]


@pytest.mark.parametrize("after_s", [0.3, 0.8])
def test_ctrl_c_while_it_loads_is_one_line(after_s: float) -> None:
    """A terminal sends it to both processes, whatever they are at: importing, loading, saying that they are ready."""
    command = [sys.executable, "-m", "quire", "serve", "--port", "0"]
    # What runs in a shell's background ignores the signal, and so would all that it starts.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeds)
    assert process.stderr is not None
    assert wait_until(lambda: Served(process, "").core_pid is not None or process.poll() is not None)
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=PATIENCE_S)[1]
    assert "Traceback" not in text and not [line for line in text.splitlines() if line.startswith("  File")]
    assert not text or text.endswith("quire: interrupted\n") or "ready on" in text
    assert text.count("interrupted") <= 1
