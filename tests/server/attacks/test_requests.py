"""What an attacker sends to the server: numbers, headers, framing, paths, slow bytes. See docs/guide/trust.md."""

import ast
import gc
import inspect
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from quire.server.doors.all import DOORS
from quire.server.doors.openai.bodies import COMPLETION, request_bodies
from quire.server.http import keys
from quire.server.http.limits import Limits
from quire.server.http.openapi import document
from scripts.fuzz_api import KEY, PRIVATE, ROUTES, corpus
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start
from tests.server.fake_engine import FakeEngine

JSON = {"content-type": "application/json"}
LITERALS = ["NaN", "Infinity", "-Infinity", "1e309", "-1e309", "9" * 5000, "1" + "0" * 400, '"1"', "[]", "{}", "[[1]]"]
LISTS = {"prompt", "stop", "bad_words", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"}
TAKE_OBJECTS = LISTS | {"logit_bias", "repetition_detection"}
"""Fields in which one of these literals is no mistake."""


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    instance = start(FakeEngine(), api_key=KEY)
    yield instance
    instance.stop()


@pytest.fixture
def hasty() -> Iterator[Running]:
    """A server that waits half a second for headers."""
    instance = start(FakeEngine(), header_s=0.5)
    yield instance
    instance.stop()


def port_of(running: Running) -> int:
    return int(running.url.rsplit(":", 1)[1])


def say(running: Running, data: bytes) -> bytes:
    """What the server answers to these bytes, until it closes or has answered."""
    with socket.create_connection(("127.0.0.1", port_of(running)), timeout=PATIENCE_S) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was closed before all was sent
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except OSError:
            pass
        return found


def is_alive(running: Running) -> bool:
    body = {"prompt": "abc", "max_tokens": 3, "seed": 1}
    answer = httpx.post(f"{running.url}/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"})
    return answer.status_code == 200 and answer.json()["choices"][0]["text"] == "bcd"


def _numeric_fields() -> list[str]:
    properties = request_bodies(Limits())["CompletionRequest"]["properties"]
    return [name for name, schema in properties.items() if re.search(r'"(integer|number)"', json.dumps(schema))]


def test_numbers_that_are_none(http: httpx.Client) -> None:
    """A10: every numeric field with every literal that is no number of JSON, too large, or of another type."""
    fields = _numeric_fields()
    assert len(fields) >= 18
    for name in set(fields) - TAKE_OBJECTS:
        for literal in LITERALS:
            data = b'{"prompt": "x", "%s": %s}' % (name.encode(), literal.encode())
            response = http.post("/v1/completions", content=data, headers=JSON)
            assert response.status_code == 400, (name, literal, response.text)
            assert not PRIVATE.search(response.content)


def test_every_body_that_is_described_is_in_the_corpus() -> None:
    described = document(DOORS, Limits(), needs_key=False)["paths"]
    bodies = {
        path.replace("{id}", "conv_2")
        for path, methods in described.items()
        if "application/json" in methods.get("post", {}).get("requestBody", {}).get("content", ())
    }
    assert bodies == {*ROUTES}


def test_every_field_survives_the_corpus(locked: Running) -> None:
    """A10, A11, A13, A22: a shard of scripts/fuzz_api."""
    findings: list[str] = []
    corpus(port_of(locked), 400, 11, findings)
    assert not findings
    assert is_alive(locked)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % index for index in range(100_000)) + b"\r\n",
        b"GET /livez HTTP/1.1\r\nX: " + b"y" * 2**20 + b"\r\n\r\n",
        b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX\x00Y: z\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    ],
)
def test_framing_that_is_wrong(locked: Running, head: bytes) -> None:
    """A13: refused and closed; nothing else happens."""
    answer = say(locked, head)
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), answer[:100]
    assert is_alive(locked)


def test_a_length_and_chunks_are_not_two_requests(locked: Running) -> None:
    """A13: what follows the chunks of a request with a length as well is never read as a request of its own."""
    inner = b"GET /version HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer fuzz\r\n\r\n"
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer fuzz\r\n"
    )
    data = head + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(inner)) + inner
    answer = say(locked, data)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in answer.lower()
    assert b'{"version"' not in answer


def test_a_body_in_chunks_of_one_byte_is_a_body(http: httpx.Client) -> None:
    data = b'{"prompt": "abc", "max_tokens": 2}'
    response = http.post("/v1/completions", content=(data[i : i + 1] for i in range(len(data))), headers=JSON)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/../v1/models",
        b"//version",
        b"/v1%2fmodels",
        b"/version%00",
        b"/livez/../version",
        b"/livez%2f..%2fversion",
        b"http://evil/version",
        b"/livez;/version",
        b"*",
    ],
)
@pytest.mark.parametrize("host", [b"x", b"127.0.0.1@evil", b"evil/livez?", b"", b"\xff"])
def test_no_way_around_the_key(locked: Running, target: bytes, host: bytes) -> None:
    """A19: no path, absolute target or Host gets past the key."""
    answer = say(locked, b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (target, host))
    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400", b"HTTP/1.1 404")), answer[:200]
    assert b'{"version"' not in answer
    assert b"fake" not in answer


def test_keys_are_compared_as_digests_in_constant_time() -> None:
    """A20: by the source, not by a clock."""
    tree = ast.parse(inspect.getsource(keys.KeyRequired))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert {"hmac.compare_digest", "hashlib.sha256"} <= calls
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [text for text in compared if re.search(r"\b(key|digest)\b", text) and "None" not in text]


def ask_first(running: Running) -> socket.socket:
    """A connection that asked, and was answered, before its time was up: tried again where the machine was too busy."""
    for _ in range(100):
        connection = socket.create_connection(("127.0.0.1", port_of(running)))
        with suppress(ConnectionError):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            if found := connection.recv(4096):
                assert found.startswith(b"HTTP/1.1 200")
                return connection
        connection.close()
    raise TimeoutError("no answer came in time")


def test_connections_that_never_ask_are_closed(hasty: Running) -> None:
    """A14: silent ones, ones that send a byte now and then, and ones that dawdle over a second request."""
    quiet = [socket.create_connection(("127.0.0.1", port_of(hasty))) for _ in range(40)]
    slow = [ask_first(hasty) for _ in range(40)]
    open_ones, end = set(quiet + slow), time.monotonic() + PATIENCE_S
    while open_ones and time.monotonic() < end:
        for connection in list(open_ones):
            try:
                if connection in slow:
                    connection.sendall(b"G")
                connection.settimeout(0.001)
                if connection.recv(4096) == b"":
                    open_ones.discard(connection)
            except TimeoutError:
                pass
            except OSError:
                open_ones.discard(connection)
        time.sleep(0.05)
    assert not open_ones
    ask_first(hasty).close()
    for connection in quiet + slow:
        connection.close()


def test_a_request_may_take_longer_than_its_headers(hasty: Running) -> None:
    """A14's limit is of the headers: an answer that takes longer is not cut off. Headers that are late on a busy
    machine are sent again; an answer that has begun is the last."""
    body = {"prompt": "slow", "max_tokens": 60, "stream": True}
    found, num_tries = "", 0
    while not found and num_tries < 100:
        num_tries += 1
        with suppress(httpx.TransportError), httpx.stream("POST", f"{hasty.url}/v1/completions", json=body) as answer:
            for text in answer.iter_text():
                found += text
    assert found.endswith("data: [DONE]\n\n")


def test_logs_hold_one_line_a_record_and_nothing_of_the_request(caplog: pytest.LogCaptureFixture) -> None:
    """A21: whatever a client sends, and even where the server itself fails."""

    class Broken(FakeEngine):
        async def encode_chat(self, messages: Any, **options: Any) -> list[int]:
            raise RuntimeError("bad\r\nrow \x1b[31m" + messages[0]["content"])

    evil = "s3cret\r\nERROR forged \x1b[2J\u202e"
    with caplog.at_level(logging.INFO):
        broken = start(Broken(), api_key=KEY)
        with httpx.Client(base_url=broken.url, headers={"authorization": f"Bearer {KEY}"}) as http:
            for body in ({"model": evil}, {"user": evil * 300}, {"nonsense" + evil: 1}, {}):
                full = {"messages": [{"role": "user", "content": evil}], **body}
                assert http.post("/v1/chat/completions", json=full).status_code in (400, 404, 500)
            assert http.get("/nowhere", headers={"x-request-id": "a b"}).status_code == 404
        broken.stop()
    assert caplog.records
    for record in caplog.records:
        text = record.getMessage()
        assert not re.search(r"[\r\n\x1b\u202e]", text)
        assert KEY not in text
        assert "s3cret" not in text
        assert record.exc_info is None
    assert any("unexpected RuntimeError at test_requests.py" in record.getMessage() for record in caplog.records)


def test_distinct_values_leave_nothing_behind(running: Running, http: httpx.Client) -> None:
    """A27: salts, labels, models, paths and methods of which each comes once: no table grows by them."""

    def send(start_at: int, count: int) -> None:
        for index in range(start_at, start_at + count):
            body = {"prompt": "x", "max_tokens": 1, "user": f"u{index}", "cache_salt": f"s{index}"}
            http.post("/v1/completions", json=body)
            http.post("/v1/completions", json={**body, "model": f"m{index}", f"f{index}": 1})
            http.request("BREW", f"/p{index}")

    send(0, 50)
    http.get("/metrics")  # which counts itself from the next time on
    running.engine.calls.clear()
    gc.collect()
    before, metrics = len(gc.get_objects()), len(http.get("/metrics").text.splitlines())
    send(50, 400)
    running.engine.calls.clear()
    gc.collect()
    assert len(gc.get_objects()) - before < 400
    assert len(http.get("/metrics").text.splitlines()) == metrics


def test_no_field_names_a_host_a_file_or_a_block() -> None:
    """A17, A18, A29: the fields that could are refused by name, whatever they hold."""
    for name in ("kv_transfer_params", "prompt_embeds", "vllm_xargs"):
        assert name in COMPLETION.refused
    for name in ("lora", "image_url", "block_ids", "data_parallel_rank", "custom_logit_processor"):
        assert name not in COMPLETION.known()
