"""The memory budget: both fillers, and what a start says when the device is too small."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire import LLM
from quire.compose import core as compose
from quire.errors import ConfigurationError
from quire.models.model import Model
from quire.ops.reference import ReferenceOps
from quire.ops.types import CacheShape, DeviceMemory
from quire.runner import memory
from quire.runner.host_memory import host_memory_bytes
from quire.runner.memory import StepShape, make_budget
from quire.weights.load import load_model

MIB = 2**20
LIMITS = StepShape(max_num_seqs=3, max_num_batched_tokens=40, max_model_len=32, block_size=16)


class SmallDevice(ReferenceOps):
    """A device of 100 MiB, 60 of them free, on which a step takes a MiB for each token, and an eighth for each row
    that has log-probabilities reported: forty of a prompt, though there may be three rows."""

    def __init__(self) -> None:
        super().__init__(np)
        self.steps: list[int] = []
        self.room_for_cache = True
        self.room_for_steps = True
        self._tokens = 0.0

    def memory(self) -> DeviceMemory:
        return DeviceMemory(total=100 * MIB, free=60 * MIB, allocated=8 * MIB)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        if not self.room_for_steps:
            raise MemoryError
        self._tokens = 0
        work()
        return int(self._tokens * MIB)

    def embed(self, token_ids: Any, packed: Any, scale: float = 1.0) -> Any:
        self._tokens = len(token_ids)
        self.steps.append(len(token_ids))
        return super().embed(token_ids, packed, scale)

    def logprobs(self, logits: Any, token_ids: Any, num_top: int) -> Any:
        assert num_top == 20
        self._tokens += len(logits) / 8
        return super().logprobs(logits, token_ids, num_top)

    def make_cache(self, shape: CacheShape) -> Any:
        if not self.room_for_cache and shape.num_blocks > 1:
            raise MemoryError
        return super().make_cache(shape)


def model_on(directory: Path, ops: ReferenceOps) -> Model:
    return load_model(directory, ops, dtype="float32")


def test_a_device_is_measured_by_its_largest_steps(tiny_model: Path) -> None:
    ops = SmallDevice()
    budget = make_budget(model_on(tiny_model, ops), ops, LIMITS)
    assert set(ops.steps) == {40, 3}
    assert (budget.device, budget.used_by_others, budget.weights) == (100 * MIB, 32 * MIB, 8 * MIB)
    assert (budget.activations, budget.sampler, budget.cache) == (40 * MIB, 5 * MIB, 0)
    assert budget.fragmentation_reserve == MIB
    wide = make_budget(model_on(tiny_model, ops), ops, replace(LIMITS, max_num_batched_tokens=80))
    assert (wide.activations, wide.sampler) == (80 * MIB, 8 * MIB), "64 rows at a time report them"


def test_what_the_models_beside_it_take_is_no_part_of_a_share(tiny_model: Path) -> None:
    ops = SmallDevice()
    budget = make_budget(model_on(tiny_model, ops), ops, LIMITS, is_shared=True)
    assert (budget.used_by_others, budget.weights, budget.activations) == (0, 8 * MIB, 40 * MIB)


def test_the_host_is_estimated(tiny_model: Path) -> None:
    ops = ReferenceOps(np)
    model = model_on(tiny_model, ops)
    small, large = (make_budget(model, ops, replace(LIMITS, max_num_batched_tokens=tokens)) for tokens in (40, 400))
    assert (small.device, small.used_by_others, small.weights) == (host_memory_bytes(), 0, model.weight_bytes)
    assert large.activations > small.activations > 0
    assert small.sampler == 2 * 3 * model.spec.vocab_size * 4


@pytest.mark.parametrize(
    ("rows", "tokens"), [(r, t) for r in (1, 2, 3, 8, 50) for t in (1, 3, 31, 32, 40, 64, 65, 200) if t <= 32 * r]
)
def test_the_largest_steps_are_ones_that_the_scheduler_may_ask_for(rows: int, tokens: int) -> None:
    limits = replace(LIMITS, max_num_seqs=rows, max_num_batched_tokens=tokens)
    token_ids, batch = memory.prompt_step(ReferenceOps(np), limits)
    counts, starts = np.diff(batch.query_starts), np.asarray(batch.starts)
    assert len(token_ids) == counts.sum() == tokens, "the budget is spent"
    assert len(counts) <= rows and (starts + counts <= 32).all()
    assert len(counts) >= min(rows, tokens) - -(-tokens // 32), "singles beside the prompts"
    assert batch.block_tables.shape[1] * limits.block_size >= (starts + counts).max()
    single, _ = memory.single_step(ReferenceOps(np), limits)
    assert len(single) == min(rows, tokens)


def test_graphs_are_counted_with_the_block_into_which_they_pad(tiny_model: Path) -> None:
    """Of two sizes of blocks that lead to the same graphs, the larger takes as much more as its block is larger."""
    ops = SmallDevice()
    model = model_on(tiny_model, ops)
    small, large = (
        make_budget(model, ops, replace(LIMITS, block_size=size, captures_graphs=True)).graphs for size in (16, 32)
    )
    assert large - small == model.cache_shape(1, 16).bytes_per_block
    assert small > 3 * MIB, "a step of three rows, and the graphs' own"


def test_what_the_allocator_keeps_is_in_use(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SmallDevice()
    budget = make_budget(model_on(tiny_model, ops), ops, LIMITS)
    monkeypatch.setattr(
        ops, "memory", lambda: DeviceMemory(100 * MIB, 30 * MIB, allocated=60 * MIB, allocator_cached=7 * MIB)
    )
    decision = memory.check_budget(budget, ops)
    assert decision is not None and decision.value == "77 MiB"
    assert decision.reason.startswith(f"{77 * MIB / budget.used - 1:+.1%} of the budget's ")
    assert memory.check_budget(budget, ReferenceOps(np)) is None


@pytest.mark.parametrize(
    ("room", "words"),
    [
        (
            "room_for_cache",
            "gpu_memory_utilization is too large: there is no room for the cache .used_by_others 32 MiB, weights",
        ),
        ("room_for_steps", "max_num_seqs 3: a step of that size does not fit the device beside the weights"),
    ],
)
def test_a_device_without_room_is_said_in_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, room: str, words: str
) -> None:
    ops = SmallDevice()
    setattr(ops, room, False)
    monkeypatch.setattr(compose, "select_ops", lambda *_: (ops, []))
    with pytest.raises(ConfigurationError, match=words) as caught:
        LLM(
            str(tiny_model), dtype="float32", max_num_seqs=3, max_num_batched_tokens=40, max_model_len=32,
            enforce_eager=True,
        )  # fmt: skip
    assert "\n" not in caught.value.message


def test_weights_without_room_are_said_in_one_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError("CUDA out of memory")

    ops = SmallDevice()
    monkeypatch.setattr(ops, "pack_linear", full)
    monkeypatch.setattr(compose, "select_ops", lambda *_: (ops, []))
    with pytest.raises(ConfigurationError, match="the weights do not fit into memory"):
        LLM(str(tiny_model))


def test_the_start_reports_the_memory_budget(tiny_model: Path) -> None:
    with LLM(str(tiny_model), max_num_seqs=2, max_model_len=64) as llm:
        (line,) = [item for item in llm.decisions if item.name == "memory"]
    assert line.reason.startswith("weights ") and "cache " in line.reason
