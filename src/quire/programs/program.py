"""`program`: a function of Python that asks a model several times, run once or over many inputs at once."""

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any, TypeVar

from quire.errors import InvalidRequestError
from quire.programs.session import Engine, Session, opened
from quire.programs.state import State

CONCURRENCY = 64
"""Programs, and requests of them, at a time."""
MAX_CONCURRENCY = 1024
SEEDS = (-(2**63), 2**63 - 1)
T = TypeVar("T")
OWN_NAMES = ("engine", "seed", "concurrency", "chat_template_kwargs")


class Program:
    """A function whose first argument is a `State`. Called with one it is that function: programs call one another.

    Raises:
        InvalidRequestError: a parameter has the name of one of `run`'s own.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        names = [*inspect.signature(function).parameters]
        if not names:
            raise InvalidRequestError("a program's function needs a parameter for its state", param="program")
        for name in OWN_NAMES:
            if name in names:
                raise InvalidRequestError(f"a program may not have a parameter {name!r}: run has one", param=name)
        if inspect.iscoroutinefunction(function):
            raise InvalidRequestError("a program is a plain function; arun awaits it", param="program")
        self.function = function
        update_wrapper(self, function)

    def __call__(self, state: State, *args: Any, **values: Any) -> Any:
        return self.function(state, *args, **values)

    def run(
        self,
        engine: Engine,
        *args: Any,
        seed: int = 0,
        concurrency: int = CONCURRENCY,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> State:
        """Run it once, and wait for all its calls.

        Args:
            engine: an `LLM`, an `AsyncLLM`, the URL of a server, or a `Remote`.
            args: the function's own, after the state. So are `values`.
            seed: of the calls that are given none: the same seed and arguments give the same state.
            concurrency: requests at a time, 64 unless told.
            chat_template_kwargs: further variables of the chat template, such as `enable_thinking`.

        Raises:
            QuireError: a call failed; a `ProgramError` names its variable.
            Exception: the function raised it.
        """
        return self._run(_Run(engine, seed, concurrency, chat_template_kwargs), args, values)

    def run_batch(
        self,
        engine: Engine,
        inputs: Iterable[Mapping[str, Any]],
        *,
        seed: int = 0,
        concurrency: int = CONCURRENCY,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[State]:
        """Run it for each of many inputs; states in their order. What fails is in `error` of its state, and raised
        where its variables are read: it disturbs no other.

        Args:
            engine: as for `run`. So is `chat_template_kwargs`.
            inputs: the function's arguments, by name.
            seed: the same for each, so that each state is that of `run`.
            concurrency: programs at a time, and requests, 64 unless told.

        Raises:
            InvalidRequestError: an input is no mapping; then nothing was run.
        """
        return self._run_batch(_Run(engine, seed, concurrency, chat_template_kwargs), inputs)

    async def arun(
        self,
        engine: Engine,
        *args: Any,
        seed: int = 0,
        concurrency: int = CONCURRENCY,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> State:
        """`run`, awaited: the event loop goes on. Cancelled, it aborts the program's requests."""
        run = _Run(engine, seed, concurrency, chat_template_kwargs)
        return await run.awaited(partial(self._run, run, args, values))

    async def arun_batch(
        self,
        engine: Engine,
        inputs: Iterable[Mapping[str, Any]],
        *,
        seed: int = 0,
        concurrency: int = CONCURRENCY,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[State]:
        """`run_batch`, awaited: the event loop goes on. Cancelled, it aborts the programs' requests."""
        run = _Run(engine, seed, concurrency, chat_template_kwargs)
        return await run.awaited(partial(self._run_batch, run, inputs))

    def _run(self, run: "_Run", args: Sequence[Any], values: Mapping[str, Any]) -> State:
        with run.opened() as session:
            state = State(session, str(run.seed))
            state.returned = self.function(state, *args, **values)
            state.wait()
            if state.error is not None:
                raise state.error
            return state

    def _run_batch(self, run: "_Run", inputs: Iterable[Any]) -> list[State]:
        given = list(inputs)
        for place, values in enumerate(given):
            if not isinstance(values, Mapping):
                text = f"inputs[{place}] must map names to values, got {type(values).__name__}"
                raise InvalidRequestError(text, param="inputs")
        num_threads = min(run.concurrency, len(given)) or 1
        with run.opened() as session, ThreadPoolExecutor(num_threads, "quire-program") as pool:
            try:
                begin = [partial(self._run_one, session, str(run.seed), values) for values in given]
                runs = [pool.submit(contextvars.copy_context().run, one) for one in begin]
                return [run.result() for run in runs]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                session.close()
                raise

    def _run_one(self, session: Session, seed: str, values: Mapping[str, Any]) -> State:
        state = State(session, seed)
        try:
            state.returned = self.function(state, **values)
        except Exception as error:  # noqa: BLE001 -- raised where the state is read
            state.failure = error
        state.wait()
        return state


def program(function: Callable[..., Any]) -> Program:
    """Make a program of a function: `@quire.program def qa(s, question): ...`; then `qa.run(llm, "Why?")`.

    Raises:
        InvalidRequestError: a parameter has the name of one of `run`'s own.
    """
    return Program(function)


class _Run:
    """How programs are run. It can be stopped, whether it has begun or not."""

    def __init__(
        self, engine: Engine, seed: int, concurrency: int, chat_template_kwargs: Mapping[str, Any] | None
    ) -> None:
        for name, value, least, most in (("concurrency", concurrency, 1, MAX_CONCURRENCY), ("seed", seed, *SEEDS)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                text = f"{name} must be a whole number from {least} to {most}, got {value!r:.40}"
                raise InvalidRequestError(text, param=name)
        self.seed, self.concurrency = seed, concurrency
        self._engine = engine
        self._chat_template_kwargs = chat_template_kwargs
        self._session: Session | None = None
        self._is_stopped = False

    @contextmanager
    def opened(self) -> Iterator[Session]:
        """Its session."""
        with opened(self._engine, self.concurrency, self._chat_template_kwargs) as session:
            self._session = session
            if self._is_stopped:
                session.close()
            yield session

    async def awaited(self, run: Callable[[], T]) -> T:
        """What it brings, computed in a thread."""
        try:
            return await asyncio.to_thread(run)
        except asyncio.CancelledError:
            self._is_stopped = True
            if self._session is not None:
                await asyncio.to_thread(self._session.close)
            raise
