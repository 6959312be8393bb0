"""The engine at its smallest: one process, a tiny checkpoint, tokens that transformers judges.

`tests/law/test_deletable.py` runs this file without each optional folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from tests.tiny.checkpoints import make_tiny

SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 96, "num_gpu_blocks_override": 32, "threads": 1}
PROMPTS = [[5, 6, 7], list(range(40, 80)), [200, 3, 9, 120, 44]]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", dtype="float32", tokenizer=True)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), **SIZES) as found:
        yield found


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def tokens_of(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    assert all(item.finished and item.error is None for item in outputs)
    return [item.outputs[0].token_ids for item in outputs]


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | changes))


def test_greedy_tokens_are_those_of_transformers(llm: LLM, reference: Any) -> None:
    for prompt, found in zip(PROMPTS, tokens_of(llm, greedy()), strict=True):
        known = torch.tensor([prompt + found])
        best = reference(known).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert found == best.tolist()


def test_sampled_tokens_are_among_the_best_and_the_seed_decides_which(llm: LLM, reference: Any) -> None:
    params = greedy(temperature=2.0, top_k=3, seed=7)
    found = tokens_of(llm, params)
    assert found == tokens_of(llm, params) and found != tokens_of(llm, greedy(temperature=2.0, top_k=3, seed=8))
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        best = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].topk(3).indices
        assert all(token in allowed for token, allowed in zip(tokens, best.tolist(), strict=True))


async def test_a_stream_of_the_core_in_this_process_is_the_whole_answer(model: Path, llm: LLM) -> None:
    engine = AsyncLLM(str(model), **SIZES)
    params = greedy(output_kind=RequestOutputKind.DELTA, logprobs=1)
    try:
        for prompt, whole in zip(PROMPTS, tokens_of(llm, greedy()), strict=True):
            parts = [item.outputs[0] async for item in engine.generate({"prompt_token_ids": prompt}, params)]
            assert [token for part in parts for token in part.token_ids] == whole
            assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    finally:
        await engine.shutdown()
