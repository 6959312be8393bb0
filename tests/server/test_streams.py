"""Streams of the engine on their way out: several as one, differences put together, and what ends early ends all."""

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from quire.errors import RequestFailedError
from quire.outputs import CompletionOutput, RequestOutput
from quire.server.doors.openai.routes import FRAMING
from quire.server.http.errors import ApiError, ClientGoneError
from quire.server.http.streams import (
    PART_BYTES,
    EventStream,
    WholeAnswer,
    cancel_on_disconnect,
    coalesce,
    last_outputs,
    merged,
    start_events,
)

Script = list[RequestOutput | Exception]


class Source:
    """A stream that gives what a script says, and knows whether it was closed."""

    def __init__(self, *script: RequestOutput | Exception, hangs: bool = False) -> None:
        self.is_closed = False
        self.stream = self._give(list(script), hangs)

    async def _give(self, script: Script, hangs: bool) -> AsyncGenerator[RequestOutput, None]:
        try:
            for item in script:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                yield item
            if hangs:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


def output(*choices: CompletionOutput, finished: bool = False, name: str = "r") -> RequestOutput:
    return RequestOutput(name, None, [1], list(choices), finished)


def choice(index: int, *tokens: int, end: str | None = None) -> CompletionOutput:
    return CompletionOutput(index, "".join(map(chr, tokens)), list(tokens), finish_reason=end)


async def all_of(stream: Any) -> list[Any]:
    return [item async for item in stream]


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 100])
async def test_differences_come_together_by_the_interval_and_nothing_is_lost(interval: int) -> None:
    """Random lengths and random news; each sequence by itself: its first token at once, then at least so many in an
    event but for its last, and never the end without what came before."""
    dice = random.Random(interval)
    for _ in range(30):
        lengths = [dice.randint(1, 12) for _ in range(dice.randint(1, 3))]
        left, script = dict(enumerate(lengths)), Script()
        while left:
            news = []
            for index in sorted(dice.sample(sorted(left), dice.randint(1, len(left)))):
                count = min(left[index], dice.choice([1, 1, 1, 2]))
                first, left[index] = lengths[index] - left[index], left[index] - count
                news.append(
                    choice(index, *range(97 + first, 97 + first + count), end=None if left[index] else "length")
                )
                if not left[index]:
                    del left[index]
            script.append(output(*news, finished=not left))
        source = Source(*script)
        found: dict[int, list[CompletionOutput]] = {}
        async for item in coalesce(source.stream, interval):
            assert item.outputs, "an event has something to say"
            for part in item.outputs:
                found.setdefault(part.index, []).append(part)
        for index, length in enumerate(lengths):
            parts = found[index]
            assert [token for part in parts for token in part.token_ids] == list(range(97, 97 + length))
            assert "".join(part.text for part in parts) == "".join(map(chr, range(97, 97 + length)))
            assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
            assert all(len(part.token_ids) >= interval for part in parts[1:-1])
            assert all(len(part.token_ids) < interval + 2 for part in parts[1:])
            assert len(parts[0].token_ids) <= 2, "the first is not held back"
        assert source.is_closed


async def test_streams_are_merged_with_their_numbers_each_in_its_order() -> None:
    sources = [Source(*(output(choice(0, token)) for token in range(number + 1))) for number in range(4)]
    found = await all_of(merged([source.stream for source in sources]))
    for number in range(4):
        tokens = [item.outputs[0].token_ids for place, item in found if place == number]
        assert tokens == [[token] for token in range(number + 1)]
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("bad", [0, 1, 2])
async def test_the_failure_of_one_ends_all_that_are_merged(bad: int) -> None:
    sources = [Source(output(choice(0, 1)), hangs=True) for _ in range(3)]
    sources[bad] = Source(output(choice(0, 1)), RequestFailedError("broken"))
    with pytest.raises(RequestFailedError, match="broken"):
        await all_of(merged([source.stream for source in sources]))
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_reader_that_stops_early_closes_all(count: int) -> None:
    sources = [Source(*[output(choice(0, 1))] * 50, hangs=True) for _ in range(count)]
    stream = merged([source.stream for source in sources])
    await anext(stream)
    await stream.aclose()
    assert all(source.is_closed for source in sources)


async def test_the_last_output_of_each_is_the_answer() -> None:
    sources = [Source(output(name=f"{number}.early"), output(name=f"{number}.last")) for number in range(3)]
    found = await last_outputs([source.stream for source in sources])
    assert [item.request_id for item in found] == ["0.last", "1.last", "2.last"]
    for empty in ([Source()], [Source(), Source(output())]):
        with pytest.raises(ApiError) as caught:
            await last_outputs([source.stream for source in empty])
        assert caught.value.status == 500


async def test_the_failure_of_one_ends_its_siblings() -> None:
    sources = [Source(output(), hangs=True), Source(RequestFailedError("broken")), Source(output(), hangs=True)]
    with pytest.raises(RequestFailedError):
        await last_outputs([source.stream for source in sources])
    assert all(source.is_closed for source in sources)


async def events(log: list[str], *items: Any) -> AsyncGenerator[Any, None]:
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        log.append("closed")


@pytest.mark.parametrize("way", ["first event", "encoding", "headers"])
async def test_what_goes_wrong_before_the_first_event_closes_the_stream(way: str) -> None:
    log: list[str] = []
    items: list[Any] = [{"text": "x"}, {"text": "y"}]
    if way == "first event":
        items[0] = RequestFailedError("broken")
    elif way == "encoding":
        items[0] = {"text": object()}

    def headers() -> dict[str, str]:
        if way == "headers":
            raise RequestFailedError("broken")
        return {}

    with pytest.raises((RequestFailedError, TypeError, NotImplementedError)):
        await start_events(events(log, *items), headers, FRAMING)
    assert log == ["closed"]


class Reader:
    """The other side of a response: it reads all, or leaves after so many messages."""

    def __init__(self, leaves_after: int | None = None) -> None:
        self.body, self.statuses, self.is_complete = b"", list[int](), False
        self._left = asyncio.Event()
        self._leaves_after, self._num = leaves_after, 0

    async def receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self._num += 1
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])
        else:
            self.body += message["body"]
            self.is_complete = not message["more_body"]
        if self._num == self._leaves_after:
            self._left.set()
            await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("items", "last"),
    [
        ([{"n": 1}], b'data: {"n":1}\n\ndata: [DONE]\n\n'),
        ([RequestFailedError("broken")], b'"code":"request_failed"}}\n\n'),
        ([ValueError("secret")], b'"code":"internal_error"}}\n\n'),
    ],
)
async def test_a_stream_ends_with_done_or_with_an_error_and_never_with_both(items: list[Any], last: bytes) -> None:
    log: list[str] = []
    reader = Reader()
    await EventStream(b'{"n":0}', events(log, *items), {}, FRAMING)({"type": "http"}, reader.receive, reader.send)
    assert reader.statuses == [200] and reader.is_complete and log == ["closed"]
    assert reader.body.startswith(b'data: {"n":0}\n\n') and reader.body.endswith(last)
    assert reader.body.count(b"[DONE]") == (b"[DONE]" in last) and b"secret" not in reader.body


@pytest.mark.parametrize("leaves_after", [1, 2, 3])
async def test_a_reader_that_leaves_closes_the_stream(leaves_after: int) -> None:
    log: list[str] = []
    reader = Reader(leaves_after)
    stream = events(log, *[{"n": number} for number in range(1, 9)])
    first = await start_events(stream, dict, FRAMING)
    await first({"type": "http"}, reader.receive, reader.send)
    assert log == ["closed"] and b"[DONE]" not in reader.body


async def test_work_goes_on_while_somebody_waits_for_it() -> None:
    reader = Reader()

    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await cancel_on_disconnect(reader.receive, work()) == 7
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    asyncio.get_running_loop().call_soon(reader._left.set)
    with pytest.raises(ClientGoneError):
        await cancel_on_disconnect(reader.receive, endless())
    assert ended == ["ended"]


@pytest.mark.parametrize("size", [0, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES // 2])
async def test_a_large_answer_is_handed_on_in_parts(size: int) -> None:
    """None is larger than the bound, and the length that was announced is the length that comes."""
    content, sent = random.Random(size).randbytes(size), []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    await WholeAnswer(content, media_type="application/json")({"type": "http"}, receive, send)
    start, *parts = sent
    assert dict(start["headers"])[b"content-length"] == str(size).encode() and start["status"] == 200
    bodies = [part.get("body", b"") for part in parts]
    assert b"".join(bodies) == content and max(map(len, bodies)) <= PART_BYTES
    assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]


async def test_a_reader_that_leaves_a_large_answer_ends_it() -> None:
    num_sent = 0

    async def send(message: Any) -> None:
        nonlocal num_sent
        num_sent += 1
        await asyncio.sleep(0)

    async def receive() -> Any:
        while num_sent < 3:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    await WholeAnswer(bytes(100 * PART_BYTES))({"type": "http"}, receive, send)
    assert num_sent < 20
