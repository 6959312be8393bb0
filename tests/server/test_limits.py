"""Every limit is hit with its own status and code, can be set, and is on the page of limits."""

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import httpx
import pytest

from quire.errors import ConfigurationError
from quire.server.http.body import Bodies, count_outside_strings
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from scripts import api_pages
from tests.conftest import PATIENCE_S
from tests.server.conftest import Running, start
from tests.server.fake_engine import FakeEngine

JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "x"}]
SMALL = {
    "body_bytes": 20_000,
    "body_values": 500,
    "body_names": 40,
    "all_bodies_bytes": 15_000,
    "prompts": 3,
    "sequences": 6,
    "logprobs": 40,
    "stop_characters": 9,
    "bad_word_characters": 20,
    "messages": 4,
    "content_parts": 5,
    "label_characters": 7,
    "template_arguments": 2,
    "template_argument_depth": 3,
    "detokenized_tokens": 8,
    "documents": 2,
    "chat_template_characters": 60,
}
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HITS: dict[str, tuple[str, Any, Any]] = {
    # limit: route, a body past it, a body within it
    "body_bytes": (TEXT, {"prompt": "x" * 20_000}, {"prompt": "x" * 400}),
    "body_names": (TEXT, {"prompt": "a", "logit_bias": {str(one): 1 for one in range(50)}}, {"prompt": "a:[" * 30}),
    "body_values": (TEXT, {"prompt": [1] * 502}, {"prompt": [1] * 300}),
    "all_bodies_bytes": (TEXT, {"prompt": "x" * 16_000}, {"prompt": "x" * 400}),
    "prompts": (TEXT, {"prompt": ["x"] * 4}, {"prompt": ["x"] * 3}),
    "sequences": (TEXT, {"prompt": ["x"] * 2, "n": 4}, {"prompt": ["x"] * 2, "n": 3}),
    "logprobs": (
        TEXT,
        {"prompt": ["x", "y"], "n": 2, "max_tokens": 4, "logprobs": 2},
        {"prompt": ["x", "y"], "n": 2, "max_tokens": 3, "logprobs": 2},
    ),
    "stop_characters": (TEXT, {"prompt": "x", "stop": ["12345", "67890"]}, {"prompt": "x", "stop": ["12345", "6789"]}),
    "bad_word_characters": (
        TEXT,
        {"prompt": ["x", "y"], "n": 2, "bad_words": ["123456"]},
        {"prompt": ["x", "y"], "n": 2, "bad_words": ["123", "45"]},
    ),
    "messages": (CHAT, {"messages": HELLO * 5}, {"messages": HELLO * 4}),
    "content_parts": (
        CHAT,
        {"messages": [{"role": "user", "content": ["x"] * 6}]},
        {"messages": [{"role": "user", "content": ["x"] * 5}]},
    ),
    "label_characters": (TEXT, {"prompt": "x", "user": "x" * 8}, {"prompt": "x", "user": "x" * 7}),
    "template_arguments": (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"a": 1, "b": 2, "c": 3}},
        {"messages": HELLO, "chat_template_kwargs": {"a": 1, "b": 2}},
    ),
    "documents": (
        CHAT,
        {"messages": HELLO, "documents": [{"a": "b"}] * 3},
        {"messages": HELLO, "documents": [{"a": "b"}] * 2},
    ),
    "chat_template_characters": (
        CHAT,
        {"messages": HELLO, "chat_template": "x" * 61},
        {"messages": HELLO, "chat_template": "x" * 60},
    ),
    "template_argument_depth": (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"a": [[[1]]]}},
        {"messages": HELLO, "chat_template_kwargs": {"a": [[1]]}},
    ),
    "detokenized_tokens": ("/detokenize", {"tokens": [1] * 9}, {"tokens": [1] * 8}),
}


@pytest.fixture(scope="module")
def narrow() -> Iterator[Running]:
    instance = start(FakeEngine(), limits=Limits().with_values(SMALL))
    yield instance
    instance.stop()


@pytest.fixture
def hasty() -> Iterator[Running]:
    instance = start(FakeEngine(), limits=Limits().with_values({"body_seconds": 1}))
    yield instance
    instance.stop()


@pytest.mark.parametrize("name", [item.name for item in fields(Limits) if item.name in HITS])
def test_each_limit_has_its_own_error(narrow: Running, name: str) -> None:
    limit = getattr(Limits().with_values(SMALL), name)
    route, past, within = HITS[name]
    with httpx.Client(base_url=narrow.url) as http:
        response = http.post(route, json=past)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (
            limit.status,
            limit.code,
            limit.param or next((field for field in ("user", "logprobs") if field in past), None),
        )
        assert f"{limit.value:,}" in error["message"]
        assert ("retry-after" in response.headers) == (limit.status == 503)
        response = http.post(route, json=within)
        assert response.status_code == 200, response.text


async def test_a_body_that_trickles_in_is_cut_off(hasty: Running) -> None:
    host, _, port = hasty.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    assert b" 408 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)
    writer.close()


def test_codes_tell_limits_apart() -> None:
    limits = [getattr(Limits(), item.name) for item in fields(Limits)]
    refused = [item for item in limits if item.status < 500]
    assert len({item.code for item in refused}) == len(refused) and all(item.status >= 400 for item in refused)
    assert {(item.status, item.code) for item in limits if item not in refused} == {(503, "overloaded")}


@pytest.mark.parametrize("values", [{"bodybytes": 1}, {"prompts": 0}, {"prompts": 2**41}])
def test_what_is_no_limit(values: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        Limits().with_values(values)


def test_the_page_is_what_the_table_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert api_pages.limits_page() == (api_pages.GUIDE / "limits.md").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["api_pages", "--check"])
    assert api_pages.main() == 0
    monkeypatch.setattr(api_pages, "HEAD", "# Changed\n")
    assert api_pages.main() == 1


class _Request:
    """As much of a request as `Bodies` reads."""

    headers = JSON
    scope: dict[str, Any] = {}  # noqa: RUF012 -- nothing is put into it

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self._data, "more_body": False}


async def test_a_large_body_does_not_hold_up_the_event_loop() -> None:
    """8 MB are parsed beside the loop: what the parse waits for here only the loop can give, and it does."""
    limits = Limits()
    bodies = Bodies(limits)
    data = json.dumps({"messages": [{"role": "user", "content": "a " * 110}] * 30_000}).encode()
    assert 7 * 2**20 < len(data) < limits.body_bytes.value
    turned = threading.Event()
    request: Any = _Request(data)
    asyncio.get_running_loop().call_soon(turned.set)
    assert await bodies.read(request, lambda body: len(body["messages"]) if turned.wait(PATIENCE_S) else 0) == 30_000
    assert bodies.shares.num_held == 0


@pytest.mark.parametrize("item", [b'"%d":1', b"[]", b'{"%d":[]}'])
async def test_what_the_parser_takes_long_for_is_refused_before_it(
    item: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a million names or lists: the parser is not asked at all, and they are counted beside the loop."""
    items = b",".join(item % number if b"%" in item else item for number in range(500_000))
    data = b"{" + items + b"}" if item.startswith(b'"') else b'{"prompt":[' + items + b"]}"
    turned, request = threading.Event(), _Request(data)

    def count(data: bytes, *signs: bytes) -> list[int]:
        assert turned.wait(PATIENCE_S), "the loop stood still"
        return count_outside_strings(data, *signs)

    monkeypatch.setattr("quire.server.http.body.parse_json", None)
    monkeypatch.setattr("quire.server.http.body.count_outside_strings", count)
    asyncio.get_running_loop().call_soon(turned.set)
    with pytest.raises(ApiError) as caught:
        await Bodies(Limits()).read(request, dict)  # type: ignore[arg-type]
    assert caught.value.code == "too_many_names"


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ('{"a":[1,2],"b":"x,:["}', [2, 2, 1]),
        (r'{"a\\":1,"b\"":"\\\",:[","c":[]}', [2, 3, 1]),
        ('{"' + "a" * (2**16 - 3) + ':,":[":,",1]}', [1, 1, 1]),
    ],
)
def test_signs_are_counted_outside_strings(text: str, outside: list[int]) -> None:
    json.loads(text)
    assert count_outside_strings(text.encode(), b",", b":", b"[") == outside


async def test_what_is_refused_is_not_held() -> None:
    bodies = Bodies(Limits().with_values({"body_bytes": 10, "all_bodies_bytes": 5}))
    for data in (b"{}", b"{      }", b"{" + b" " * 99):
        request: Any = _Request(data)
        if len(data) > 5:
            with pytest.raises(ApiError):
                await bodies.read(request, dict)
        else:
            await bodies.read(request, dict)
        assert bodies.shares.num_held == 0
