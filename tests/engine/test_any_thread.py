"""Every public call of the engine beside a loop, from several threads and loops at once, while requests run."""

import asyncio
import threading
from pathlib import Path
from typing import Any

from quire import AsyncLLM, SamplingParams
from quire.engine.queue import Caller
from tests.conftest import PATIENCE_S

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
NUM_THREADS = 4


async def ask(engine: AsyncLLM, name: str) -> list[int]:
    engine.check_room(Caller(name))
    prompt = await engine.encode(f"a prompt for {name}")
    token_ids: list[int] = []
    async for output in engine.generate(prompt, PARAMS, request_id=name, caller=Caller(name)):
        token_ids = output.outputs[0].token_ids
        engine.explain(name)
        engine.get_metrics()
    assert [item.finished for item in engine.explain(name)] == [True]
    return token_ids


def test_all_calls_may_be_made_from_any_thread(tiny_model: Path) -> None:
    engine = AsyncLLM(str(tiny_model), max_num_seqs=3, max_model_len=128)
    found: dict[str, Any] = {}

    def work(number: int) -> None:
        async def all_of_it() -> None:
            for turn in range(6):
                names = [f"{number}/{turn}/{index}" for index in range(3)]
                engine.expect_callers({name: 1 for name in names})
                for name, answer in zip(names, await asyncio.gather(*(ask(engine, n) for n in names)), strict=True):
                    found[name] = answer
                if not engine.has_work:
                    await asyncio.get_running_loop().run_in_executor(None, engine.check)

        try:
            asyncio.run(all_of_it())
        except BaseException as error:  # noqa: BLE001 -- raised in the test's own thread
            found[f"thread {number}"] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE_S)
    try:
        assert [value for value in found.values() if isinstance(value, BaseException)] == []
        assert len(found) == NUM_THREADS * 18 and engine.is_healthy and not engine.has_work
        engine.check()
        for name in list(found)[:3]:
            assert asyncio.run(ask(engine, name)) == found[name], "alone, it gets the same"
    finally:
        engine.close()
