"""The halves of a step: what begins while tokens are in flight gives what it gives when they are known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire.compose.core import sampling_features
from quire.core.plan import NewRow, RowResult, ScheduledRow, StepPlan
from quire.core.request import PenaltySpec, SamplingSpec
from quire.ops.reference import ReferenceOps
from quire.runner.model_runner import ModelRunner
from quire.weights.load import load_model

GREEDY, DRAWN = SamplingSpec(temperature=0.0), SamplingSpec(temperature=1.0, seed=5, num_logprobs=2)
PENALISED = SamplingSpec(temperature=0.0, penalties=PenaltySpec(frequency=2.0))


class LateOps(ReferenceOps):
    """A device whose numbers reach the host only when the runner waits for them."""

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self.num_waits = 0
        self.breaks = False

    def fetch(self, arrays: Sequence[Any]) -> Callable[[], list[Any]]:
        copies = [np.array(self.to_numpy(x)) for x in arrays]

        def wait() -> list[Any]:
            self.num_waits += 1
            if self.breaks:
                raise RuntimeError("the device is lost")
            return copies

        return wait


def runner(directory: Path, ops: ReferenceOps) -> ModelRunner:
    model = load_model(directory, ops, dtype="float32")
    return ModelRunner(
        model, ops, num_blocks=16, block_size=16, max_rows=4, max_model_len=64, features=sampling_features(ops)
    )


def enter(row: int, prompt: Sequence[int], spec: SamplingSpec, blocks: tuple[int, ...]) -> NewRow:
    return NewRow(row, f"r{row}", tuple(prompt), len(prompt), spec, blocks)


def single(row: int, start: int) -> ScheduledRow:
    return ScheduledRow(row, start, 1, (), True)


def plans(specs: Sequence[SamplingSpec], num_steps: int) -> list[StepPlan]:
    """Prompts of 3, 4, 5 ... tokens in rows 0, 1, 2 ..., then a token each in every step."""
    prompts = [list(range(10 + row, 13 + 2 * row)) for row in range(len(specs))]
    new = tuple(enter(row, prompt, specs[row], (row,)) for row, prompt in enumerate(prompts))
    first = tuple(ScheduledRow(row, 0, len(prompt), (), True) for row, prompt in enumerate(prompts))
    rest = [
        StepPlan(step, (), (), tuple(single(row, len(prompt) + step - 1) for row, prompt in enumerate(prompts)))
        for step in range(1, num_steps)
    ]
    return [StepPlan(0, (), new, first), *rest]


@pytest.mark.parametrize("xp", [np, torch], ids=lambda xp: xp.__name__)
@pytest.mark.parametrize("num_in_flight", [2, 3])
def test_steps_in_flight_give_the_same(tiny_model: Path, xp: Any, num_in_flight: int) -> None:
    todo = plans([GREEDY, DRAWN, GREEDY], 6)
    plain = runner(tiny_model, ReferenceOps(xp))
    expected = [plain.execute(plan) for plan in todo]
    ops = LateOps(xp)
    late = runner(tiny_model, ops)
    steps, found = [], []
    for plan in todo:
        steps.append(late.launch(plan))
        if len(steps) == num_in_flight:
            assert late._rows.has_pending_token(0) and ops.num_waits == len(found)
            found.append(late.collect(steps.pop(0)))
    found += [late.collect(step) for step in steps]
    assert found == expected
    assert ops.num_waits == len(todo), "one wait for each step"
    assert not any(late._rows.has_pending_token(row) for row in range(3))
    assert late.collect(steps[-1]) == expected[-1], "asked again, it says the same"


def test_a_row_that_counts_its_tokens_is_not_planned_before_they_are_known(tiny_model: Path) -> None:
    first, second, third, *_ = plans([GREEDY, PENALISED], 5)
    plain = runner(tiny_model, ReferenceOps(np))
    expected = [plain.execute(plan) for plan in (first, second, third)]
    ops = LateOps(np)
    late = runner(tiny_model, ops)
    steps = [late.launch(first), late.launch(replace(second, scheduled=second.scheduled[:1]))]
    assert ops.num_waits == 0, "the other row goes on"
    with pytest.raises(AssertionError, match="needs its last token on the host"):
        late.launch(third)
    late.collect(steps[0])
    steps.append(late.launch(StepPlan(2, (), (), (third.scheduled[0], second.scheduled[1]))))
    assert ops.num_waits == 1
    results = [late.collect(step).rows for step in steps]
    assert [rows[0] for rows in results] == [result.rows[0] for result in expected]
    assert [results[0][1], results[2][1]] == [result.rows[1] for result in expected[:2]]


def test_a_row_whose_token_is_in_flight_may_be_taken_anew(tiny_model: Path) -> None:
    """By another request that needs its tokens: what the one before it waited for is of no use."""
    first = plans([PENALISED], 1)[0]
    late, alone = runner(tiny_model, LateOps(np)), runner(tiny_model, ReferenceOps(np))
    late.launch(first)
    taken = StepPlan(1, (0,), (enter(0, [7, 8], PENALISED, (5,)),), (ScheduledRow(0, 0, 2, (), True),))
    assert late.collect(late.launch(taken)).rows == alone.execute(replace(taken, step_id=0, removed=())).rows


@pytest.mark.parametrize("num_collected", [0, 1, 2])
def test_a_row_taken_anew_gets_nothing_of_the_one_before(tiny_model: Path, num_collected: int) -> None:
    """Whether the steps of the one before are collected before the new one's token is needed, or after."""
    first, second, third = plans([GREEDY, DRAWN], 3)
    late, alone = runner(tiny_model, LateOps(np)), runner(tiny_model, ReferenceOps(np))
    steps = [late.launch(first), late.launch(second)]
    taken = StepPlan(2, (0,), (enter(0, [7, 8], GREEDY, (5,)),), (ScheduledRow(0, 0, 2, (), True), third.scheduled[1]))
    steps.append(late.launch(taken))
    for step in steps[:num_collected]:
        late.collect(step)
    steps.append(late.launch(StepPlan(3, (), (), (single(0, 2),))))
    results = [late.collect(step) for step in steps]
    assert results[0].rows[0] == results[1].rows[0] == RowResult(0, ()), "void: no request waits for it"
    expected = [
        alone.execute(StepPlan(0, (), (enter(0, [7, 8], GREEDY, (5,)),), (ScheduledRow(0, 0, 2, (), True),))),
        alone.execute(StepPlan(1, (), (), (single(0, 2),))),
    ]
    assert [results[2].rows[0], results[3].rows[0]] == [one.rows[0] for one in expected]
    assert late._rows.token_ids(0, 0, 4) == [7, 8, *(one.rows[0].token_ids[0] for one in expected)]
    assert not any(late._rows.has_pending_token(row) for row in range(2))


def test_a_lost_device_is_no_rows_fault(tiny_model: Path) -> None:
    ops = LateOps(np)
    late = runner(tiny_model, ops)
    step = late.launch(plans([GREEDY, DRAWN], 1)[0])
    ops.breaks = True
    with pytest.raises(RuntimeError, match="the device is lost"):
        late.collect(step)
