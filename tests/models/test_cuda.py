"""A whole model on the CUDA provider, and the whole engine on torch arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire import LLM, SamplingParams
from quire.compose import core as compose
from quire.models.model import Model
from quire.ops.reference import ReferenceOps
from quire.ops.types import DeviceMemory, Ops
from quire.runner import graphs
from quire.weights.load import load_model
from tests.models.paged import PagedModel
from tests.ops.cases import relative_error

pytest.importorskip("triton")

from quire.ops.cuda.provider import CudaOps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of masked lanes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = [5, 9, 17, 3, 44, 8, 21, 60, 2, 13, 7]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_logits_equal_the_reference(tiny: Callable[..., Path], family: str) -> None:
    directory = tiny(family)
    logits = []
    for ops in (CudaOps(DEVICE), ReferenceOps(np)):
        model: Model = load_model(directory, ops, dtype="float32")
        paged = PagedModel(model, ops, num_blocks=4, block_size=16)
        logits.append(paged.all_logits(PROMPT, [4, 6, 1]))
    assert relative_error(*logits) < 2e-5


def answers(directory: Path, ops: Ops, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Any:
    monkeypatch.setattr(compose, "select_ops", lambda *_: (ops, []))
    base: dict[str, Any] = dict(max_tokens=3, ignore_eos=True, detokenize=False)
    params = [
        SamplingParams(temperature=0.0, logprobs=2, **base),
        SamplingParams(temperature=1.0, seed=1, top_p=0.9, prompt_logprobs=1, **base),
        SamplingParams(
            temperature=0.8, seed=2, top_k=20, min_p=0.01, repetition_penalty=1.3, frequency_penalty=0.2, **base
        ),
        SamplingParams(
            temperature=0.0, logit_bias={11: 5.0}, min_tokens=2, allowed_token_ids=list(range(10, 90)), **base
        ),
    ]
    sizes = dict(max_num_seqs=4, max_model_len=32, num_gpu_blocks_override=16, max_num_batched_tokens=64)
    with LLM(str(directory), dtype="float32", **sizes, **arguments) as llm:
        prompts = [{"prompt_token_ids": PROMPT[: 3 + 2 * index]} for index in range(len(params))]
        return [item.outputs[0].token_ids for item in llm.generate(prompts, params, use_tqdm=False)]


class AsOnDevice(CudaOps):
    """Tells of memory, as where there is a device: so decode steps are padded and captured, and steps overlap."""

    def memory(self) -> DeviceMemory | None:
        return super().memory() or DeviceMemory(total=2**30, free=2**30, allocated=0)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The interpreter takes half a minute for what is measured here."""
        return super().peak_bytes(work) if self.device.type == "cuda" else 0


def test_the_engine_on_torch_gives_the_tokens_of_numpy(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny("llama")
    expected = answers(directory, ReferenceOps(np), monkeypatch)
    assert answers(directory, ReferenceOps(torch), monkeypatch) == expected
    monkeypatch.setattr(graphs, "CAPTURE_AT", 1)
    assert answers(directory, CudaOps(DEVICE), monkeypatch, async_scheduling=False) == expected
    assert answers(directory, AsOnDevice(DEVICE), monkeypatch) == expected
    assert answers(directory, ReferenceOps(torch), monkeypatch, async_scheduling=True) == expected
