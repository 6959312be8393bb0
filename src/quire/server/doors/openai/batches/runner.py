"""A batch under way.

::

    lines of the input file --> [slots] --> output file (answers)  \\  one part a line, numbered as in the input:
                                        --> error file (refusals)  /  written once, whatever is done twice

A line is done when its result is in the store. After a restart the lines without one are asked again; the others are
not. Both files are parts under an id that is no file's yet, until the batch ends.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec

from quire.engine.queue import Caller
from quire.errors import EngineDeadError, OverloadedError
from quire.server.doors.openai.batches.files import BATCH_OUTPUT, PARTS_READ, file_object
from quire.server.doors.openai.batches.lines import LineReader, Result, refusal_of
from quire.server.http.context import ServerContext
from quire.server.http.errors import ApiError, as_api_error
from quire.server.http.jobs import RESUMABLE
from quire.server.http.stored import RETRY_SECONDS, AddParts, Change, Part, Put, Stored, store_of

KIND = "batch"
OUTPUT, ERRORS = "output", "error"
COUNTED_SECONDS = 1.0
"""How often the counts of a batch are written."""
_EXPIRED = ApiError(408, "the batch ended before this line was asked", code="batch_expired")

logger = logging.getLogger("quire.server")

T = TypeVar("T")


def job_name(batch: Stored) -> str:
    """Of the job that runs a batch."""
    return f"{RESUMABLE}batch {batch.owner}/{batch.id}"


class Runner:
    """Runs one batch to its end. While it does, it alone writes the batch."""

    def __init__(self, context: ServerContext, batch: Stored, error_body: Callable[[ApiError], object]) -> None:
        self._context, self._store, self._batch = context, store_of(context.store), batch
        caller = Caller(batch.owner, context.weights.get(batch.owner, 1))
        self._reader = LineReader(context, caller, batch.body["endpoint"], error_body)
        self._done: dict[str, dict[int, int]] = {OUTPUT: {}, ERRORS: {}}
        """Sizes of the lines of both files, by number."""
        self._knows_done = False
        self._counted_s = 0.0

    @property
    def batch(self) -> Stored:
        """As it is now."""
        return replace(self._batch, body=self._counts())

    async def work(self) -> None:
        """Run it."""
        with suppress(EngineDeadError, OverloadedError):  # the server stops: it goes on after the next start
            await self._find_done()
            if await self._validate() is None:
                return
            begun = self._batch.body["in_progress_at"] or _now()
            await self._write(self._changed(status="in_progress", in_progress_at=begun))
            await self._run_lines()
            is_late = _now() >= self._batch.body["expires_at"]
            await self.finish("expired" if is_late else "completed")

    async def finish(self, status: str) -> None:
        """End it: its files are there from now on. Until the store has that, it has not ended."""
        await self._find_done()
        stamp = {f"{status}_at": _now(), "status": status}
        changes: list[Change] = []
        for place, sizes in self._done.items():
            if sizes:
                filename, size = f"{self._batch.id}_{place}.jsonl", sum(sizes.values())
                changes.append(Put(file_object(self._batch.owner, self._file(place), filename, BATCH_OUTPUT, size)))
                stamp[f"{place}_file_id"] = self._file(place)
        ended = replace(self._batch, body={**self._counts(), **stamp}, is_open=False)
        await self._write(*changes, Put(ended))
        self._batch = ended

    async def _find_done(self) -> None:
        """What was answered before the server last stopped."""
        if not self._knows_done:
            for place, sizes in self._done.items():
                sizes.update(await self._patiently(partial(self._store.sizes, self._file(place))))
            self._knows_done = True

    def _file(self, place: str) -> str:
        return f"file-{self._batch.id.removeprefix('batch_')}-{place}"

    async def _validate(self) -> int | None:
        """How many lines there are; None: the batch has failed."""
        limit, total = self._context.limits.batch_lines, 0
        async for _ in self._lines():
            total += 1
        text = f"the file has {total:,} lines; {limit.value:,} are allowed" if total > limit.value else ""
        text = text or ("" if total else "the file has no lines")
        if text:
            error = {
                "code": limit.code if total else "empty_file",
                "message": text,
                "param": "input_file_id",
                "line": None,
            }
            self._batch = self._changed(errors={"object": "list", "data": [error]}).item
            await self.finish("failed")
            return None
        self._batch = self._changed(request_counts={"total": total, "completed": 0, "failed": 0}).item
        return total

    async def _run_lines(self) -> None:
        tasks = set[asyncio.Task[None]]()
        try:
            async for number, line in self._lines():
                is_done = number in self._done[OUTPUT] or number in self._done[ERRORS]
                found = await self._context.models.beside(partial(self._read, line), len(line))
                if is_done:
                    continue
                slots = self._slots(found)
                await slots.acquire()
                task = asyncio.create_task(self._answer(number, found))
                task.add_done_callback(partial(_release, slots))
                tasks.add(task)
                ended = {task for task in tasks if task.done()}
                tasks -= ended
                for task in ended:
                    task.result()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _slots(self, line: Any) -> asyncio.Semaphore:
        """Of the batches of its owner that ask the same model: one that is not there holds up no other."""
        name = "" if isinstance(line, Result) else line.body.get("model")
        is_known = isinstance(name, str) and name in self._context.accepted_names
        return self._context.jobs.slots(f"{self._batch.owner}/{name if is_known else ''}")

    def _read(self, line: bytes) -> Any:
        """What a line asks, or the result that refuses it. Lines that are done are read too, for their names."""
        try:
            return self._reader.read(line)
        except Exception as error:  # noqa: BLE001 -- a malformed line fails alone
            with suppress(msgspec.DecodeError, AttributeError):
                named = msgspec.json.decode(line).get("custom_id")
                return refusal_of(named if isinstance(named, str) else None, as_api_error(error))
            return refusal_of(None, as_api_error(error))

    async def _answer(self, number: int, line: Any) -> None:
        if not self._context.gate.is_open:
            raise OverloadedError("the server is stopping", retry_after_s=1)
        if isinstance(line, Result):
            result = line
        elif _now() >= self._batch.body["expires_at"]:
            result = refusal_of(line.custom_id, _EXPIRED)
        else:
            result = await self._reader.answer(line)
        await self._keep(number, result)

    async def _keep(self, number: int, result: Result) -> None:
        place = OUTPUT if result.is_good else ERRORS
        changes: list[Change] = [AddParts(self._file(place), self._batch.owner, [Part(number, result.content)])]
        counted_s = time.monotonic()
        if counted_s - self._counted_s > COUNTED_SECONDS:
            self._counted_s = counted_s
            changes.append(self._changed())
        await self._write(*changes)
        self._done[place][number] = len(result.content)
        self._context.counts.count_line(is_good=result.is_good)

    async def _write(self, *changes: Change) -> None:
        """Make the changes, when the store takes them again."""
        await self._patiently(partial(self._store.write, *changes))

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """What the store gives, when it can be used again."""
        while True:
            try:
                return await work()
            except ApiError as error:
                if not self._context.gate.is_open:
                    raise OverloadedError("the server is stopping", retry_after_s=1) from error
                logger.warning("a batch waits for the store: %s", error.message)
                await asyncio.sleep(RETRY_SECONDS)

    def _counts(self) -> dict[str, Any]:
        total = self._batch.body["request_counts"]["total"]
        counts = {"total": total, "completed": len(self._done[OUTPUT]), "failed": len(self._done[ERRORS])}
        return {**self._batch.body, "request_counts": counts}

    def _changed(self, **fields: Any) -> Put:
        self._batch = replace(self._batch, body={**self._counts(), **fields})
        return Put(self._batch)

    async def _lines(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """Lines that are not empty, numbered from 0, all of them counted."""
        rest, number, start, name = bytearray(), 0, 0, self._batch.body["input_file_id"]
        while parts := await self._patiently(partial(self._store.parts, name, start=start, limit=PARTS_READ)):
            for part in parts:
                split = partial(_split, rest, part.content)
                found, rest, count = await self._context.models.beside(split, len(part.content))
                for place, line in found:
                    yield number + place, line
                number += count
            start += len(parts)
        if rest.strip():
            yield number, bytes(rest)


def _release(slots: asyncio.Semaphore, task: "asyncio.Task[None]") -> None:
    slots.release()


def _split(rest: bytearray, piece: bytes) -> tuple[list[tuple[int, bytes]], bytearray, int]:
    """The lines that end in a piece, with their places among them, but for empty ones; what begins in it; how many.

    Args:
        rest: of the pieces before, which is added to: a line of many pieces is not copied with each.
    """
    head, *lines = piece.split(b"\n")
    rest += head
    if not lines:
        return [], rest, 0
    whole = [bytes(rest), *lines[:-1]]
    return [(place, line) for place, line in enumerate(whole) if line.strip()], bytearray(lines[-1]), len(whole)


def _now() -> int:
    return int(time.time())
