"""Law 1, over death: a stream that was cut by the death of its core and resumed is the undisturbed one, bit for
bit, whatever the request uses."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from quire.isolation.supervisor import SupervisedChannel
from tests.law.test_equivalence import COMMON, cases

Case = tuple[list[int], SamplingParams]


def long_cases() -> list[Case]:
    """Those of the law, long enough to be cut anywhere; and what is decided on the text side."""
    found = [(prompt, replace(params, max_tokens=120)) for prompt, params in cases()]
    prompt, base = found[1][0], SamplingParams(max_tokens=120, ignore_eos=True, temperature=1.0, logprobs=2)
    stops = replace(base, seed=8, stop=["zz", "q"], min_tokens=30, include_stop_str_in_output=True)
    words = replace(base, seed=9, bad_words=["a", "ab"], frequency_penalty=0.7, n=3)
    return [*found, (prompt, stops), (prompt, words)]


async def joined(llm: AsyncLLM, item: Case, seen: list[int]) -> Any:
    """One stream of differences, put together; its tokens are seen as they come."""
    prompt, params = item
    parts: dict[int, list[Any]] = {}
    last: RequestOutput | None = None
    async for last in llm.generate({"prompt_token_ids": prompt}, replace(params, output_kind=RequestOutputKind.DELTA)):
        for new in last.outputs:
            known = parts.setdefault(new.index, [[], [], "", None, None])
            known[0] += new.token_ids
            seen += new.token_ids
            known[1] += new.logprobs or []
            known[2] += new.text
            known[3:] = [new.finish_reason, new.stop_reason]
    assert last is not None
    return sorted(parts.items()), last.prompt_logprobs


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path) -> list[Any]:
    with LLM(model=str(tiny_model), **COMMON) as llm:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in long_cases()]
        outputs = llm.generate(prompts, [params for _, params in long_cases()], use_tqdm=False)
    return [
        (
            [
                (part.index, [part.token_ids, part.logprobs or [], part.text, part.finish_reason, part.stop_reason])
                for part in output.outputs
            ],
            output.prompt_logprobs,
        )
        for output in outputs
    ]


@pytest.mark.parametrize(
    ("num_tokens", "overlap", "how"),
    [
        *((number, False, signal.SIGKILL) for number in (0, 1, 100, 600)),
        *((number, True, signal.SIGKILL) for number in (1, 300)),
        *((number, overlap, signal.SIGUSR1) for number, overlap in ((1, False), (300, False), (300, True))),
    ],
)
async def test_a_death_is_not_seen_in_any_stream(
    tiny_model: Path, undisturbed: list[Any], num_tokens: int, overlap: bool, how: signal.Signals
) -> None:
    """Killed from outside, all go on at once; after any other end each is tried alone before that. (SIGUSR1: as a
    crash, without a file of the memory.)"""
    llm = AsyncLLM(model=str(tiny_model), core_process=True, async_scheduling=overlap, **COMMON)
    try:
        for _ in range(20):  # on a busy machine the core may be done before the kill
            seen: list[int] = []
            tasks = [asyncio.ensure_future(joined(llm, item, seen)) for item in long_cases()]
            while len(seen) < num_tokens:
                await asyncio.sleep(0)
            channel = llm._engine.channel
            assert isinstance(channel, SupervisedChannel) and channel.pid is not None
            os.kill(channel.pid, how)
            is_in_time = not any(task.done() for task in tasks)
            assert await asyncio.gather(*tasks) == undisturbed
            if is_in_time:
                return
        raise AssertionError("no kill came in time")
    finally:
        await llm.shutdown()
