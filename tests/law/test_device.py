"""The laws where there is a GPU: the same tokens whatever overlaps and is captured, one wait a step, the memory budget
held, nothing compiled at a second start. Without one there is nothing here; `tests/runner` has the same on a
device that is played."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, RequestOutput, SamplingParams
from quire.compose import core as compose
from quire.config import CachePlan
from tests.law.test_equivalence import cases, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = dict(device="cuda", max_num_seqs=64, max_model_len=512, max_num_batched_tokens=2048)


@pytest.mark.parametrize("loop", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("eager", [False, True], ids=["captured", "launched"])
@pytest.mark.parametrize("weather", [{}, {"num_gpu_blocks_override": 18}, {"max_num_batched_tokens": 13}], ids=str)
def test_the_same_whatever_overlaps_and_is_recorded(
    tiny_model: Path, weather: dict[str, Any], eager: bool, loop: bool
) -> None:
    alone = [run(tiny_model, [item], device="cuda", enforce_eager=True, async_scheduling=False)[0] for item in cases()]
    arguments = dict(device="cuda", enforce_eager=eager, async_scheduling=loop, **weather)
    assert run(tiny_model, [*cases(), *cases()], **arguments) == [*alone, *alone]


def worst(llm: LLM, max_tokens: int = 24, **more: Any) -> list[RequestOutput]:
    """The longest prompts in the largest batch, with all log-probabilities that may be asked for."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=1.0, top_p=0.9, ignore_eos=True, detokenize=False, **more
    )
    prompts = [
        {"prompt_token_ids": [(7 * row + place) % 200 for place in range(512 - max_tokens)]} for row in range(64)
    ]
    return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "launched"])
def test_the_memory_budget_is_held_to_two_percent(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, eager: bool
) -> None:
    plans: list[CachePlan] = []
    resolve = compose.resolve_cache

    def seen(*args: Any) -> CachePlan:
        plans.append(resolve(*args))
        return plans[-1]

    monkeypatch.setattr(compose, "resolve_cache", seen)
    used, reserved = [], []

    def look() -> None:
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
        reserved.append(torch.cuda.memory_reserved())

    with LLM(str(tiny_model), gpu_memory_utilization=0.5, enable_prefix_caching=False, enforce_eager=eager,
             **SIZES) as llm:  # fmt: skip
        look()
        for _ in range(3):
            worst(llm, logprobs=20, prompt_logprobs=3)
            while llm._engine.channel._core.run_idle_work():  # type: ignore[attr-defined]
                pass
            look()
    budget = plans[0].memory
    grown = [(size - reserved[0]) / 2**20 for size in reserved]
    print(f"\nbudget: {budget}\nin use: {used[-1] / 2**20:,.0f} MiB, {used[-1] / budget.used - 1:+.2%};"
          f" the allocator grew by {grown} MiB after the start")  # fmt: skip
    assert used[2] == used[3] and reserved[1] == reserved[3], "nothing grows after the first time"
    assert reserved[1] - reserved[0] <= budget.fragmentation_reserve + (0 if eager else budget.graphs)
    assert abs(used[-1] - budget.used) <= 0.02 * budget.used


@pytest.mark.parametrize(
    "more",
    [{}, {"logprobs": 5}, {"logit_bias": {5: 2.0}, "allowed_token_ids": list(range(99)), "min_tokens": 20}],
    ids=["samples", "logprobs", "rules"],
)
def test_a_decoding_step_waits_for_nothing_but_its_tokens(tiny_model: Path, more: dict[str, Any]) -> None:
    """torch raises wherever the host waits, but for an event that is asked for: that of `Device.fetch`."""
    with LLM(str(tiny_model), **SIZES) as llm:
        worst(llm)
        core: Any = llm._engine.channel._core
        begin, num_begun = core._executor.execute, 0

        def watched(plan: Any) -> Any:
            nonlocal num_begun
            decodes = bool(plan.scheduled) and all(item.num_tokens == 1 for item in plan.scheduled) and not plan.new
            num_begun += decodes
            torch.cuda.set_sync_debug_mode("error" if decodes else "default")
            try:
                return begin(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        core._executor.execute = watched
        outputs = worst(llm, **more)
    assert num_begun >= 20 and all(len(item.outputs[0].token_ids) == 24 for item in outputs)


START = """
import sys
from quire import LLM, SamplingParams
with LLM(sys.argv[1], device="cuda", max_num_seqs=16, max_model_len=256) as llm:
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=8, logprobs=2), use_tqdm=False)
    print(next(item.value for item in llm.decisions if item.name == "kernels"))
"""


def test_the_second_start_compiles_nothing(tiny_model: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    said = []
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", START, str(tiny_model)], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout.strip())
    print(f"\ncold: {said[0]}; warm: {said[1]}")
    assert not said[0].startswith("0 compiled") and said[1].startswith("0 compiled")
