"""Responses that are worked on without a connection. Any number of clients may follow one, from any of its events."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import msgspec

from quire.server.doors.openai.responses.answer import ResponseAnswer
from quire.server.doors.openai.responses.keep import RESPONSE, Keeper, closed
from quire.server.http.context import ServerContext
from quire.server.http.errors import ApiError, as_api_error
from quire.server.http.stored import Put, when_usable

STOPPED = {"code": "server_error", "message": "the server stopped before the response was complete"}
NOT_KEPT = {"code": "server_error", "message": "the response could not be stored"}

logger = logging.getLogger("quire.server")


def job_name(owner: str, name: str) -> str:
    """Of the job that works on a response."""
    return f"response {owner}/{name}"


class Run:
    """One response under way."""

    def __init__(self, answer: ResponseAnswer, keeper: Keeper, *, keeps_events: bool) -> None:
        self._answer, self._keeper, self.keeps_events = answer, keeper, keeps_events
        self._events: list[bytes] = []
        self._is_done = False
        self._changed = asyncio.Event()

    async def work(self) -> None:
        """Compute it, and keep it. Whatever happens, it is not left open: retrieving it says what went wrong."""
        failure = NOT_KEPT
        try:
            await self._compute()
        except Exception as error:  # noqa: BLE001 -- see above
            failure = {"code": "server_error", "message": as_api_error(error).message}
            logger.warning("a response in the background: %s", failure["message"])
        try:
            await self._close(failure)
        except ApiError:
            asyncio.get_running_loop().call_soon(self._end)  # those who read its events do not wait for the store
            await when_usable(partial(self._close, failure))
        finally:
            self._end()

    async def _close(self, failure: dict[str, str]) -> None:
        """Nothing, where it was kept as it ended."""
        await self._keeper.end(self._answer.id, status="failed", error=failure)

    def _end(self) -> None:
        self._is_done = True
        self._notify()

    async def _compute(self) -> None:
        async for event in self._answer.events():
            if self.keeps_events:
                self._events.append(msgspec.json.encode(event))
                self._notify()
        if self.keeps_events:
            await self._keeper.keep_events(self._answer.id, self._events)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def events(self, after: int) -> AsyncGenerator[Any, None]:
        """Events past number `after`, those to come too."""
        number = after + 1
        while True:
            changed, is_done = self._changed, self._is_done
            while number < len(self._events):
                yield msgspec.Raw(self._events[number])
                number += 1
            if is_done:
                return
            if changed is self._changed:
                await changed.wait()


class Following:
    """The events of a response, for a client."""

    def __init__(self, events: AsyncGenerator[Any, None], name: str) -> None:
        self._events, self._name = events, name

    async def whole(self) -> bytes:
        """Not asked for."""
        raise NotImplementedError

    def events(self) -> AsyncGenerator[Any, None]:
        """The rest."""
        return self._events

    def headers(self) -> dict[str, str]:
        """The id of the response."""
        return {"x-request-id": self._name}


async def end_what_was_open(context: ServerContext) -> None:
    """Say of responses that were worked on when the server stopped that they failed."""
    if context.store is None:
        return
    found_open, jobs = await context.store.list_open(RESPONSE), context.jobs
    for found in [item for item in found_open if job_name(item.owner, item.id) not in jobs]:
        await context.store.write(Put(closed(found, status="failed", error=STOPPED)))
