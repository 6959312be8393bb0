"""The engine in a thread beside the loop: what is posted, in which thread it is done, and that no caller hangs."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from quire.core.plan import TokenDelta
from quire.core.request import NewRequest
from quire.engine.async_engine import INLINE_CHARACTERS, AsyncEngine
from quire.engine.queue import Caller
from quire.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from tests.conftest import PATIENCE_S
from tests.engine.scripted import PARAMS, Scripted, final


class Served(Scripted):
    """The engine under test, and its core by script."""

    def __init__(self) -> None:
        super().__init__()
        self.under_test: AsyncEngine = self.beside_a_loop()

    def ask(self, *prompt: int, **options: Any) -> AsyncIterator[Any]:
        return self.under_test.generate(list(prompt or (1, 2, 3)), PARAMS, **options)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def until_added(self, *request_ids: str) -> None:
        await self.until(lambda: set(request_ids) <= set(self.channel.added) and not self.under_test._commands)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    found = Served()
    yield found
    await found.under_test.shutdown()
    assert found.channel.num_closed == 1
    assert not found.under_test._streams and not found.under_test._commands


async def test_a_stream_gives_what_the_core_gave_and_leaves_nothing(served: Served) -> None:
    task = asyncio.ensure_future(_all(served.ask()))
    await served.until_added("0")
    served.channel.give(TokenDelta("0", (5,)))
    served.channel.give(final("0", 6, 7))
    assert [output.outputs[0].token_ids for output in await task] in ([[5], [6, 7]], [[5, 6, 7]])
    assert served.channel.aborted == [], "what has ended is not aborted"
    assert not served.under_test._streams and not served.under_test.has_work


@pytest.mark.parametrize("way", ["closed", "cancelled"])
async def test_a_reader_that_leaves_aborts_its_request_and_frees_its_place(served: Served, way: str) -> None:
    stream = served.ask()
    first = asyncio.ensure_future(anext(stream))
    await served.until_added("0")
    assert served.queue.num_waiting == 1
    if way == "closed":
        served.channel.give(TokenDelta("0", (5,)))
        await first
        await stream.aclose()
    else:
        first.cancel()
        await asyncio.wait([first])
    await served.until(lambda: served.channel.aborted == ["0"])
    assert served.queue.num_waiting == 0
    await served.until(lambda: not served.under_test.has_work)
    assert not served.under_test._streams


async def test_a_request_that_has_not_reached_the_core_leaves_its_place_at_once(served: Served) -> None:
    """The engine's thread is in a step meanwhile: nothing that is posted is seen."""
    held = _hold(served)
    task = asyncio.ensure_future(_all(served.ask()))
    await served.until(lambda: served.queue.num_waiting == 1)
    task.cancel()
    await asyncio.wait([task])
    assert served.queue.num_waiting == 0 and served.channel.added == []
    assert served.under_test.has_work, "it is still posted"
    held.set()
    await served.until(lambda: not served.under_test.has_work)
    assert served.channel.added == served.channel.aborted == ["0"]


async def test_a_deadline_ends_the_wait_and_the_request(served: Served) -> None:
    with pytest.raises(DeadlineExceededError, match=r"0\.01 s"):
        await _all(served.ask(timeout_s=0.01))
    await served.until(lambda: served.channel.aborted == ["0"])
    task = asyncio.ensure_future(_all(served.ask(timeout_s=10 * PATIENCE_S)))
    await served.until_added("1")
    served.channel.give(final("1", 5))
    assert (await task)[-1].finished, "what comes before it is read"


async def test_what_the_queue_refuses_is_never_posted(served: Served) -> None:
    tasks = [asyncio.ensure_future(_all(served.ask())) for _ in range(12)]
    await served.until(lambda: served.queue.num_waiting == 12)
    with pytest.raises(OverloadedError):
        await _all(served.ask())
    served.under_test.expect_callers({"a": 1, "b": 1})
    with pytest.raises(OverloadedError):
        served.under_test.check_room(Caller("a"))
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await served.until(lambda: not served.under_test.has_work)
    assert len(served.channel.added) == 12 and served.queue.num_waiting == 0


async def test_a_request_that_the_core_takes_in_part_is_taken_back_whole(served: Served) -> None:
    served.channel.raises["0.2"] = RuntimeError("secret")
    with pytest.raises(RequestFailedError) as caught:
        await _all(served.under_test.generate([1, 2], _params(n=3)))
    assert "RuntimeError" in str(caught.value) and "secret" not in str(caught.value)
    assert served.channel.added == ["0.0", "0.1"] == served.channel.aborted
    served.channel.raises["1"] = OverloadedError("gone", retry_after_s=3)
    with pytest.raises(OverloadedError):
        await _all(served.ask())
    await served.until(lambda: not served.under_test.has_work)
    assert served.under_test.is_healthy and served.queue.num_waiting == 0


async def test_a_core_that_is_gone_for_now_ends_every_stream_and_the_next_is_served(served: Served) -> None:
    tasks = [asyncio.ensure_future(_all(served.ask())) for _ in range(3)]
    await served.until_added("0", "1", "2")
    served.channel.raises["collect"] = OverloadedError("gone", retry_after_s=3)
    served.channel.wake()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(item) for item in found] == [OverloadedError] * 3
    assert served.channel.aborted == [], "the engine's word was its last"
    task = asyncio.ensure_future(_all(served.ask()))
    await served.until_added("3")
    served.channel.give(final("3", 5))
    assert (await task)[-1].finished and served.under_test.is_healthy


async def test_after_a_fault_of_the_thread_requests_go_on_where_they_were(served: Served) -> None:
    """What ran, and what was only posted behind the command that failed; the one that left is gone."""
    running, leaving = (asyncio.ensure_future(_all(served.ask())) for _ in range(2))
    await served.until_added("0", "1")
    served.channel.give(TokenDelta("0", (5,)))
    held = _hold(served)
    leaving.cancel()
    await asyncio.wait([leaving])
    posted = asyncio.ensure_future(_all(served.ask()))
    await served.until(lambda: len(served.under_test._commands) == 2)
    served.channel.raises["abort"] = RuntimeError("it broke")
    served.channel.news.clear()
    held.set()
    await served.until_added("2")
    assert [(new.request_id, new.resume.output_token_ids) for new in served.channel.news] == [("0", (5,)), ("2", ())]
    served.channel.give(final("0", 6), final("2", 7))
    found = [[output.outputs[0].token_ids for output in await task] for task in (running, posted)]
    assert found == [[[5], [6]], [[7]]] or found == [[[5, 6]], [[7]]]
    assert served.under_test.is_healthy and not served.under_test.has_work and served.queue.num_waiting == 0
    assert served.channel.num_cleared == 1


async def test_one_that_breaks_the_thread_again_and_again_fails_alone(served: Served) -> None:
    bad = asyncio.ensure_future(_all(served.ask()))
    await served.until_added("0")
    for count in range(1, 4):
        served.channel.raises["collect"] = RuntimeError("it broke")
        served.channel.wake()
        await served.until(lambda count=count: served.channel.num_cleared == count)
    outputs = await bad
    assert outputs[-1].finished and outputs[-1].error is not None
    task = asyncio.ensure_future(_all(served.ask()))
    await served.until_added("1")
    served.channel.give(final("1", 5))
    assert (await task)[-1].error is None and served.under_test.is_healthy


async def test_a_fault_that_does_not_end_ends_all_that_wait_also_what_is_only_posted(served: Served) -> None:
    """Of what is posted, the command under way, those behind it in the same turn, and those that came later."""
    served.channel.clear = _always_broken  # type: ignore[method-assign]
    running = asyncio.ensure_future(_all(served.ask()))
    await served.until_added("0")
    held = _hold(served)
    leaving = asyncio.ensure_future(_all(served.ask()))
    await served.until(lambda: len(served.under_test._commands) == 1)
    leaving.cancel()
    await asyncio.wait([leaving])
    posted = [asyncio.ensure_future(_all(served.ask())) for _ in range(2)]
    check = asyncio.get_running_loop().run_in_executor(None, served.under_test.check)
    await served.until(lambda: len(served.under_test._commands) == 5)
    served.channel.raises["abort"] = RuntimeError("it broke")
    held.set()
    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(running, *posted, check, return_exceptions=True)
    assert [type(item) for item in found] == [EngineDeadError] * 4
    assert not served.under_test.is_healthy and not served.under_test.is_ready
    with pytest.raises(EngineDeadError):
        await _all(served.ask())
    with pytest.raises(EngineDeadError):
        served.under_test.check()
    assert served.queue.num_waiting == 0


async def test_a_request_is_work_also_while_the_core_is_given_it(served: Served) -> None:
    """Also one in whose adding the thread dies."""
    seen: list[bool] = []
    add = served.channel.add

    def watched(new: NewRequest) -> None:
        seen.append(served.under_test.has_work)
        add(new)

    served.channel.add = watched  # type: ignore[method-assign]
    served.channel.raises = {"0.1": RuntimeError("it broke"), "abort": RuntimeError("it broke again")}
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(RequestFailedError):
            await _all(served.under_test.generate([1, 2], _params(n=2)))
    await served.until(lambda: not served.under_test.has_work)
    assert seen == [True, True] and served.under_test.is_healthy


def test_a_loop_that_closes_takes_no_other_with_it() -> None:
    """Also one that closes between being asked and being called: the engine has its word only from `RuntimeError`."""
    served = Served()
    outcome: list[Any] = []

    async def begin() -> None:
        outcome.append(served.under_test.generate([1, 2], PARAMS))
        outcome.append(asyncio.ensure_future(anext(outcome[0])))
        await served.until_added("0")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.is_closed = lambda: False  # type: ignore[method-assign]
    loop._closed = True  # type: ignore[attr-defined]  # as it is in the middle of `close`
    try:

        async def other() -> list[Any]:
            task = asyncio.ensure_future(_all(served.ask()))
            await served.until_added("0", "1")
            served.channel.give(TokenDelta("0", (5,)), final("1", 6))
            return await task

        assert asyncio.run(other())[-1].finished
        assert served.under_test.is_healthy and served.channel.aborted == ["0"], "nobody reads it any more"
        assert not served.under_test.has_work
    finally:
        del loop.is_closed  # type: ignore[method-assign]
        loop._closed = False  # type: ignore[attr-defined]
        outcome[1].cancel()
        loop.run_until_complete(asyncio.gather(outcome[1], return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        served.under_test.close()


async def test_parameters_that_were_changed_are_checked_again(served: Served) -> None:
    params = _params()
    params.top_p = 7.0
    with pytest.raises(InvalidRequestError, match="top_p"):
        await _all(served.under_test.generate([1, 2], params))
    assert served.queue.num_waiting == 0


async def test_after_its_end_every_call_says_so() -> None:
    served = Served()
    await served.under_test.shutdown()
    for call in (served.ask().__anext__(), served.under_test.beside(lambda: 1, 10**6)):  # type: ignore[attr-defined]
        with pytest.raises(EngineDeadError):
            await call
    served.under_test.close()


async def test_after_the_order_to_stop_nothing_is_taken(served: Served) -> None:
    held = _hold(served)
    stopping = asyncio.ensure_future(served.under_test.shutdown())
    await served.until(lambda: served.under_test._stopping)
    refused = asyncio.ensure_future(_all(served.ask()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert refused.done() and isinstance(refused.exception(), EngineDeadError), "at once, and not when it has stopped"
    assert not served.under_test._commands
    held.set()
    await stopping
    assert served.channel.num_closed == 1
    await served.under_test.shutdown()


async def test_the_core_is_spoken_to_by_the_engines_thread_alone(served: Served) -> None:
    """A check too, from whatever thread it is asked for; and what it finds is raised there."""
    task = asyncio.ensure_future(_all(served.ask()))
    await served.until_added("0")
    served.channel.give(final("0", 5))
    await task
    served.under_test.check()
    served.channel.raises["check"] = AssertionError("an invariant")
    with pytest.raises(AssertionError, match="an invariant"):
        await asyncio.get_running_loop().run_in_executor(None, served.under_test.check)
    assert {name for name, _ in served.channel.threads} >= {"add", "check", "collect", "wait"}
    assert {thread.name for _, thread in served.channel.threads} == {"quire-engine"}
    assert served.under_test.is_healthy


async def test_a_prompt_that_is_refused_was_never_there(served: Served) -> None:
    with pytest.raises(InvalidRequestError):
        await _all(served.ask(*[1] * 64))
    assert served.queue.num_waiting == 0 and not served.under_test.has_work


async def _all(stream: Any) -> list[Any]:
    return [output async for output in stream]


def _params(**changes: Any) -> Any:
    return replace(PARAMS, **changes)


def _always_broken() -> None:
    raise RuntimeError("it broke, and stays so")


def _hold(served: Served) -> Any:
    """The engine's thread stays in a step until the event is set."""
    entered, go, collect = threading.Event(), threading.Event(), served.channel.collect

    def wait() -> Any:
        served.channel.collect = collect  # type: ignore[method-assign]
        entered.set()
        go.wait(PATIENCE_S)
        return collect()

    served.channel.collect = wait  # type: ignore[method-assign]
    served.channel.wake()
    assert entered.wait(PATIENCE_S)
    return go


async def test_what_is_long_is_worked_on_beside_the_loop(served: Served) -> None:
    """A short text takes less time than the hand-over to another thread."""
    engine = served.under_test
    threads = [await engine.beside(threading.current_thread, size) for size in (0, INLINE_CHARACTERS)]
    assert threads == [threading.current_thread()] * 2
    assert await engine.beside(threading.current_thread, INLINE_CHARACTERS + 1) is not threading.current_thread()
