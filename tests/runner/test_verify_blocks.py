"""For debugging, cached blocks are computed again at idle: right ones are found right, wrong ones wrong, and a request
that comes waits for one block at most."""

import asyncio
import logging
import random
import time
from pathlib import Path

import numpy as np
import pytest

from quire import AsyncLLM, SamplingParams
from quire.compose.core import CoreParts, compose_core
from quire.config import EngineArgs
from quire.core.engine_core import EngineCore
from quire.core.plan import TokenDelta
from quire.core.request import NewRequest, SamplingSpec
from quire.engine.channel import LocalChannel
from quire.engine.verify_blocks import CachedBlockVerifier
from quire.ops.types import AttentionBatch, AttentionSpec

PROMPT = random.Random(3).choices(range(10, 250), k=70)


def parts_of(model: Path, block_size: int = 8, num_blocks: int = 40, overlap: bool = False) -> CoreParts:
    args = EngineArgs(
        model=str(model),
        max_model_len=120,
        max_num_seqs=6,
        max_num_batched_tokens=30,
        block_size=block_size,
        num_gpu_blocks_override=num_blocks,
        async_scheduling=overlap,
        verify_cached_blocks=True,
    )
    return compose_core(args, model)


def verifier_of(parts: CoreParts) -> CachedBlockVerifier:
    assert parts.verifier is not None
    return parts.verifier


def cached(parts: CoreParts) -> int:
    return parts.scheduler._pool.num_cached


def ask(core: EngineCore, prompts: list[list[int]], max_tokens: int = 20) -> list[list[TokenDelta]]:
    """All of them at once, to their ends."""
    deltas_of: dict[str, list[TokenDelta]] = {str(number): [] for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        spec = SamplingSpec(seed=number, num_logprobs=2)
        core.scheduler.add(NewRequest(str(number), tuple(prompt), max_tokens, spec))
    while core.scheduler.has_work:
        for delta in core.step():
            deltas_of[delta.request_id].append(delta)
    return [[delta._replace(num_cached_tokens=0) for delta in deltas] for deltas in deltas_of.values()]


def rest(core: EngineCore) -> int:
    """Have all idle work done; the number of its pieces."""
    pieces = 0
    while core.run_idle_work():
        pieces += 1
    return pieces


def write_garbage(parts: CoreParts, block_id: int, layer: int) -> None:
    runner = parts.executor._runner  # type: ignore[attr-defined]
    size, spec = parts.scheduler.config.block_size, runner._model.spec
    rng, ops = np.random.default_rng(1), runner._ops
    k, v = rng.standard_normal((2, size, spec.num_kv_heads, spec.head_dim), np.float32)
    batch = AttentionBatch(*(np.array(values, np.int32) for values in (range(size), [0, size], [0], [[block_id]])))
    ops.attention(np.repeat(k, spec.num_heads // spec.num_kv_heads, 1), k, v, runner._cache, layer, batch,
                  AttentionSpec(1.0))  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(8, 40), (8, 15), (16, 9), (32, 8)])
def test_blocks_of_a_sound_engine_are_found_equal(
    tiny_model: Path, block_size: int, num_blocks: int, overlap: bool
) -> None:
    parts = parts_of(tiny_model, block_size, num_blocks, overlap)
    core, verifier = parts.core(), verifier_of(parts)
    ask(core, [PROMPT[:length] for length in (64, 64, 33, 40, 41, 5)] + [PROMPT[9:50], PROMPT[:20] + PROMPT[60:]])
    assert rest(core) == verifier.num_compared == cached(parts) > 0
    assert rest(core) == 0
    ask(core, [[1, 2]], max_tokens=1)
    before = verifier.num_compared
    assert rest(core) == verifier.num_compared - before == cached(parts)
    assert verifier.num_different == 0
    core.check()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_block_is_found_and_forgotten_with_what_follows(
    tiny_model: Path, layer: int, caplog: pytest.LogCaptureFixture
) -> None:
    parts = parts_of(tiny_model)
    core, verifier, pool = parts.core(), verifier_of(parts), parts.scheduler._pool
    prompts = [[*PROMPT[:40], 11], [*PROMPT[:40], 12], PROMPT[50:70]]
    answers = ask(core, prompts, max_tokens=1)
    hashes = list(verifier._texts)
    blocks = [pool.find(one) for one in hashes]
    assert len(blocks) == 7 and rest(core) == 7
    wrong = blocks[2]
    assert wrong is not None
    write_garbage(parts, wrong, layer)
    with caplog.at_level(logging.ERROR, "quire"):
        ask(core, [[1, 2]], max_tokens=1)
        assert rest(core) == 5
    assert verifier.num_different == 1
    text = f"cached block {wrong} is wrong from layer {layer} on; it is number 2 of its text"
    assert [record.getMessage() for record in caplog.records] == [text]
    assert [pool.find(one) for one in hashes] == [*blocks[:2], None, None, None, *blocks[5:]]
    assert cached(parts) == 4
    with pytest.raises(AssertionError, match="1 of 12 cached blocks were wrong"):
        core.check()
    assert ask(core, prompts, max_tokens=1) == answers
    rest(core)
    assert verifier.num_different == 1


def test_a_request_waits_for_one_block_at_most(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tiny_model)
    core, verifier = parts.core(), verifier_of(parts)
    channel = LocalChannel(core)
    ask(core, [PROMPT])
    compare, compared = verifier._first_difference, []

    def interrupted(block_ids: list[int], token_ids: list[int]) -> int | None:
        compared.append(block_ids[-1])
        channel.wake()
        return compare(block_ids, token_ids)

    monkeypatch.setattr(verifier, "_first_difference", interrupted)
    for number in range(1, cached(parts) + 1):
        channel.wait()
        assert len(compared) == number
        ask(core, [[1, 2]], max_tokens=1)
    assert len(set(compared)) == cached(parts)  # though each pass was broken off after one


def test_no_more_texts_are_kept_than_blocks_need(tiny_model: Path) -> None:
    parts = parts_of(tiny_model, num_blocks=15)
    core, verifier = parts.core(), verifier_of(parts)
    for number in range(40):
        ask(core, [[number + 10, *PROMPT[:30]]], max_tokens=1)
        assert len(verifier._texts) <= 4 * 15
    rest(core)
    assert len(verifier._texts) <= 15
    core.check()


async def test_a_core_in_its_own_process_tells_what_it_compared(
    tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = AsyncLLM(model=str(tiny_model), max_model_len=120, core_process=True, verify_cached_blocks=True)
    try:
        async for _ in llm.generate({"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=1)):
            pass
        said, start_s = "", time.monotonic()
        while "cached blocks compared: 4, different: 0" not in said:
            assert llm.is_healthy and time.monotonic() - start_s < 60, "it did not happen"
            await asyncio.sleep(0.01)
            said += capfd.readouterr().err
        assert said.index("cached blocks are in doubt") < said.index("cached blocks compared")
    finally:
        await llm.shutdown()
