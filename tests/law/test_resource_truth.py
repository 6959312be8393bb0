"""Laws 3 and 4: after any mix of finish, abort and disconnect nothing is left over, and every request ended once."""

import asyncio
import os
import random
import threading
import time
from pathlib import Path

from quire import AsyncLLM, RequestOutputKind, SamplingParams
from quire.compose.served import compose
from quire.config import EngineArgs
from quire.errors import InvalidRequestError
from quire.outputs import RequestOutput
from tests.conftest import PATIENCE_S
from tests.law.monitor import OneFinalMonitor

NUM_REQUESTS = 2000


def _params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2]),
        max_tokens=rng.randint(1, 6),
        temperature=rng.choice([0.0, 1.0]),
        stop_token_ids=[rng.randrange(10, 250)],
        logprobs=rng.choice([None, None, 2]),
        presence_penalty=rng.choice([0.0, 0.5]),
        output_kind=rng.choice(list(RequestOutputKind)),
    )


def test_random_adds_and_aborts_leave_nothing(tiny_model: Path) -> None:
    rng, monitor = random.Random(1), OneFinalMonitor()
    served = compose(EngineArgs(model=str(tiny_model), max_num_seqs=6, max_model_len=64, num_gpu_blocks_override=9))
    engine, running = served.engine, []
    for index in range(NUM_REQUESTS):
        prompt = [rng.randrange(10, 250) for _ in range(rng.randint(1, 40))]
        parsed = served.inputs.parse(prompt, _params(rng), request_id=f"r{index}")
        monitor.added(parsed.request_id)
        engine.add(parsed)
        running.append(parsed)
        if rng.random() < 0.3:
            victim = running.pop(rng.randrange(len(running)))
            monitor.saw(output for _, output in engine.abort(victim))
            assert engine.abort(victim) == []
        while engine.channel.gauges.num_waiting > 12 or (engine.has_work and rng.random() < 0.5):
            monitor.saw(output for _, output in engine.step())
            engine.channel.check()
    while engine.has_work:
        monitor.saw(output for _, output in engine.step())
    monitor.all_ended()
    engine.channel.check()
    assert len(monitor.finished) == NUM_REQUESTS
    readings = {item.name: item.value for item in engine.get_metrics()}
    assert readings["quire:num_requests_running"] == readings["quire:num_requests_waiting"] == 0
    assert readings["quire:kv_cache_usage_perc"] == 0
    served.close()


async def _client(llm: AsyncLLM, index: int, rng: random.Random, monitor: OneFinalMonitor) -> None:
    prompt = [rng.randrange(10, 250) for _ in range(rng.randint(1, 30))]
    name, patience = f"c{index}", rng.choice([None, None, 0, 1, 2])
    seen: list[RequestOutput] = []
    stream = llm.generate({"prompt_token_ids": prompt}, _params(rng), request_id=name)
    async for output in stream:
        seen.append(output)
        if patience is not None and len(seen) > patience:
            await stream.aclose()
            return
    monitor.added(name)
    monitor.saw(seen)


async def test_disconnects_leave_nothing(tiny_model: Path) -> None:
    threads_before = threading.active_count()
    files_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    llm = AsyncLLM(model=str(tiny_model), max_num_seqs=8, max_model_len=64, num_gpu_blocks_override=16)
    rng, monitor, gate = random.Random(2), OneFinalMonitor(), asyncio.Semaphore(24)

    async def guarded(index: int) -> None:
        async with gate:
            task = asyncio.ensure_future(_client(llm, index, rng, monitor))
            if rng.random() < 0.1:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    await asyncio.gather(*(guarded(index) for index in range(NUM_REQUESTS // 4)))
    while llm.has_work:
        await asyncio.sleep(0.01)
    readings = {item.name: item.value for item in llm.get_metrics()}
    monitor.all_ended()
    assert readings["quire:num_requests_running"] == readings["quire:num_requests_waiting"] == 0
    assert readings["quire:kv_cache_usage_perc"] == 0
    llm.check()
    await llm.shutdown()
    end_s = time.monotonic() + PATIENCE_S  # those that work on texts end after the work that they are at
    while threading.active_count() > threads_before + 1 and time.monotonic() < end_s:
        await asyncio.sleep(0.01)
    assert threading.active_count() <= threads_before + 1  # the loop's own executor may keep a thread
    if files_before:
        assert len(os.listdir("/proc/self/fd")) <= files_before + 1


async def test_refused_requests_leave_nothing(tiny_model: Path) -> None:
    llm = AsyncLLM(model=str(tiny_model), max_num_seqs=2, max_model_len=64)
    for prompt in ([], [1] * 64, [2**31], [-1], {"prompt_token_ids": "x"}, {"text": "x"}, b"x"):
        try:
            async for _ in llm.generate(prompt, SamplingParams()):  # type: ignore[arg-type]
                raise AssertionError("a bad prompt gave an output")
        except InvalidRequestError as error:
            assert error.param is not None
    assert not llm.has_work
    await llm.shutdown()
