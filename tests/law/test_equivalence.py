"""Law 1: the answer does not depend on scheduling conditions. Tokens, log-probabilities and text of every request are
the same, bit for bit, whatever runs beside it and however its work is cut up."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from quire.config import QUANTIZATIONS
from quire.structured_params import StructuredOutputsParams

Case = tuple[list[int], SamplingParams]
COMMON: dict[str, Any] = dict(max_num_seqs=8, max_model_len=256)


def cases() -> list[Case]:
    """Prompts of many lengths, some with a common beginning; greedy and sampled, with and without each feature."""
    rng = random.Random(7)
    shared = [rng.randrange(10, 250) for _ in range(70)]
    lengths = (1, 5, 16, 17, 33, 64, 90, 120)
    prompts = [(shared if index % 2 else [])[:length] for index, length in enumerate(lengths)]
    prompts = [known + [rng.randrange(10, 250) for _ in range(length - len(known))]
               for known, length in zip(prompts, lengths, strict=True)]  # fmt: skip
    base = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3)
    params = [
        replace(base, temperature=0.0),
        replace(base, temperature=1.0, seed=1),
        replace(base, temperature=0.8, seed=2, top_p=0.9, typical_p=0.95),
        replace(base, temperature=1.2, seed=3, top_k=20, min_p=0.02),
        replace(base, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
        replace(base, temperature=1.0, seed=4, prompt_logprobs=2),
        replace(
            base, temperature=1.0, seed=5, logit_bias={11: 5.0, 12: -100.0}, min_tokens=10, stop_token_ids=[40, 41]
        ),
        replace(base, temperature=1.0, seed=6, allowed_token_ids=list(range(20, 90)), n=2),
    ]
    items = list(zip(prompts, params, strict=True))
    properties = {"ab": {}, "c": {"type": "string"}}
    shape = StructuredOutputsParams(json={"type": "object", "properties": properties, "required": ["c"]})
    held = replace(base, temperature=1.5, seed=7, ignore_eos=False, structured_outputs=shape)
    # With log-probabilities every token is sampled for itself; without, what is forced is appended.
    return [*items, (prompts[3], held), (prompts[5], replace(held, logprobs=None, n=2))]


def essence(output: RequestOutput) -> Any:
    """What must not change."""
    return (
        [
            (item.token_ids, item.logprobs or [], item.text, item.finish_reason, item.stop_reason)
            for item in output.outputs
        ],
        output.prompt_logprobs,
    )


def run(model: Path, items: list[Case], **arguments: Any) -> list[Any]:
    """All at once in one engine."""
    with LLM(model=str(model), **{**COMMON, **arguments}) as llm:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in items]
        return [essence(item) for item in llm.generate(prompts, [params for _, params in items], use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> list[Any]:
    """Each request in an engine that has never seen another."""
    return [run(tiny_model, [item])[0] for item in cases()]


@pytest.mark.parametrize(
    "conditions",
    [
        {},
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 13},
        {"max_num_batched_tokens": 64},
        {"max_num_seqs": 2},
        {"block_size": 8},
        {"block_size": 32},
        {"block_size": 64},
        {"enable_prefix_caching": False},
        {"threads": 1},
        {"threads": 3},
        {"scheduling_policy": "priority"},
        {"num_gpu_blocks_override": 18},
        {"num_gpu_blocks_override": 17, "max_num_batched_tokens": 11},
        {"num_gpu_blocks_override": 5, "block_size": 64, "enable_prefix_caching": False},
        {"async_scheduling": True},
        {"async_scheduling": True, "max_num_batched_tokens": 13, "max_num_seqs": 3},
        {"async_scheduling": True, "num_gpu_blocks_override": 18},
        {"async_scheduling": True, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 11, "block_size": 16},
        {"async_scheduling": True, "scheduling_policy": "priority", "enable_prefix_caching": False},
        {"async_scheduling": True, "core_process": True, "max_num_seqs": 3},
    ],
    ids=lambda conditions: ",".join(f"{name}={value}" for name, value in conditions.items()) or "together",
)
def test_together_equals_alone(tiny_model: Path, alone: list[Any], conditions: dict[str, Any]) -> None:
    assert run(tiny_model, cases(), **conditions) == alone


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_cache_of_8_bits_keeps_the_law(tiny_model: Path, alone: list[Any], dtype: str) -> None:
    """The numbers of a key depend on its token and head alone: other chunks, blocks, threads, preemption, a prefix hit
    and a process of its own change no bit."""
    items, cache = cases(), {"kv_cache_dtype": dtype}
    each = [run(tiny_model, [item], **cache)[0] for item in items]
    assert each != alone
    for conditions in (
        {"max_num_batched_tokens": 13, "threads": 3},
        {"block_size": 8, "num_gpu_blocks_override": 34, "max_num_batched_tokens": 11},
        {"async_scheduling": True, "num_gpu_blocks_override": 18},
        {"core_process": True, "max_num_seqs": 3, "block_size": 64},
    ):
        assert run(tiny_model, items, **cache, **conditions) == each, conditions
    with LLM(model=str(tiny_model), **cache, **COMMON) as llm:
        for _ in range(2):
            outputs = [
                llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0] for prompt, params in items
            ]
            assert [essence(item) for item in outputs] == each
        assert any(item.num_cached_tokens > 0 for item in outputs)


def test_small_cache_does_preempt(tiny_model: Path) -> None:
    """The conditions of the test above are real: requests are preempted in them."""
    with LLM(model=str(tiny_model), **{**COMMON, "num_gpu_blocks_override": 18}) as llm:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in cases()]
        llm.generate(prompts, [params for _, params in cases()], use_tqdm=False)
        preemptions = {item.name: item.value for item in llm.get_metrics()}["quire:num_preemptions_total"]
    assert preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_prefix_hits_change_nothing(tiny_model: Path, alone: list[Any], overlap: bool) -> None:
    with LLM(model=str(tiny_model), async_scheduling=overlap, **COMMON) as llm:
        for _ in range(2):
            outputs = [
                llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0] for prompt, params in cases()
            ]
            assert [essence(item) for item in outputs] == alone
        assert any(item.num_cached_tokens > 0 for item in outputs)


def test_a_prompt_is_shared_within_one_step(tiny_model: Path) -> None:
    rng = random.Random(11)
    prefix = [rng.randrange(10, 250) for _ in range(64)]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)
    items = [([*prefix, *(rng.randrange(10, 250) for _ in range(5))], params) for _ in range(6)]
    with LLM(model=str(tiny_model), **COMMON) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in items], params, use_tqdm=False)
    assert [item.num_cached_tokens for item in outputs] == [0, 64, 64, 64, 64, 64]
    assert [essence(item) for item in outputs] == [run(tiny_model, [item])[0] for item in items]


def test_order_of_arrival_changes_nothing(tiny_model: Path, alone: list[Any]) -> None:
    order = list(range(len(alone)))
    random.Random(3).shuffle(order)
    items = cases()
    assert run(tiny_model, [items[index] for index in order]) == [alone[index] for index in order]


async def _streamed(llm: AsyncLLM, item: Case, delay_s: float) -> Any:
    await asyncio.sleep(delay_s)
    prompt, params = item
    parts: dict[int, Any] = {}
    async for output in llm.generate(
        {"prompt_token_ids": prompt}, replace(params, output_kind=RequestOutputKind.DELTA)
    ):
        for new in output.outputs:
            known = parts.setdefault(new.index, ([], [], [], [], []))
            known[0].extend(new.token_ids)
            known[1].extend(new.logprobs or [])
            known[2].append(new.text)
            known[3].append(new.finish_reason)
            known[4].append(new.stop_reason)
        prompt_logprobs = output.prompt_logprobs
    joined = [(ids, logprobs, "".join(text), reasons[-1], stops[-1]) for _, (ids, logprobs, text, reasons, stops)
              in sorted(parts.items())]  # fmt: skip
    return joined, prompt_logprobs


@pytest.mark.parametrize("overlap", [False, True])
async def test_streams_join_to_the_same(tiny_model: Path, alone: list[Any], overlap: bool) -> None:
    llm = AsyncLLM(model=str(tiny_model), async_scheduling=overlap, **COMMON)
    try:
        rng = random.Random(5)
        streams = [_streamed(llm, item, rng.random() * 0.05) for item in cases()]
        assert await asyncio.gather(*streams) == alone
    finally:
        await llm.shutdown()


def test_restart_without_a_seed_gives_the_same(tiny_model: Path) -> None:
    items = [(prompt, SamplingParams(max_tokens=8, ignore_eos=True)) for prompt, _ in cases()]
    first = run(tiny_model, items)
    assert run(tiny_model, items) == first
    assert run(tiny_model, items, seed=1) != first


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_weights_obey_the_same_law(tiny_model: Path, quantization: str) -> None:
    items = cases()[::2]
    alone = [run(tiny_model, [item], quantization=quantization)[0] for item in items]
    all_conditions: list[dict[str, Any]] = [
        {"threads": 3},
        {"max_num_batched_tokens": 13, "block_size": 32},
        {"num_gpu_blocks_override": 17, "max_num_batched_tokens": 11},
    ]
    for conditions in all_conditions:
        assert run(tiny_model, items, quantization=quantization, **conditions) == alone
    assert alone != [run(tiny_model, [item])[0] for item in items]
