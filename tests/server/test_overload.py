"""Overload over HTTP: refusals with a time to come back, fair shares, deadlines, readers that stall."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from quire import AsyncLLM, SamplingParams
from quire.engine.inputs import ParsedRequest
from quire.engine.queue import ANYBODY, Caller
from quire.engine.stream import MAX_UNREAD, Stream
from quire.errors import ConfigurationError, OverloadedError, RequestFailedError, TooManyRequestsError
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import RequestOutputKind
from quire.server.http.app import Observability
from quire.server.http.keys import caller_name, read_keys
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine
from tests.tiny.checkpoints import make_tiny

LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 60, "ignore_eos": True}
SHORT: dict[str, Any] = {"prompt": "hello", "max_tokens": 2, "ignore_eos": True}


@contextmanager
def held(server: Running, num_steps: int = 0) -> Iterator[threading.Event]:
    """The engine computes `num_steps` more, and nothing after that until the event is set: at the latest at the end."""
    channel, go, left = server.engine._engine.channel, threading.Event(), [num_steps]
    collect = channel.collect

    def wait() -> Any:
        left[0] -= 1
        if left[0] < 0:
            go.wait(PATIENCE_S)
        return collect()

    channel.collect = wait
    try:
        yield go
    finally:
        go.set()
        channel.collect = collect


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("tiny"), tokenizer=True))


@pytest.fixture(scope="module")
def small(directory: str) -> Iterator[Running]:
    """One row, two places in the queue, two keys."""
    engine = AsyncLLM(directory, max_num_seqs=1, max_num_queued_reqs=4, max_num_queued_tokens=600)
    instance = start(engine, api_key={"flood": 1, "guest": 1})
    yield instance
    instance.stop()
    engine.close()


@pytest.fixture(scope="module")
def open_small(directory: str) -> Iterator[Running]:
    engine = AsyncLLM(directory, max_num_seqs=1, max_num_queued_reqs=2)
    instance = start(engine)
    yield instance
    instance.stop()
    engine.close()


def post(server: Running, body: dict[str, Any], key: str = "flood") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)


def idle(server: Running) -> bool:
    queue = server.engine._engine.queue
    return wait_until(lambda: not server.engine.has_work and queue.num_waiting == 0 and queue._free_rows == 1)


def test_past_the_bound_503_with_a_time_to_come_back(open_small: Running) -> None:
    with ThreadPoolExecutor(24) as pool, held(open_small) as go:
        asked = [pool.submit(post, open_small, LONG) for _ in range(24)]
        assert wait_until(lambda: sum(item.done() for item in asked) == 21), "one row and two places"
        refused = [item.result() for item in asked if item.done()]
        go.set()
        assert [item.result().status_code for item in asked].count(200) == 3
    for answer in refused:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 600
    assert idle(open_small)
    assert post(open_small, SHORT).status_code == 200, "afterwards all is well"


def test_a_flood_of_one_key_leaves_the_other_its_share(small: Running) -> None:
    with ThreadPoolExecutor(16) as pool, held(small) as go:
        flood = [pool.submit(post, small, LONG) for _ in range(12)]
        assert wait_until(lambda: sum(item.done() for item in flood) == 8), "half of five places, and the open half"
        guest = pool.submit(post, small, SHORT, "guest")
        assert wait_until(lambda: small.engine._engine.queue.num_waiting == 5)
        assert post(small, SHORT, "guest").status_code == 429, "its share is one place"
        go.set()
        answers = [item.result() for item in flood]
    assert guest.result().status_code == 200
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 8 and {answer.status_code for answer in refused} == {429}
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert idle(small)


def test_what_can_never_wait_is_refused_with_the_numbers(small: Running) -> None:
    answer = post(small, {**SHORT, "n": 6})
    assert answer.status_code == 400 and "6 sequences at once" in answer.json()["error"]["message"]
    answer = post(small, {**SHORT, "prompt": [5] * 301, "n": 2})
    assert answer.status_code == 400 and "2 x 301 prompt tokens" in answer.json()["error"]["message"]
    assert idle(small)


def test_a_deadline_holds_while_it_runs_and_in_the_queue(open_small: Running) -> None:
    with held(open_small, num_steps=3):
        answer = post(open_small, {**LONG, "timeout": 0.05})
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "deadline_exceeded"
    assert idle(open_small)
    with ThreadPoolExecutor(2) as pool, held(open_small) as go:
        runs = [pool.submit(post, open_small, LONG) for _ in range(2)]
        assert wait_until(lambda: open_small.engine._engine.queue.num_waiting == 2)
        assert post(open_small, {**SHORT, "timeout": 0.02}).status_code == 408
        go.set()
        assert [item.result().status_code for item in runs] == [200, 200]
    assert idle(open_small)


def test_a_deadline_in_a_stream_is_an_error_event(open_small: Running) -> None:
    """However long the first token takes on a busy machine, it comes before the deadline in one of the tries."""
    timeout_s, status = 0.1, 0
    while status != 200:
        with held(open_small, num_steps=3):
            answer = post(open_small, {**LONG, "timeout": timeout_s, "stream": True})
        status, timeout_s = answer.status_code, 2 * timeout_s
        assert status in (200, 408) and timeout_s < PATIENCE_S
        assert idle(open_small)
    assert '"deadline_exceeded"' in answer.text and "[DONE]" not in answer.text


@pytest.mark.parametrize("value", [0, -1, "5", True, 1e9])
def test_a_timeout_that_is_none_is_refused(open_small: Running, value: Any) -> None:
    answer = post(open_small, {**SHORT, "timeout": value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "timeout"


def test_a_late_reader_gets_all_of_it_in_few_outputs(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that does not read: what came lies in the stream as a bounded number of outputs, and is whole."""
    streams: list[Stream] = []

    class Seen(Stream):
        def __init__(self, parsed: ParsedRequest) -> None:
            super().__init__(parsed)
            streams.append(self)

    monkeypatch.setattr("quire.engine.async_engine.Stream", Seen)

    async def read(late: bool) -> tuple[list[int], str, int]:
        engine = AsyncLLM(directory, max_num_seqs=2)
        params = SamplingParams(
            n=2, max_tokens=300, ignore_eos=True, logprobs=2, output_kind=RequestOutputKind.DELTA, seed=1
        )
        outputs = engine.generate("hello", params)
        found = [await anext(outputs)]
        while late and engine.has_work:
            await asyncio.sleep(0.01)
            assert len(streams[-1]._unread) <= MAX_UNREAD
        found += [output async for output in outputs]
        await engine.shutdown()
        second = [item for output in found for item in output.outputs if item.index == 1]
        assert sum(len(item.logprobs or ()) for item in second) == 300 and found[-1].finished
        return [token for item in second for token in item.token_ids], "".join(item.text for item in second), len(found)

    tokens, text, _ = asyncio.run(read(late=False))
    late_tokens, late_text, num_outputs = asyncio.run(read(late=True))
    assert (late_tokens, late_text) == (tokens, text) and num_outputs <= MAX_UNREAD + 2


def test_a_failure_comes_after_what_was_made() -> None:
    async def fail() -> None:
        request: Any = SimpleNamespace(params=SamplingParams(output_kind=RequestOutputKind.DELTA))
        stream = Stream(request)
        for token in range(3):
            stream.put(RequestOutput("r", None, [1], [CompletionOutput(0, "", [token])], finished=False))
        stream.put(RequestFailedError("broken"))
        assert [(await stream.get(None)).outputs[0].token_ids for _ in range(3)] == [[0], [1], [2]]
        for _ in range(2):
            with pytest.raises(RequestFailedError, match="broken"):
                await stream.get(None)

    asyncio.run(fail())


def test_no_thread_is_left(open_small: Running) -> None:
    before = threading.active_count()
    post(open_small, SHORT)
    assert wait_until(lambda: threading.active_count() <= before + 1)


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# keys\nalpha 3\n\nbeta  # plain\n")
    assert read_keys(str(path)) == {"alpha": 3, "beta": 1}
    for wrong in ("", "a 0", "a 1001", "a b", "a 1 2", "a\na", "a -1"):
        path.write_text(wrong)
        with pytest.raises(ConfigurationError) as caught:
            read_keys(str(path))
        assert caught.value.field == "api_key_file"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_keys(str(tmp_path / "none"))


def test_one_key_is_refused_from_its_first_bytes_while_another_is_let_in(caplog: pytest.LogCaptureFixture) -> None:
    class HalfFull(FakeEngine):
        def check_room(self, caller: Caller = ANYBODY) -> None:
            assert caller.weight == {caller_name("flood"): 3, caller_name("guest"): 2}.get(caller.name, 1)
            if caller.name == caller_name("flood"):
                raise TooManyRequestsError("too many requests with this key", retry_after_s=7)

    server = start(HalfFull(), api_key={"flood": 3, "guest": 2}, observability=Observability(log_requests=True))
    try:
        with caplog.at_level(logging.INFO, "quire.access"):
            refused = post(server, SHORT)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
            assert refused.headers["connection"] == "close", "unparsed"
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        (record,) = [item for item in caplog.records if item.name == "quire.access"]
        fields = vars(record)["fields"]
        assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/v1/completions", 429)
        assert post(server, SHORT, "guest").status_code == 200
        assert post(server, SHORT, "unknown").status_code == 401
        twice = httpx.Headers([("authorization", "Bearer flood"), ("authorization", "Bearer guest")])
        assert httpx.post(f"{server.url}/v1/completions", json=SHORT, headers=twice).status_code == 401
    finally:
        server.stop()


@pytest.mark.parametrize("options", [{}, {"observability": Observability(log_requests=True)}])
def test_a_flood_is_refused_before_it_is_parsed_and_probes_are_not(options: dict[str, Any]) -> None:
    """The same answer with logs and without: the first bytes of a connection are enough for it."""

    class Full(FakeEngine):
        def check_room(self, caller: Caller = ANYBODY) -> None:
            raise OverloadedError("the queue is full: 3 requests wait", retry_after_s=7)

    server = start(Full(), **options)
    try:
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = httpx.post(f"{server.url}{path}", json={"prompt": "x"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
            assert answer.json()["error"]["code"] == "overloaded"
            assert answer.json()["error"]["message"] == "the queue is full: 3 requests wait"
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert httpx.get(f"{server.url}/v1/completions").status_code == 405
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "x"}).status_code == 200
        with httpx.Client(base_url=server.url) as session:  # a request that is not the first of its connection
            assert session.get("/livez").status_code == 200
            assert session.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        port = int(server.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:  # its head in two parts
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
            time.sleep(0.05)
            connection.sendall(b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
            assert connection.recv(4096).startswith(b"HTTP/1.1 503 ")
    finally:
        server.stop()
