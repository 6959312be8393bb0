"""One caller's use never takes what another needs: places, bytes of bodies, and who a caller is."""

import asyncio
import errno
import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from quire.server.doors.openai.routes import OPENAI
from quire.server.http.app import create_app
from quire.server.http.limits import Limits
from quire.server.http.listen import LISTEN_BACKLOG, RESERVED_DESCRIPTORS, bind, raise_descriptors
from quire.server.http.middleware import LARGE_BODY_BYTES, QueueGuard
from quire.server.http.shares import Shares, network_of, sharer_of
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start, wait_until
from tests.server.fake_engine import FakeEngine

HELD = {"prompt": "held", "max_tokens": 9, "stream": True}


def take_all(shares: Shares, caller: str) -> int:
    count = 0
    while shares.take(caller):
        count += 1
    return count


def test_a_caller_may_hold_as_much_as_is_left_free() -> None:
    shares = Shares(64)
    assert [take_all(shares, caller) for caller in "abcdef"] == [32, 16, 8, 4, 2, 1]
    assert take_all(shares, "a") == 0 and shares.take("g") and not shares.take("h") and shares.num_held == 64
    shares.give("a", 30)
    assert (take_all(shares, "b"), take_all(shares, "a")) == (7, 11)


def test_a_caller_without_any_gets_what_is_free_and_no_more() -> None:
    shares = Shares(10)
    assert not shares.take("a", 11) and shares.take("a", 10) and not shares.take("b")
    shares.give("a", 10)
    assert shares._held == {} and shares.num_held == 0
    assert Shares(1).take("a")


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002"),
        ("2001:db8:1:2::9", "20010db800010002"),
        ("fe80::1%eth0", "fe80000000000000"),
    ],
)
def test_a_machine_is_one_network(host: str, network: str) -> None:
    assert network_of((host, 7)) == network == sharer_of({"client": (host, 9)})
    assert network_of(None) == ""


def test_a_key_is_a_caller_wherever_it_comes_from() -> None:
    assert sharer_of({"client": ("10.1.2.3", 1), "quire.caller": "digest"}) == "digest"


@pytest.fixture
def narrow() -> Iterator[Running]:
    limits = Limits().with_values({"requests": 8, "all_bodies_bytes": 40_000})
    instance = start(FakeEngine(), api_key=["flood", "guest"], limits=limits)
    yield instance
    instance.engine.released.set()
    instance.stop()


def ask(server: Running, key: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=headers)


def test_one_keys_streams_leave_places_for_another(narrow: Running) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(headers={"Authorization": "Bearer flood"}))
        found = [
            stack.enter_context(client.stream("POST", f"{narrow.url}/v1/completions", json=HELD)) for _ in range(8)
        ]
        assert [item.status_code for item in found] == [200] * 4 + [503] * 4
        assert found[-1].headers["retry-after"] == "1" and b"limited to 8 requests" in found[-1].read()
        assert [ask(narrow, "guest").status_code for _ in range(3)] == [200] * 3
        assert ask(narrow, "flood").status_code == 503
        assert httpx.get(f"{narrow.url}/livez").status_code == 200
        narrow.engine.released.set()
    assert wait_until(lambda: not narrow.server._context.places.num_held)
    assert ask(narrow, "flood").status_code == 200


def test_one_keys_unfinished_bodies_leave_bytes_for_another(narrow: Running) -> None:
    port = int(narrow.url.rsplit(":", 1)[1])
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9001\r\n"
    with ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
            connection.sendall(f"{head}Authorization: Bearer flood\r\n\r\n{'x' * 9000}".encode())
        assert wait_until(lambda: connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 503")
        assert ask(narrow, "guest").status_code == 200
    assert wait_until(lambda: not narrow.server._context.bodies.shares.num_held)


async def test_a_place_is_held_until_a_large_answer_has_left() -> None:
    app = create_app(FakeEngine(), apis=[OPENAI], served_model_name="m")  # type: ignore[arg-type]
    context, sent, is_taken = app.state.context, list[Message](), asyncio.Event()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (LARGE_BODY_BYTES + 1)})

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            await is_taken.wait()  # as uvicorn does while bytes of the message before are unread

    guard = QueueGuard(answer, context=context, open_paths=frozenset())
    scope = {"type": "http", "method": "GET", "path": "/", "client": ("10.0.0.1", 1)}
    task = asyncio.ensure_future(guard(scope, None, send))  # type: ignore[arg-type]
    while len(sent) < 3:
        await asyncio.sleep(0)
    assert [len(message.get("body", b"")) for message in sent] == [0, LARGE_BODY_BYTES + 1, 0]
    assert context.places.num_held == 1
    is_taken.set()
    await task
    assert context.places.num_held == 0


def test_limits_follow_the_queue_and_the_descriptors() -> None:
    limits = Limits()
    large = limits.for_queue(10_000)
    assert (large.requests.value, large.connections.value) == (40_000, 80_000)
    assert limits.for_queue(10).requests == limits.requests
    small = limits.within(800)
    assert (small.connections.value, small.requests.value) == (800, 600)
    assert limits.within(10**6) == limits


def test_this_process_may_open_as_many_descriptors_as_the_system_lets_it() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
        assert raise_descriptors() == before[1] - RESERVED_DESCRIPTORS
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_full_table_of_descriptors_is_said_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, asked, said = bind("127.0.0.1", 0), [0], list[dict[str, Any]]()

    def accept(self: socket.socket) -> Any:
        asked[0] += 1
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", accept)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: said.append(context))
    server = await loop.create_server(asyncio.Protocol, sock=listener, backlog=LISTEN_BACKLOG)
    with socket.create_connection(listener.getsockname()):
        while not said:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert asked == [1] and len(said) == 1
    server.close()


def test_json_of_the_refusal_is_whole(narrow: Running) -> None:
    """What a crowded server says is in the shape of its API."""
    refusal = narrow.server._context.limits.connections.error()
    head, _, body = refusal.plain(narrow.server._context.error_body("", refusal)).partition(b"\r\n\r\n")
    assert b"Retry-After: 1" in head and json.loads(body)["error"]["code"] == "overloaded"
