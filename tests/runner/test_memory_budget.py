"""The memory budget beside an allocator that counts: every tensor of the reference provider, as it comes and goes."""

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quire import LLM, SamplingParams
from quire.compose import core as compose
from quire.config import CachePlan
from quire.ops.reference import ReferenceOps
from quire.ops.types import DeviceMemory

TOTAL = 2**27


class Counted(TorchDispatchMode):
    """Bytes of the storages that tensors made inside it hold."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        self.held = self.peak = self.most = 0
        """Now; the most since it was set back, for `peak_bytes` and for the test."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()._cdata
        if not self._holders[storage]:
            self._bytes[storage] = tensor.untyped_storage().nbytes()
            self.held += self._bytes[storage]
            self.peak, self.most = max(self.peak, self.held), max(self.most, self.held)
        self._holders[storage] += 1
        weakref.finalize(tensor, self._leave, storage)

    def _leave(self, storage: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            self.held -= self._bytes.pop(storage)


class CountedOps(ReferenceOps):
    """A device whose memory is what `Counted` counts."""

    def __init__(self, counted: Counted) -> None:
        super().__init__(torch)
        self.counted = counted

    def memory(self) -> DeviceMemory:
        held = self.counted.held
        return DeviceMemory(total=TOTAL, free=TOTAL - held, allocated=held)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        before = self.counted.peak = self.counted.held
        work()
        return self.counted.peak - before


@pytest.mark.parametrize("max_num_seqs", [2, 6])
def test_no_step_takes_more_than_the_memory_budget(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int
) -> None:
    """The largest batches of the longest prompts, with all log-probabilities that may be asked for: the most that was
    held is the memory budget to 2 %, and after the start nothing is beyond what the start took."""
    plans: list[CachePlan] = []
    resolve = compose.resolve_cache

    def seen(*args: Any) -> CachePlan:
        plans.append(resolve(*args))
        return plans[-1]

    monkeypatch.setattr(compose, "resolve_cache", seen)
    with Counted() as counted:
        monkeypatch.setattr(compose, "select_ops", lambda *_: (CountedOps(counted), []))
        with LLM(
            str(tiny_model), dtype="float32", max_num_seqs=max_num_seqs, max_model_len=64, max_num_batched_tokens=128,
            enable_prefix_caching=False, enforce_eager=True, num_gpu_blocks_override=64,
        ) as llm:  # fmt: skip
            at_start, counted.most = counted.most, 0
            for length in (63, 58):
                prompts = [
                    {"prompt_token_ids": [(7 * row + place) % 200 for place in range(length)]}
                    for row in range(max_num_seqs + 1)
                ]
                params = SamplingParams(
                    max_tokens=64 - length, temperature=1.0, top_p=0.9, logprobs=20, prompt_logprobs=3,
                    ignore_eos=True, detokenize=False,
                )  # fmt: skip
                llm.generate(prompts, params, use_tqdm=False)
            assert "memory_in_use" in {item.name for item in llm.decisions}
    budget = plans[0].memory
    assert counted.most <= 1.01 * at_start, "nothing grows after the start"
    assert at_start == pytest.approx(budget.used - budget.fragmentation_reserve, rel=0.02)
    assert counted.most == pytest.approx(at_start, rel=0.06), "two prompts of a token less are the worst that comes"
