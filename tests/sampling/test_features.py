"""The seam of sampling features: the sampler knows none of them, and calls each for the rows that use it alone."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire.sampling.sampler as sampler_module
from quire.compose.core import sampling_features
from quire.core.engine_core import EngineCore
from quire.core.limits import SchedulerConfig
from quire.core.plan import NewRow, TokenDelta
from quire.core.policy import make_policy
from quire.core.prefix_cache import NullPrefixCache
from quire.core.request import NewRequest, PenaltySpec, SamplingSpec
from quire.core.scheduler import Scheduler
from quire.executor.local import LocalExecutor
from quire.ops.reference import ReferenceOps
from quire.ops.types import Ops
from quire.runner.model_runner import ModelRunner
from quire.sampling.sampler import Sampler
from quire.weights.load import load_model
from tests.sampling.known_rows import new_row, normal_logits

GREEDY = SamplingSpec(temperature=0.0)
MARKED = SamplingSpec(temperature=0.0, seed=77)
"""Uses the feature below."""
VOCABULARY = 50


class Ladder:
    """A throw-away feature: the token after `n` generated ones is `10 + n`. It counts what it is called for."""

    def __init__(self) -> None:
        self.num_generated: dict[int, int] = {}
        self.num_calls = 0
        self.num_entries = 0

    def uses(self, spec: SamplingSpec) -> bool:
        return spec.seed == MARKED.seed

    def add(self, new: NewRow) -> None:
        assert self.uses(new.sampling)
        self.num_entries += 1
        self.num_generated[new.row] = len(new.token_ids) - new.num_prompt_tokens

    def remove(self, row: int) -> None:
        del self.num_generated[row]

    def on_token(self, row: int, token_id: int) -> None:
        self.num_calls += 1
        assert token_id == 10 + self.num_generated[row]
        self.num_generated[row] += 1

    def apply(self, logits: Any, rows: Sequence[int], places: Sequence[int], positions: Sequence[int]) -> None:
        self.num_calls += 1
        for row, place, _ in zip(rows, places, positions, strict=True):
            logits[place, 10 + self.num_generated[row]] = 1000.0


def test_a_feature_keeps_nothing_of_a_row_that_left(ops: Ops) -> None:
    spec = SamplingSpec(penalties=PenaltySpec(presence=1.0), logit_bias=((3, 1.0),), typical_p=0.5)
    for feature in sampling_features(ops):
        assert feature.uses(spec)
        feature.add(new_row(1, [1, 2], spec))
        feature.on_token(1, 5)
        feature.remove(1)
        feature.remove(1)
        with pytest.raises(KeyError):
            feature.on_token(1, 5)
            feature.apply(
                ops.array(normal_logits(1, 1, VOCABULARY), "float32"), [1], [0], [3]
            )  # without a state by token


def test_a_sampler_without_features_samples_the_raw_logits(ops: Ops) -> None:
    logits = normal_logits(1, 3, VOCABULARY)
    sampler = Sampler(ops, 3)
    for row in range(3):
        sampler.add(new_row(row, [1], GREEDY._replace(penalties=PenaltySpec(frequency=2.0), num_logprobs=0)))
        sampler.on_token(row, 5)
    array = ops.array(logits, "float32")
    results = sampler.sample(array, range(3), [2] * 3).read(range(3))
    assert np.array_equal(ops.to_numpy(array), logits)
    assert [result.token_ids for result in results] == [(int(row.argmax()),) for row in logits]
    sampler.remove(1)
    sampler.remove(1)


def test_a_feature_is_called_for_the_rows_that_use_it_alone(ops: Ops) -> None:
    """Rows in an order of their own, and steps in which no row uses it."""
    ladder, logits = Ladder(), normal_logits(2, 3, VOCABULARY)
    sampler = Sampler(ops, 6, [ladder])
    for row, spec in enumerate((GREEDY, MARKED, GREEDY, MARKED)):
        sampler.add(new_row(row, [1, 2], spec, [10, 11] if row == 3 else []))
    assert ladder.num_generated == {1: 0, 3: 2}
    array = ops.array(logits, "float32")
    results = sampler.sample(array, [3, 0, 1], [4, 2, 2]).read(range(3))
    assert [result.token_ids for result in results] == [(12,), (int(logits[1].argmax()),), (10,)]
    assert np.array_equal(ops.to_numpy(array)[1], logits[1]) and ladder.num_calls == 1
    assert sampler.edited(results) == [results[0], results[2]]
    for row, token_id in ((3, 12), (0, 9), (1, 10)):
        sampler.on_token(row, token_id)
    assert ladder.num_generated == {1: 1, 3: 3} and ladder.num_calls == 3
    assert not sampler.needs_only_tokens([0, 1]) and sampler.needs_only_tokens([0, 2])
    sampler.sample(ops.array(logits[:2], "float32"), [2, 0], [2, 2])
    sampler.remove(1)
    sampler.remove(0)
    sampler.add(new_row(1, [1], GREEDY))
    sampler.sample(ops.array(logits, "float32"), [0, 1, 2], [1, 1, 2])
    assert ladder.num_generated == {3: 3} and ladder.num_calls == 3 and sampler.all_greedy([0, 1, 2])


@pytest.mark.parametrize("marked_first", [True, False])
def test_a_feature_survives_preemption(tiny_model: Path, marked_first: bool) -> None:
    """Two requests, and blocks for one and a half: one of them leaves its row and comes back with what it generated."""
    ops, ladder = ReferenceOps(np), Ladder()
    model = load_model(tiny_model, ops, dtype="float32")
    runner = ModelRunner(model, ops, num_blocks=6, block_size=4, max_rows=2, max_model_len=24, features=[ladder])
    scheduler = Scheduler(SchedulerConfig(2, 16, 24, 4, 6), make_policy("fcfs"), NullPrefixCache())
    core = EngineCore(scheduler, LocalExecutor(runner), lambda: 0.0)
    specs = {"marked": MARKED, "plain": GREEDY}
    for name in sorted(specs, reverse=not marked_first):
        core.scheduler.add(NewRequest(name, (1, 2, 3), 12, specs[name], needs_output_tokens=name == "marked"))
    tokens: dict[str, list[int]] = {name: [] for name in specs}
    preempted: set[str] = set()
    while core.scheduler.has_work:
        deltas: list[TokenDelta] = core.step()
        preempted |= {item.request_id for item in core.scheduler.last_record.stalled if item.reason == "preempted"}
        for delta in deltas:
            tokens[delta.request_id] += delta.token_ids
    assert tokens["marked"] == list(range(10, 22)) and len(tokens["plain"]) == 12
    assert preempted == ({"plain"} if marked_first else {"marked"})
    assert ladder.num_entries == (1 if marked_first else 2)


def test_the_sampler_names_no_feature() -> None:
    tree = ast.parse(Path(sampler_module.__file__).read_text(encoding="utf-8"))
    found = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quire.sampling.features")
        for alias in node.names
    }
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert found == {("quire.sampling.features", name) for name in ("HoldingFeature", "SamplingFeature")}
    assert not any(name.startswith("quire.sampling.features") for name in plain)
