"""Outputs of the engine on their way to a connection: several as one, whole or as events, while the caller is there.

Whatever ends a response early (a closed connection, a reader that stopped reading, an error) closes the engine's
iterators, and closing an iterator aborts its request and frees its blocks.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.engine.stream import joined_choice
from quire.errors import SHAPE, InvalidRequestError, ShapeError
from quire.outputs import CompletionOutput, RequestOutput
from quire.server.http.errors import ApiError, ClientGoneError, as_api_error

PART_BYTES = 2**18
"""Of a whole answer that are handed on at one time."""

T = TypeVar("T")
Outputs = AsyncGenerator[RequestOutput, None]


async def last_outputs(streams: Sequence[Outputs]) -> list[RequestOutput]:
    """The last output of each stream; the first failure aborts the others."""
    if len(streams) == 1:
        return [await _final(streams[0])]
    tasks: list[asyncio.Future[RequestOutput]] = []
    try:
        await _begin(tasks, (_final(stream) for stream in streams))
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _begin(tasks: list["asyncio.Future[T]"], work: Iterable[Coroutine[Any, Any, T]]) -> None:
    """Start one after another: to begin a request takes a moment, and others have theirs between."""
    for item in work:
        tasks.append(asyncio.ensure_future(item))
        await asyncio.sleep(0)


async def _final(stream: Outputs) -> RequestOutput:
    last: RequestOutput | None = None
    async with aclosing(stream) as outputs:
        async for output in outputs:
            last = output
    if last is None:
        raise ApiError(500, "the engine gave no answer", code="internal_error")
    return last


async def coalesce(outputs: Outputs, interval: int) -> Outputs:
    """The differences of `outputs`, each sequence's together until they hold `interval` tokens.

    The first token and the end of a sequence are not held back.
    """
    if interval == 1:
        async with aclosing(outputs) as source:
            async for output in source:
                yield output
        return
    held: dict[int, CompletionOutput] = {}
    begun: set[int] = set()
    async with aclosing(outputs) as source:
        async for output in source:
            for choice in output.outputs:
                before = held.get(choice.index)
                held[choice.index] = choice if before is None else joined_choice((before, choice))
            due = [
                item
                for index, item in held.items()
                if item.finish_reason is not None or index not in begun or len(item.token_ids) >= interval
            ]
            if due:
                yield replace(output, outputs=due)
            for item in due:
                begun.add(item.index)
                del held[item.index]


async def merged(streams: Sequence[Outputs]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of all streams as they come, with the number of their stream."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as outputs:
            async for output in outputs:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(2 * len(streams))
    tasks: list[asyncio.Future[None]] = []
    open_streams = len(streams)
    try:
        await _begin(tasks, (_pump(number, stream, queue) for number, stream in enumerate(streams)))
        while open_streams:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield number, item
    finally:
        await _cancel(tasks)


async def _pump(
    number: int, stream: Outputs, queue: "asyncio.Queue[tuple[int, RequestOutput | Exception | None]]"
) -> None:
    try:
        async with aclosing(stream) as outputs:
            async for output in outputs:
                await queue.put((number, output))
    except Exception as error:  # noqa: BLE001 -- handed to the reader, which raises it
        await queue.put((number, error))
    else:
        await queue.put((number, None))


async def _cancel(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or `ClientGoneError` as soon as the connection closes; then `work` is cancelled.

    The body of the request must have been read.
    """
    task: asyncio.Task[T] = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancel((task, watcher))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Framing(NamedTuple):
    """How an API writes a stream."""

    media_type: str
    frame: Callable[[bytes], bytes]
    """One event around its JSON."""
    end: bytes
    """Follows the last event."""
    error_body: Callable[[ApiError], object]
    """The event of an error, after which the stream ends without `end`."""


class EventStream(Response):
    """A stream of `first`, which is JSON, and of what `events` yields, as JSON."""

    def __init__(
        self, first: bytes, events: AsyncGenerator[Any, None], headers: dict[str, str], framing: Framing
    ) -> None:
        self.media_type = framing.media_type
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events, self._framing = first, events, framing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, or until the reader is gone."""
        try:
            await cancel_on_disconnect(receive, self._write(send))
        except ClientGoneError:
            return
        finally:
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        frame, encode, last = self._framing.frame, msgspec.json.encode, self._framing.end
        await send(_part(frame(self._first)))
        try:
            async for event in self._events:
                await send(_part(frame(encode(event))))
        except Exception as error:  # noqa: BLE001 -- the status is sent; the event says it
            last = frame(encode(self._framing.error_body(as_api_error(error))))
        await send(_part(last))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _part(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


class WholeAnswer(Response):
    """An answer in one piece, which is handed on in parts where it is large: the connection copies what it is given,
    and tells when it can take more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, or until the reader is gone."""
        if len(self.body) <= PART_BYTES:
            return await super().__call__(scope, receive, send)
        try:
            await cancel_on_disconnect(receive, self._write(memoryview(self.body), send))
        except ClientGoneError:
            return

    async def _write(self, body: memoryview, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(body), PART_BYTES):
            await send(_part(bytes(body[start : start + PART_BYTES])))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def start_events(
    events: AsyncGenerator[Any, None], headers: Callable[[], dict[str, str]], framing: Framing
) -> EventStream:
    """A stream whose first event has come: what goes wrong before it can still be a status."""
    try:
        first = msgspec.json.encode(await anext(events))
        return EventStream(first, events, headers(), framing)
    except BaseException:
        await events.aclose()
        raise


class Deliverable(Protocol):
    """What the routes make of a request."""

    async def whole(self) -> bytes:
        """The answer in one piece, as JSON."""

    def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces."""

    def headers(self) -> dict[str, str]:
        """Headers of the response, taken when the answer or its first piece is there."""


async def deliver(request: Request, answer: Deliverable, framing: Framing | None) -> Response:
    """The response, as a stream where there is a framing. Errors before the first piece are raised."""
    if framing is not None:
        return await cancel_on_disconnect(request.receive, start_events(answer.events(), answer.headers, framing))
    content = await cancel_on_disconnect(request.receive, answer.whole())
    return WholeAnswer(content, headers=answer.headers(), media_type="application/json")


@contextmanager
def naming_param(engine_name: str, field: str) -> Iterator[None]:
    """Let a refusal of the engine name the field of the body that it came from."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param == engine_name:
            error.param = field
        raise


@contextmanager
def naming_unfit(field: str) -> Iterator[None]:
    """Let a shape that has no answer as short as asked for be a refusal of this field."""
    try:
        yield
    except ShapeError as error:
        raise InvalidRequestError(field + str(error).removeprefix(SHAPE.strip()), param=field) from error
