"""A core in a process of its own dies, hangs, dies of a request, dies again and again: what its clients see of it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from quire.config import EngineArgs
from quire.engine.async_engine import AsyncEngine
from quire.engine.channel import CoreHealth
from quire.engine.engine import Engine
from quire.engine.front import ServedEngine
from quire.engine.inputs import InputProcessor, RequestLimits
from quire.engine.queue import QueueBound, QueueConfig
from quire.errors import EngineDeadError, ModelFileError, OverloadedError
from quire.isolation import breaker
from quire.isolation.core_process import CoreExitedError, CoreProcess
from quire.isolation.supervisor import SupervisedChannel
from quire.isolation.wire import Ready, Start
from quire.outputs import Decision, RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams
from tests.conftest import PATIENCE_S
from tests.isolation.fake_core import (
    CRASHES_LATE,
    DIES,
    DIES_ONCE,
    HANGS_ONCE,
    IS_KILLED_LATE,
    LATE_TOKENS,
    SPINS_ONCE,
    STOPS_LATE_ONCE,
)

ROOT = Path(__file__).parents[2]
CORE = "tests.isolation.fake_core"
PARAMS = SamplingParams(
    max_tokens=60, temperature=1.0, seed=3, logprobs=0, detokenize=False, output_kind=RequestOutputKind.DELTA
)


@dataclass
class Apart:
    """An engine whose core is in another process."""

    engine: AsyncEngine
    channel: SupervisedChannel
    num_seen: int = 0
    """Tokens of all streams so far."""

    @property
    def pid(self) -> int:
        assert self.channel.pid is not None
        return self.channel.pid

    async def answer(self, prompt: list[int], **changes: Any) -> tuple[list[int], list[Any], str | None]:
        """Tokens, log-probabilities and the end of one stream, put together."""
        parts = []
        async for item in self.stream(prompt, **changes):
            parts.append(item.outputs[0])
            self.num_seen += len(parts[-1].token_ids)
        tokens = [token for part in parts for token in part.token_ids]
        return tokens, [item for part in parts for item in part.logprobs or []], parts[-1].finish_reason

    def stream(self, prompt: list[int], **changes: Any) -> AsyncIterator[RequestOutput]:
        return self.engine.generate({"prompt_token_ids": prompt}, replace(PARAMS, **changes))

    async def answers(self, prompts: list[list[int]], **changes: Any) -> list[Any]:
        return await asyncio.gather(*self.begin(prompts, **changes))

    def begin(self, prompts: list[list[int]], **changes: Any) -> list["asyncio.Future[Any]"]:
        return [asyncio.ensure_future(self.answer(prompt, **changes)) for prompt in prompts]

    async def until(self, condition: Callable[[], bool]) -> None:
        start_s = time.monotonic()
        while not condition():
            assert time.monotonic() - start_s < PATIENCE_S, "it did not happen"
            await asyncio.sleep(0.002)

    async def until_seen(self, count: int) -> None:
        """So many more tokens have come."""
        before = self.num_seen
        await self.until(lambda: self.num_seen >= before + count)

    async def kill_next(self, old: int | None, how: int = signal.SIGKILL) -> int:
        """Kill the core that comes after `old` as soon as it answers."""
        await self.until(lambda: self.channel.pid not in (None, old) and self.engine.is_ready)
        pid = self.pid
        os.kill(pid, how)
        return pid


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
async def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Apart]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    channel = SupervisedChannel(lambda _: CoreProcess(Start(EngineArgs(), str(tmp_path)), CORE))
    core = channel.wait_ready()
    limits = RequestLimits(core.max_model_len, core.vocab_size, (), 0, False)
    inputs = InputProcessor(None, limits)
    queue = QueueBound(QueueConfig(1024, 2**20, 256), time.monotonic)
    engine = AsyncEngine(ServedEngine(Engine(channel, None, queue), inputs, None, limits, [], {}, channel.close))
    pid = channel.pid
    found = Apart(engine, channel)
    yield found
    last = channel.pid
    await engine.shutdown()
    await found.until(lambda: not any(is_alive(item) for item in (pid, last) if item is not None))


def prompts(count: int) -> list[list[int]]:
    return [[number, *range(1, 9)] for number in range(10, 10 + count)]


async def test_a_core_stopped_before_its_first_step_is_replaced(apart: Apart) -> None:
    os.kill(apart.pid, signal.SIGSTOP)
    task = asyncio.ensure_future(apart.answer([1, 2]))
    await apart.until(lambda: not apart.engine.is_ready)
    assert (await task)[2] == "length" and apart.channel.health.num_hung == 1


async def test_a_killed_core_changes_no_stream(apart: Apart) -> None:
    undisturbed = await apart.answers(prompts(8), max_tokens=120)
    tasks = apart.begin(prompts(8), max_tokens=120)
    await apart.until_seen(8)
    old = await apart.kill_next(None)
    await apart.until(lambda: not apart.engine.is_ready)
    await apart.until(lambda: apart.engine.is_ready)
    assert await asyncio.gather(*tasks) == undisturbed
    assert apart.pid != old and not is_alive(old) and apart.engine.is_healthy


async def test_a_core_that_hangs_is_replaced(apart: Apart) -> None:
    """It stops of itself in the middle of a stream; the same prompt does not stop a core again."""
    tasks = apart.begin([*prompts(3), [STOPS_LATE_ONCE]])
    await apart.until(lambda: apart.channel.health.num_hung == 1)
    found = await asyncio.gather(*tasks)
    assert await apart.answers([*prompts(3), [STOPS_LATE_ONCE]]) == found
    assert [len(tokens) for tokens, _, _ in found] == [60] * 4 and apart.channel.health == CoreHealth("serving", 0, 1)


@pytest.mark.parametrize("harm", [HANGS_ONCE, SPINS_ONCE])
async def test_a_first_step_that_never_ends_is_a_hang_too(apart: Apart, tmp_path: Path, harm: int) -> None:
    tokens, _, reason = await apart.answer([harm, 1, 2])
    assert apart.channel.health == CoreHealth("serving", 0, 1)
    assert (tmp_path / "hung").exists() and len(tokens) == 60 and reason == "length"


async def test_a_request_that_killed_once_goes_on(apart: Apart, tmp_path: Path) -> None:
    tokens, logprobs, reason = await apart.answer([DIES_ONCE, 1, 2])
    assert (tmp_path / "died").exists() and len(tokens) == len(logprobs) == 60 and reason == "length"


async def test_one_bad_request_fails_alone(apart: Apart) -> None:
    undisturbed = await apart.answers(prompts(6), max_tokens=120)
    tasks = apart.begin(prompts(6), max_tokens=120)
    await apart.until_seen(6)
    bad = apart.begin([[DIES, number] for number in range(2)])
    assert await asyncio.gather(*tasks) == undisturbed
    assert [item[2] for item in await asyncio.gather(*bad)] == ["error", "error"]
    assert (await apart.answer([1, 2]))[2] == "length"


@pytest.mark.parametrize(("harm", "num_deaths"), [(CRASHES_LATE, 2), (IS_KILLED_LATE, 3)])
async def test_one_that_turns_bad_beside_sixteen_fails_alone(apart: Apart, harm: int, num_deaths: int) -> None:
    undisturbed = await apart.answers(prompts(16), max_tokens=150)
    tasks = apart.begin(prompts(16), max_tokens=150)  # so long that they still run when the last one does harm
    tokens, _, reason = await apart.answer([harm, 1, 2])
    assert (len(tokens), reason) == (LATE_TOKENS, "error")
    assert await asyncio.gather(*tasks) == undisturbed
    assert apart.channel.health == CoreHealth("serving", num_deaths, 0)


async def test_an_engine_that_kills_whatever_it_is_given_opens_the_breaker(apart: Apart) -> None:
    """However many requests the deaths could be attributed to, one after another."""
    tasks = apart.begin([[DIES, number] for number in range(12)])
    found = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [item for item in found if isinstance(item, OverloadedError)]
    assert len(refused) == 9 and all(item.retry_after_s >= 1 for item in refused)
    assert [item[2] for item in found if isinstance(item, tuple)] == ["error"] * 3


async def test_present_in_two_deaths_fails(apart: Apart) -> None:
    outputs = [item async for item in apart.stream([IS_KILLED_LATE, 2, 3])]
    assert outputs[-1].outputs[0].finish_reason == "error" and "more than once" in str(outputs[-1].error)
    assert sum(len(item.outputs[0].token_ids) for item in outputs) == LATE_TOKENS
    assert (await apart.answer([1, 2]))[2] == "length"
    assert apart.channel.health == CoreHealth("serving", 2, 0)


async def test_a_crash_loop_opens_the_breaker(apart: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_SECONDS", 1000.0)
    apart.channel._breaker.record_success()
    old = None
    for _ in range(breaker.MOST_DEATHS_IN_A_ROW - 1):
        old = await apart.kill_next(old, signal.SIGUSR1)
    waiting = asyncio.ensure_future(apart.answer([HANGS_ONCE, 2]))  # its end does not come first
    await apart.until((tmp_path / "hung").exists)
    os.kill(apart.pid, signal.SIGUSR1)
    with pytest.raises(OverloadedError) as caught:
        await waiting
    assert 1 <= caught.value.retry_after_s <= 1002
    with pytest.raises(OverloadedError):
        await apart.answer([1, 2])
    state, *deaths = apart.channel.health
    assert (state, sum(deaths)) == ("paused", breaker.MOST_DEATHS_IN_A_ROW)
    await apart.until(lambda: not apart.engine.has_work)
    assert apart.engine.is_healthy and not apart.engine.is_ready
    apart.channel._breaker.open_until_s = time.monotonic()
    apart.channel.wake()
    await apart.until(lambda: apart.engine.is_ready)
    assert (await apart.answer([1, 2]))[2] == "length"


async def test_three_kills_in_a_row_change_no_stream(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as soon as the core is there. The breaker opens; those present wait, newcomers do not."""
    undisturbed = await apart.answers(prompts(8), max_tokens=120)
    monkeypatch.setattr(breaker, "FIRST_PAUSE_SECONDS", 1000.0)
    apart.channel._breaker.record_success()
    tasks = apart.begin(prompts(8), max_tokens=120)
    await apart.until_seen(8)
    os.kill(apart.pid, signal.SIGSTOP)  # so that no token comes between the deaths
    await apart.until(lambda: apart.channel.health.num_hung == 1)
    seen: set[int] = set()
    while apart.channel._breaker.open_until_s is None:
        pid = apart.channel.pid
        if pid is not None and pid not in seen:
            seen.add(pid)
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    with pytest.raises(OverloadedError):
        await apart.answer([1, 2])
    apart.channel._breaker.open_until_s = time.monotonic()
    apart.channel.wake()
    assert await asyncio.gather(*tasks) == undisturbed


async def test_many_are_aborted_and_nothing_is_left(apart: Apart) -> None:
    tasks = apart.begin(prompts(24), max_tokens=400)
    await apart.until_seen(24)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await apart.until(lambda: not apart.engine.has_work)
    readings = apart.channel.gauges
    await apart.until(lambda: apart.channel.gauges.cache_usage == 0)
    assert readings.num_waiting == 0
    apart.engine.check()
    assert (await apart.answer([1, 2]))[2] == "length" and apart.engine.is_ready


async def test_a_breach_of_the_protocol_ends_the_core_and_no_request(apart: Apart) -> None:
    (task,) = apart.begin([[1, 2, 3]], max_tokens=120)
    await apart.until_seen(1)
    core = apart.channel._core
    assert core is not None
    core._connection.send(b"\xff\xff\xff\xff nonsense")
    await apart.until(lambda: apart.channel._core is not core)
    assert (await task)[2] == "length"


@pytest.mark.parametrize(("model", "error"), [("missing", ModelFileError), ("dies", EngineDeadError)])
def test_a_core_that_cannot_start_is_told(
    model: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    channel = SupervisedChannel(lambda _: CoreProcess(Start(EngineArgs(model=model), str(tmp_path)), CORE))
    try:
        with pytest.raises(error, match=r"no such model|exit status 5"):
            channel.wait_ready()
    finally:
        channel.close()


def test_a_core_whose_model_changed_is_refused(apart: Apart) -> None:
    assert apart.channel._info is not None
    apart.channel._info = replace(apart.channel._info, model_fingerprint="another")
    with pytest.raises(CoreExitedError, match="changed"):
        apart.channel._take(Ready(replace(apart.channel._info, model_fingerprint="fingerprint")), [])
    with pytest.raises(CoreExitedError, match="changed"):
        apart.channel._take(Ready(replace(apart.channel._info, max_model_len=8)), [])
    with pytest.raises(CoreExitedError, match="changed"):
        apart.channel._take(Ready(replace(apart.channel._info, vocab_size=apart.channel._info.vocab_size + 1)), [])
    more = replace(apart.channel._info, max_model_len=8192, decisions=(Decision("num_blocks", "9", "measured anew"),))
    apart.channel._take(Ready(more), [])  # a device's free memory is never twice the same


def test_a_core_outlives_the_thread_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's word for "the parent died" is the end of the thread that made the process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found: list[SupervisedChannel] = []

    def start() -> None:
        found.append(SupervisedChannel(lambda _: CoreProcess(Start(EngineArgs(), "."), CORE)))
        found[0].wait_ready()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(PATIENCE_S)
    (channel,) = found
    try:
        end_s = time.monotonic() + 0.5
        while time.monotonic() < end_s:  # the kernel needs no more than a moment
            assert channel.pid is not None and is_alive(channel.pid)
            time.sleep(0.01)
        assert channel.collect() == [] and channel.health.num_died == 0
    finally:
        channel.close()


async def test_a_fault_on_this_side_changes_no_stream_either(apart: Apart) -> None:
    """Outputs that had come and were lost with it are computed again."""
    undisturbed = await apart.answers([[10, *range(40)], *prompts(4)], max_tokens=80, prompt_logprobs=0)
    tasks = apart.begin([[10, *range(40)], *prompts(4)], max_tokens=80, prompt_logprobs=0)
    await apart.until_seen(20)
    old, collect = apart.pid, apart.channel.collect

    def broken() -> Any:
        outputs = collect()
        if outputs:
            apart.channel.collect = collect  # type: ignore[method-assign]
            raise BufferError("it broke")
        return outputs

    apart.channel.collect = broken  # type: ignore[method-assign]
    assert await asyncio.gather(*tasks) == undisturbed
    assert apart.pid != old and not is_alive(old) and apart.engine.is_healthy


OWNER = """
import os, signal, sys, time
from functools import partial
from quire.config import EngineArgs
from quire.isolation.core_process import CoreProcess
from quire.isolation.supervisor import SupervisedChannel
from quire.isolation.wire import Start
channel = SupervisedChannel(lambda _: CoreProcess(Start(EngineArgs(), "."), "tests.isolation.fake_core"))
channel.wait_ready()
print(channel.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "stopped",
    [False, pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help"))],
)
def test_killing_the_owner_leaves_no_process(stopped: bool) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert is_alive(pid)
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    end_s = time.monotonic() + PATIENCE_S
    while is_alive(pid) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not is_alive(pid)
