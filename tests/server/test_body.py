"""Bodies, byte by byte: where a limit lies exactly, what of them is held, and what strict JSON is (RFC 8259)."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from quire.server.http.body import COUNT_BYTES, Bodies, count_outside_strings, parse_json
from quire.server.http.errors import ApiError, ClientGoneError
from quire.server.http.limits import Limits

JSON = {"content-type": "application/json"}


class Request:
    """As much of a request as is read: a body in parts, or a caller that leaves."""

    def __init__(self, *parts: bytes | None, headers: dict[str, str] = JSON, host: str = "10.0.0.1") -> None:
        self.headers = headers
        self.scope = {"client": (host, 1)}
        self._parts = self._messages(parts)
        self.num_read = 0

    async def receive(self) -> dict[str, Any]:
        self.num_read += 1
        return await anext(self._parts)

    async def _messages(self, parts: tuple[bytes | None, ...]) -> AsyncIterator[dict[str, Any]]:
        for number, part in enumerate(parts):
            if part is None:
                yield {"type": "http.disconnect"}
            else:
                yield {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        await asyncio.Event().wait()


def bodies_of(**limits: int) -> Bodies:
    return Bodies(Limits().with_values(limits))


async def read(bodies: Bodies, *parts: bytes | None, headers: dict[str, str] = JSON) -> Any:
    request: Any = Request(*parts, headers=headers)
    return await bodies.read(request, lambda body: body)


async def refused(bodies: Bodies, *parts: bytes | None, headers: dict[str, str] = JSON) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await read(bodies, *parts, headers=headers)
    assert bodies.shares.num_held == 0, "nothing is held of what is refused"
    return caught.value


async def test_the_largest_body_is_taken_and_one_byte_more_is_not() -> None:
    bodies = bodies_of(body_bytes=20)
    fits = b'{"a": "' + b"x" * 11 + b'"}'
    assert len(fits) == 20 and await read(bodies, fits) == {"a": "x" * 11}
    assert await read(bodies, fits[:7], fits[7:19], fits[19:]) == {"a": "x" * 11}
    for parts in ((fits + b" ",), (fits[:7], fits[7:] + b" "), (fits, b" ", b"never read")):
        assert (await refused(bodies, *parts)).status == 413
    assert bodies.shares.num_held == 0


async def test_a_length_that_is_declared_too_large_is_refused_before_a_byte_is_read() -> None:
    bodies = bodies_of(body_bytes=20)
    for declared, is_refused in (("20", False), ("21", True), ("9" * 400, True), ("-1", False), ("x", False)):
        request: Any = Request(b"{}", headers={**JSON, "content-length": declared})
        if is_refused:
            with pytest.raises(ApiError) as caught:
                await bodies.read(request, dict)
            assert caught.value.status == 413 and request.num_read == 0
        else:
            assert await bodies.read(request, dict) == {}


async def test_what_all_requests_hold_together_has_a_bound_of_its_own() -> None:
    """Each of them is small; one more of a caller that holds as much as is left is refused, with a time, and they go
    on; another caller has what is left."""
    bodies = bodies_of(all_bodies_bytes=42)
    waiting: list[Any] = [asyncio.Event(), asyncio.Event()]

    class Slow(Request):
        def __init__(self, event: asyncio.Event) -> None:
            super().__init__(b'{"a": 1   ', b"}")
            self._event = event

        async def receive(self) -> dict[str, Any]:
            if self.num_read == 1:
                await self._event.wait()
            return await super().receive()

    tasks = [asyncio.ensure_future(bodies.read(Slow(event), dict)) for event in waiting]  # type: ignore[arg-type]
    while bodies.shares.num_held < 20:
        await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
        await read(bodies, b'{"b":2}')
    assert (caught.value.status, caught.value.code) == (503, "overloaded") and "Retry-After" in caught.value.headers
    assert bodies.shares.num_held == 20
    other: Any = Request(b"{}" + b" " * 20, host="10.0.0.2")
    assert await bodies.read(other, dict) == {}
    for event in waiting:
        event.set()
    assert await asyncio.gather(*tasks) == [{"a": 1}] * 2 and bodies.shares.num_held == 0


async def test_a_caller_who_leaves_holds_nothing() -> None:
    bodies = bodies_of()
    with pytest.raises(ClientGoneError):
        await read(bodies, b'{"a": ', None)
    assert bodies.shares.num_held == 0


async def test_a_body_that_does_not_come_in_time_is_refused() -> None:
    bodies = bodies_of(body_seconds=1)
    request: Any = Request()
    with pytest.raises(ApiError) as caught:
        await bodies.read(request, dict)
    assert (caught.value.status, caught.value.code, bodies.shares.num_held) == (408, "request_timeout", 0)


@pytest.mark.parametrize(
    ("headers", "is_taken"),
    [
        ({"content-type": "application/json"}, True),
        ({"content-type": "Application/JSON; charset=utf-8"}, True),
        ({"content-type": "text/plain"}, False),
        ({"content-type": "application/json-lines"}, False),
        ({}, False),
        ({**JSON, "content-encoding": "gzip"}, False),
        ({**JSON, "content-encoding": "identity"}, False),
    ],
)
async def test_only_plain_json_is_read(headers: dict[str, str], is_taken: bool) -> None:
    if is_taken:
        assert await read(bodies_of(), b"{}", headers=headers) == {}
    else:
        assert (await refused(bodies_of(), b"{}", headers=headers)).status == 415


@pytest.mark.parametrize("data", [b"[]", b'"x"', b"1", b"null", b"", b"{", b"{}{}", b"\xff", b"[" * 60_000])
async def test_a_body_is_one_object(data: bytes) -> None:
    error = await refused(bodies_of(), data)
    assert (error.status, error.code) == (400, "malformed_json")


@pytest.mark.parametrize(
    "text",
    [
        "NaN", "Infinity", "-Infinity", "1e309", "-1e309", "1" + "0" * 5000, "01", "1.", ".5", "+1", "'x'", "[1,]",
        '{"a": 1, "a": 2}', '{"a": 1, "a": 1}', '{"x": {"b": 1, "b": 2}}', '{"a": 1, "\\u0061": 2}',
        '"\\ud800"', '"\\udc00"', '"\\ud800x"', '"\\udc00\\ud800"', '"\\uDBFF"', '"\\uDfFf"', '{"\\ud800": 1}', '"\t"',
    ],
)  # fmt: skip
def test_what_is_not_strict_json_is_refused(text: str) -> None:
    """No number past a double, no name twice however it is written, no half of a surrogate pair."""
    with pytest.raises(ApiError) as caught:
        parse_json(text.encode())
    assert (caught.value.status, caught.value.code) == (400, "malformed_json")


@pytest.mark.parametrize(
    "text",
    [
        "1e308",
        "-1.5e-7",
        "12345678901234567890",
        '{"a": 1, "b": {"a": 1}}',
        '"\\ud83d\\ude00"',
        '"\\\\ud800"',
        "[[], {}]",
    ],
)
def test_what_is_strict_json_is_what_the_standard_library_says(text: str) -> None:
    assert parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("num_pieces", [0, 1, 2, 3])
def test_signs_in_a_string_that_spans_pieces_do_not_count(num_pieces: int) -> None:
    """A piece of the data that lies wholly inside the string has no quote."""
    value = [{"a": "[,:" * (num_pieces * COUNT_BYTES // 2), "b": [1, 2, "x[y"]}, "," * COUNT_BYTES, [[]]]
    data = json.dumps(value, separators=(",", ":")).encode()
    bare = json.dumps([{"": "", " ": [1, 2, ""]}, "", [[]]], separators=(",", ":"))
    assert count_outside_strings(data, b",", b":", b"[") == [bare.count(sign) for sign in (",", ":", "[")]
