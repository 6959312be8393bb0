"""The event loop beside programs: it runs their calls, all those that are open at once."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from quire.engine.async_engine import AsyncEngine
from quire.errors import EngineDeadError, InvalidRequestError, OverloadedError
from quire.programs.backend import Backend, EngineBackend, LendsEngine
from quire.programs.remote import Remote, RemoteBackend

MOST_TRIES = 8
"""Of a call that finds the queue full, each after the time that the queue names."""

T = TypeVar("T")
Engine = AsyncEngine | LendsEngine | Remote | str
"""What programs run on: `AsyncLLM`, `LLM`, or a server, by its URL or as `Remote`."""


class Session:
    """Runs calls on an event loop in a thread of its own, until it is closed."""

    def __init__(self, backend: Backend, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.backend = backend
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="quire-programs", daemon=True)
        self._thread.start()

    def submit(self, call: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin a call.

        Raises:
            EngineDeadError: what ran the program has ended.
        """
        with self._lock:
            if not self._is_closed:
                return asyncio.run_coroutine_threadsafe(call, self._loop)
        call.close()
        raise EngineDeadError("the run that this state belongs to has ended")

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """What a call brings, which is made again where the queue was full."""
        for _ in range(MOST_TRIES - 1):
            try:
                return await call()
            except OverloadedError as error:
                await asyncio.sleep(error.retry_after_s)
        return await call()

    def close(self) -> None:
        """Drop the calls that are still open: their requests are aborted. Calling it again does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@contextmanager
def opened(engine: Any, concurrency: int, chat_template_kwargs: Mapping[str, Any] | None) -> Iterator[Session]:
    """A session over an `Engine`, which is closed at the end; the engine is not.

    Raises:
        InvalidRequestError: no such engine.
    """
    with ExitStack() as stack:
        backend: Backend
        if isinstance(engine, AsyncEngine):
            backend = EngineBackend(engine, concurrency)
        elif isinstance(engine, str | Remote):
            backend = RemoteBackend(Remote(engine) if isinstance(engine, str) else engine, concurrency)
            stack.callback(backend.close)
        elif isinstance(engine, LendsEngine):
            backend = EngineBackend(stack.enter_context(engine.lend()), concurrency)
        else:
            text = f"a program runs on an LLM, an AsyncLLM, a URL or a Remote, not on {type(engine).__name__}"
            raise InvalidRequestError(text, param="engine")
        session = Session(backend, chat_template_kwargs)
        stack.callback(session.close)
        yield session
