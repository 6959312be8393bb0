"""Captured decode steps: sizes, padding, and that they give what launched ones give."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire import LLM, AsyncLLM, SamplingParams
from quire.compose import core as compose
from quire.core.plan import ScheduledRow, StepPlan
from quire.core.request import SamplingSpec
from quire.ops.reference import ReferenceOps
from quire.ops.types import CacheShape, DeviceMemory, SampleBatch
from quire.runner import graphs
from quire.runner.graphs import GraphBuckets, GraphSize
from quire.runner.model_runner import ModelRunner
from quire.weights.load import load_model
from tests.conftest import PATIENCE_S
from tests.runner.test_overlap import DRAWN, GREEDY, enter, single
from tests.runner.test_overlap import plans as overlapping_plans


class Capturer:
    """Notes what is captured and replayed. A graph is made of arrays: nothing else may reach the work again."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.num_captured = 0
        self.num_replayed = 0
        self.fails = False

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_asked += 1
        if self.fails:
            raise RuntimeError("the device does not capture")
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


def test_sizes_hold_what_they_are_for() -> None:
    limits = GraphBuckets(max_rows=200, max_blocks=1000, block_size=16)
    for rows in range(1, 201):
        size = limits.size_for(rows, 1, True)
        assert rows <= size.num_rows <= min(200, max(rows, rows * 3 // 2))
        assert limits.size_for(size.num_rows, 1, True) == size
    assert sorted({size.num_rows for size in limits.sizes()}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128,
                                                                  192, 200]  # fmt: skip
    assert [limits.size_for(1, width, True).width for width in (1, 128, 129, 512, 513, 1000)] == [
        128,
        128,
        512,
        512,
        1000,
        1000,
    ]
    assert len(limits.sizes()) == 16 * 3 * 2
    assert GraphBuckets(2, 2, 64).sizes() == {GraphSize(rows, 2, flag) for rows in (1, 2) for flag in (False, True)}


def runner(directory: Path, xp: Any, capture: Capturer | None) -> ModelRunner:
    ops = ReferenceOps(xp)
    model = load_model(directory, ops, dtype="float32")
    return ModelRunner(model, ops, num_blocks=16, block_size=8, max_rows=7, max_model_len=24, capture=capture)


def plans(num_steps: int) -> list[StepPlan]:
    """Five rows, of which one more takes part in each step until all do, then one fewer; tables become wider."""
    prompts = [list(range(10 + row, 13 + 2 * row)) for row in range(5)]
    specs = [GREEDY, DRAWN, GREEDY, DRAWN, GREEDY]
    new = tuple(enter(row, prompt, specs[row], (row, 5 + row)) for row, prompt in enumerate(prompts))
    made = [StepPlan(0, (), new, tuple(ScheduledRow(row, 0, len(p), (), True) for row, p in enumerate(prompts)))]
    lengths = [len(prompt) for prompt in prompts]
    for step in range(1, num_steps):
        rows = [row for row in range(5) if row <= step % 6 or step > 12]
        made.append(StepPlan(step, (), (), tuple(single(row, lengths[row]) for row in rows[:: -1 if step % 2 else 1])))
        for row in rows:
            lengths[row] += 1
    return [plan for plan in made if all(item.start < 15 for item in plan.scheduled)]


@pytest.mark.parametrize("xp", [np, torch], ids=lambda xp: xp.__name__)
def test_captured_steps_give_what_launched_ones_give(
    tiny_model: Path, xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "FIRST_WIDTH_TOKENS", 8)
    monkeypatch.setattr(graphs, "CAPTURE_AT", 1)
    monkeypatch.setattr(graphs, "STEPS_APART", 1)
    todo = plans(15)
    assert len(todo) > 9
    plain = runner(tiny_model, xp, None)
    expected = [plain.execute(plan) for plan in todo]
    capturer = Capturer()
    assert [one.execute(plan) for one in [runner(tiny_model, xp, capturer)] for plan in todo] == expected
    assert capturer.num_captured >= 5 and capturer.num_replayed >= 3
    capturer, found, steps = Capturer(), [], []
    late = runner(tiny_model, xp, capturer)
    for plan in todo:
        steps.append(late.launch(plan))
        found += [late.collect(steps.pop(0))] if len(steps) == 2 else []
    assert [*found, late.collect(steps[0])] == expected
    assert capturer.num_replayed >= 2


def drawing_plans() -> list[StepPlan]:
    """Five rows that want tokens alone, padded to six; then a greedy request takes a row that was sampled for."""
    random = SamplingSpec(temperature=1.5, seed=11)
    prompts = [list(range(10 + row, 13 + 2 * row)) for row in range(5)]
    new = [enter(row, prompt, (random, GREEDY)[row % 2], (row, 5 + row)) for row, prompt in enumerate(prompts)]
    lengths = [len(prompt) for prompt in prompts]
    made = [StepPlan(0, (), tuple(new), tuple(ScheduledRow(row, 0, lengths[row], (), True) for row in range(5)))]
    for step in range(1, 9):
        if step == 4:
            again = enter(0, [4, 5], GREEDY, (0, 5))
            lengths[0] = 2
            made.append(StepPlan(step, (0,), (again,), (ScheduledRow(0, 0, 2, (), True),)))
        else:
            made.append(StepPlan(step, (), (), tuple(single(row, lengths[row]) for row in range(5))))
            lengths = [length + 1 for length in lengths]
    return made


@pytest.mark.parametrize("xp", [np, torch], ids=lambda xp: xp.__name__)
def test_captured_samples_give_what_launched_ones_give(
    tiny_model: Path, xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AT", 1)
    monkeypatch.setattr(graphs, "STEPS_APART", 1)
    todo = drawing_plans()
    plain = runner(tiny_model, xp, None)
    expected = [plain.execute(plan) for plan in todo]
    capturer = Capturer()
    assert [one.execute(plan) for one in [runner(tiny_model, xp, capturer)] for plan in todo] == expected
    assert capturer.num_replayed >= 3
    late, found = runner(tiny_model, xp, Capturer()), []
    for part in (todo[:4], todo[4:]):  # what is in flight for a row that is removed would be void
        steps = [late.launch(plan) for plan in part]
        found += [late.collect(step) for step in steps]
    assert found == expected


@pytest.mark.parametrize("capturer", [None, Capturer()], ids=["launched", "captured"])
@pytest.mark.parametrize("num_logprobs", [None, 0])
def test_a_sample_is_of_the_place_that_its_token_takes(
    tiny_model: Path, capturer: Capturer | None, num_logprobs: int | None
) -> None:
    """The index of the new token, not of the one that is computed: the noise depends on it."""
    seen: list[tuple[list[int], list[int]]] = []

    class WatchedOps(ReferenceOps):
        def sample(self, logits: Any, batch: SampleBatch) -> Any:
            seen.append((batch.seeds.tolist(), batch.positions.tolist()))
            return super().sample(logits, batch)

    ops = WatchedOps(np)
    model = load_model(tiny_model, ops, dtype="float32")
    one = ModelRunner(model, ops, num_blocks=16, block_size=16, max_rows=4, max_model_len=64, capture=capturer)
    specs = [SamplingSpec(temperature=1.0, seed=seed, num_logprobs=num_logprobs) for seed in (7, 8, 9)]
    for plan in overlapping_plans(specs, 6):
        one.execute(plan)
    assert len(seen) == 6
    for step, (seeds, positions) in enumerate(seen):
        assert (seeds[:3], positions[:3]) == ([7, 8, 9], [3 + step, 4 + step, 5 + step])


def test_padding_writes_into_the_null_block_alone(tiny_model: Path) -> None:
    one = runner(tiny_model, np, Capturer())
    for plan in plans(15)[:2]:
        one.execute(plan)
    before = one._cache.data.copy()
    rows = (0, 2, 3, 4)
    one.execute(StepPlan(2, (), (), tuple(single(row, one._rows._num_known[row] - 1) for row in (*rows, 1))))
    changed = {int(block) for block in np.nonzero((one._cache.data != before).any(axis=(0, 1, 3, 4, 5)))[0]}
    assert before.shape[2] == 17 and changed <= {*range(10), 16} and 16 in changed


def test_a_device_that_cannot_capture_goes_on(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURE_AT", 1)
    monkeypatch.setattr(graphs, "STEPS_APART", 1)
    todo = plans(6)
    plain, capturer = runner(tiny_model, np, None), Capturer()
    capturer.fails = True
    failing = runner(tiny_model, np, capturer)
    assert [failing.execute(plan) for plan in todo] == [plain.execute(plan) for plan in todo]
    assert capturer.num_asked == len(failing._graphs._graphs) < sum(failing._graphs._num_uses.values())


class CapturingDevice(ReferenceOps):
    """A device as the engine sees one: memory of its own, and CUDA graphs."""

    def __init__(self) -> None:
        super().__init__(np)
        self.capturer = Capturer()
        self.num_blocks: list[int] = []

    def memory(self) -> DeviceMemory:
        return DeviceMemory(total=2**30, free=2**29, allocated=0)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return self.capturer(work)

    def make_cache(self, shape: CacheShape) -> Any:
        self.num_blocks.append(shape.num_blocks)
        return super().make_cache(shape)


@pytest.mark.parametrize("eager", [False, True])
def test_an_engine_on_a_device_captures_unless_eager(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, eager: bool
) -> None:
    sizes: dict[str, Any] = dict(
        dtype="float32", max_num_seqs=4, max_model_len=64, num_gpu_blocks_override=20, max_num_batched_tokens=64
    )
    prompts = [{"prompt_token_ids": list(range(5, 9 + row))} for row in range(6)]
    params = SamplingParams(max_tokens=7, ignore_eos=True, detokenize=False, logprobs=1, seed=1)

    def answers(ops: ReferenceOps, **arguments: Any) -> list[Any]:
        monkeypatch.setattr(compose, "select_ops", lambda *_: (ops, []))
        with LLM(str(tiny_model), **sizes, **arguments) as llm:
            decisions = {item.name: item for item in llm.decisions}
            assert decisions["async_scheduling"].value == ("on" if ops.memory() is not None else "off")
            assert ("graphs " in decisions["memory"].reason) == (ops.memory() is not None and not eager)
            return [item.outputs for item in llm.generate(prompts, params, use_tqdm=False)]

    device = CapturingDevice()
    assert answers(device, enforce_eager=eager) == answers(ReferenceOps(np))
    assert bool(device.capturer.num_captured) != eager
    assert device.num_blocks[-1] == (20 if eager else 21)


def test_steps_capture_now_and_then_and_moments_without_work_one_each(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "FIRST_WIDTH_TOKENS", 24)
    capturer = Capturer()
    one = runner(tiny_model, np, capturer)
    assert not one.run_idle_work(), "before a request was answered it would keep the first waiting"
    one.execute(StepPlan(0, (), (enter(0, [4, 5], GREEDY, (0, 1)), enter(1, [6], DRAWN, (2, 3))),
                         (ScheduledRow(0, 0, 2, (), True), ScheduledRow(1, 0, 1, (), True))))  # fmt: skip
    for step in range(1, 5):
        one.execute(StepPlan(step, (), (), (single(0, step + 1),)))
        assert capturer.num_captured == (step >= 3), "at its third use"
    for step in range(1, 6):
        one.execute(StepPlan(4 + step, (), (), (single(1, step),)))
        assert capturer.num_captured == 1, "another is not captured within so many steps"
    before, left = one._cache.data.copy(), len(one._graphs._buckets.sizes()) - 1
    assert GraphSize(1, 3, False) not in one._graphs._graphs
    assert one.run_idle_work() and one._graphs._graphs.keys() == {GraphSize(1, 3, True), GraphSize(1, 3, False)}
    assert one.run_idle_work() and max(one._graphs._graphs) == GraphSize(7, 3, True), "then the largest"
    while one.run_idle_work():
        pass
    assert capturer.num_captured == 1 + left
    assert np.array_equal(one._cache.data[:, :, :16], before[:, :, :16]), "what is captured without work writes nowhere"


def test_a_server_captures_while_no_request_waits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CapturingDevice()
    monkeypatch.setattr(compose, "select_ops", lambda *_: (device, []))
    engine = AsyncLLM(
        str(tiny_model), dtype="float32", max_num_seqs=3, max_model_len=64, num_gpu_blocks_override=20,
        max_num_batched_tokens=64,
    )  # fmt: skip
    try:
        assert device.capturer.num_captured == 1, "the largest: the others share its memory"

        async def ask() -> list[int]:
            params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
            ids: list[int] = []
            async for output in engine.generate({"prompt_token_ids": [5, 6, 7]}, params):
                ids = list(output.outputs[0].token_ids)
            return ids

        first = asyncio.run(ask())
        until = time.monotonic() + PATIENCE_S
        sizes = GraphBuckets(3, 4, 16).sizes()
        while device.capturer.num_captured < len(sizes) and time.monotonic() < until:
            time.sleep(0.01)
        assert device.capturer.num_captured == len(sizes) == 6
        replayed = device.capturer.num_replayed
        assert asyncio.run(ask()) == first and device.capturer.num_replayed >= replayed + 3
    finally:
        engine.close()
