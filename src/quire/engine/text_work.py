"""Work on texts beside the event loop: tokenising, chat templates, detokenising, writing large answers.

::

    short   caller a: [ ] [ ]      --->  a thread for short work
            caller b: [ ]           \\
    long    caller a: [   ] [   ]  --->  a thread for long work, and for short work while there is none

Callers take turns, one piece each: what one of them sends many times makes the others wait for one piece of it, and
what is long keeps nothing that is short waiting.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from quire.engine.queue import ANYBODY, Caller
from quire.errors import EngineDeadError, RequestFailedError, internal_fault_message

LONG_CHARACTERS = 2**16
"""Work on more than this is long."""

logger = logging.getLogger("quire.engine")

T = TypeVar("T")


class _Job(NamedTuple):
    function: Callable[[], Any]
    future: "Future[Any]"


class _Lane:
    """What waits, by caller; the first caller is the next."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Job]] = {}

    def put(self, caller: str, job: _Job, *, first: bool) -> None:
        jobs = self._waiting.setdefault(caller, deque())
        jobs.appendleft(job) if first else jobs.append(job)

    def take(self) -> _Job | None:
        """The first job of the next caller, who then is the last."""
        if not self._waiting:
            return None
        caller = next(iter(self._waiting))
        jobs = self._waiting.pop(caller)
        job = jobs.popleft()
        if jobs:
            self._waiting[caller] = jobs
        return job


class TextWork:
    """Threads that callers share fairly.

    Args:
        tells_long: two threads, as above; False: one for everything.
    """

    def __init__(self, *, tells_long: bool = True) -> None:
        self._changed = threading.Condition()
        self._short = _Lane()
        self._long = _Lane() if tells_long else self._short
        self._is_closed = False
        threads = {"short": (self._short,), "long": (self._long, self._short)}
        for name in threads if tells_long else ("long",):
            threading.Thread(target=self._serve, args=threads[name], name=f"quire-text-{name}", daemon=True).start()

    async def run(self, function: Callable[[], T], size: int, caller: Caller = ANYBODY, *, first: bool = False) -> T:
        """The result of `function`, called in one of the threads. A caller that no longer waits takes it back.

        Args:
            size: characters, or tokens, that it works on.
            first: before the caller's other work: it gives back the memory of work that was done already.

        Raises:
            EngineDeadError: there will be no result, after `close`.
            RequestFailedError: it ended with what is no `Exception`, such as a panic in a library.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                raise EngineDeadError("the engine has stopped")
            lane = self._long if size > LONG_CHARACTERS else self._short
            lane.put(caller.name or caller.network, _Job(function, future), first=first)
            self._changed.notify_all()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads after the work that they are at. What waits fails. Calling it again does nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            waiting = [job for lane in (self._short, self._long) for job in iter(lane.take, None)]
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(EngineDeadError("the engine has stopped"))

    def _serve(self, *lanes: _Lane) -> None:
        while (job := self._next(lanes)) is not None:
            if job.future.set_running_or_notify_cancel():
                _run(job)
            del job  # its texts are not kept until the next one comes

    def _next(self, lanes: tuple[_Lane, ...]) -> _Job | None:
        """A job, waited for; None once there is none and will be none."""
        with self._changed:
            while True:
                for lane in lanes:
                    if (job := lane.take()) is not None:
                        return job
                if self._is_closed:
                    return None
                self._changed.wait()


def _run(job: _Job) -> None:
    try:
        result = job.function()
    except Exception as error:  # noqa: BLE001 -- raised where the work was asked for
        job.future.set_exception(error)
    except BaseException as error:  # noqa: BLE001 -- a panic of a native library, which handlers would let pass
        logger.error("work on a text failed: %s", type(error).__name__)
        job.future.set_exception(RequestFailedError(internal_fault_message(error)))
    else:
        job.future.set_result(result)
