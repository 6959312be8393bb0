"""Work on texts: callers take turns, what is long delays nothing short, and all of it ends."""

import asyncio
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from quire.engine.queue import Caller
from quire.engine.text_work import LONG_CHARACTERS, TextWork
from quire.errors import EngineDeadError, RequestFailedError
from tests.conftest import PATIENCE_S

LONG = LONG_CHARACTERS + 1


class Held:
    """Work that ends when it is let go."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        self.released.wait(PATIENCE_S)


@pytest.fixture
def work() -> Iterator[TextWork]:
    made = TextWork()
    yield made
    made.close()


async def hold(work: TextWork, size: int) -> tuple[Held, "asyncio.Task[None]"]:
    """One thread, busy until it is released."""
    held = Held()
    task = asyncio.ensure_future(work.run(held, size))
    assert await asyncio.to_thread(held.begun.wait, PATIENCE_S)
    return held, task


async def test_callers_take_turns(work: TextWork) -> None:
    """What one of them sends many times makes another wait for one piece of it."""
    (long, first), (short, second) = await hold(work, LONG), await hold(work, 1)
    done: list[str] = []
    tasks = [
        asyncio.ensure_future(work.run(partial(done.append, name), 1, Caller(name[0])))
        for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")
    ]
    await asyncio.sleep(0)
    short.released.set()
    await asyncio.gather(*tasks)
    long.released.set()
    await asyncio.gather(first, second)
    assert done == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_without_keys_networks_take_turns(work: TextWork) -> None:
    (long, first), (short, second) = await hold(work, LONG), await hold(work, 1)
    done: list[str] = []
    tasks = [
        asyncio.ensure_future(work.run(partial(done.append, name), 1, Caller(network=f"10.0.0.{name[0]}")))
        for name in ("1a", "1b", "1c", "2a")
    ]
    await asyncio.sleep(0)
    short.released.set()
    await asyncio.gather(*tasks)
    long.released.set()
    await asyncio.gather(first, second)
    assert done == ["1a", "2a", "1b", "1c"]


async def test_what_ends_a_request_goes_before_what_begins_one(work: TextWork) -> None:
    """Of one caller: what was tokenised is held until its answer is written. It does not jump the turn of others."""
    (long, first), (short, second) = await hold(work, LONG), await hold(work, 1)
    done: list[str] = []
    tasks = [
        asyncio.ensure_future(work.run(partial(done.append, name), 1, Caller(name[0]), first=name == "b3"))
        for name in ("a1", "b1", "b2", "b3")
    ]
    await asyncio.sleep(0)
    short.released.set()
    await asyncio.gather(*tasks)
    long.released.set()
    await asyncio.gather(first, second)
    assert done == ["a1", "b3", "b1", "b2"]


async def test_what_is_long_keeps_nothing_short_waiting(work: TextWork) -> None:
    held, task = await hold(work, LONG)
    waiting = asyncio.ensure_future(work.run(lambda: "long", LONG))
    assert await work.run(lambda: "short", LONG_CHARACTERS) == "short"
    assert not waiting.done()
    held.released.set()
    assert await waiting == "long"
    await task


async def test_both_threads_do_short_work(work: TextWork) -> None:
    (one, first), (two, second) = await hold(work, 1), await hold(work, 1)
    one.released.set()
    two.released.set()
    await asyncio.gather(first, second)


async def test_what_is_no_exception_fails_the_request_alone(work: TextWork) -> None:
    """A panic of a native library is a `BaseException`, and passes the handlers of exceptions."""

    class PanicError(BaseException):
        pass

    def panic() -> None:
        raise PanicError("private")

    with pytest.raises(RequestFailedError, match="PanicError") as caught:
        await work.run(panic, 1)
    assert "private" not in str(caught.value)
    with pytest.raises(ZeroDivisionError):
        await work.run(lambda: 1 // 0, 1)
    assert await work.run(lambda: "goes on", 1) == "goes on"


async def test_a_caller_that_has_left_costs_nothing(work: TextWork) -> None:
    (long, first), (short, second) = await hold(work, LONG), await hold(work, 1)
    done: list[str] = []
    left = asyncio.ensure_future(work.run(partial(done.append, "left"), 1))
    stays = asyncio.ensure_future(work.run(partial(done.append, "stays"), 1))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    long.released.set()
    short.released.set()
    await asyncio.gather(first, second, stays)
    assert done == ["stays"]


async def test_closing_fails_what_waits_and_what_comes() -> None:
    work = TextWork()
    (long, first), (short, second) = await hold(work, LONG), await hold(work, 1)
    waiting = [asyncio.ensure_future(work.run(lambda: None, size)) for size in (1, LONG)]
    await asyncio.sleep(0)
    work.close()
    work.close()
    for task in waiting:
        with pytest.raises(EngineDeadError):
            await task
    with pytest.raises(EngineDeadError):
        await work.run(lambda: None, 1)
    long.released.set()
    short.released.set()
    await asyncio.gather(first, second)
