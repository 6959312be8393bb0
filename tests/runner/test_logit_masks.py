"""Allowed tokens, biases, minimum and bad words: of all rows at once, to the bits of one row after another."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire.core.plan import NewRow
from quire.core.request import SamplingSpec
from quire.ops.reference import ReferenceOps
from quire.sampling.features.masks import LogitMasks
from tests.runner.test_overlap import LateOps, plans, runner

VOCABULARY = 12


def plainly(logits: Any, spec: SamplingSpec, generated: list[int]) -> Any:
    """One row, as `SamplingParams` says it."""
    found = logits.copy()
    if spec.allowed_token_ids:
        found[[token for token in range(VOCABULARY) if token not in spec.allowed_token_ids]] = -math.inf
    for token, value in spec.logit_bias:
        found[token] += np.float32(value)
    if len(generated) < spec.min_tokens:
        found[list(spec.stop_token_ids)] = -math.inf
    for *start, last in spec.bad_words:
        if generated[len(generated) - len(start) :] == start:
            found[last] = -math.inf
    return found


def some_spec(draw: random.Random) -> SamplingSpec:
    def tokens(most: int) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(VOCABULARY), draw.randint(0, most))))

    words = tuple(tuple(draw.choices(range(4), k=draw.randint(1, 3))) for _ in range(draw.randint(0, 4)))
    return SamplingSpec(
        allowed_token_ids=tokens(9), logit_bias=tuple((token, draw.uniform(-9, 9)) for token in tokens(5)),
        min_tokens=draw.randint(0, 5), stop_token_ids=tokens(3), bad_words=words,
    )  # fmt: skip


@pytest.mark.parametrize("xp", [np, torch], ids=lambda xp: xp.__name__)
def test_all_rows_at_once_as_each_alone(xp: Any) -> None:
    draw, rng, ops = random.Random(3), np.random.default_rng(3), ReferenceOps(xp)
    for _ in range(60):
        rules, specs = LogitMasks(ops), {row: some_spec(draw) for row in draw.sample(range(9), 5)}
        given = {row: draw.choices(range(4), k=draw.randint(0, 3)) for row in specs}
        specs = {row: spec for row, spec in specs.items() if rules.uses(spec)}
        for row, spec in specs.items():  # some come back after preemption
            rules.add(NewRow(row, "r", (1, 2, *given[row]), 2, spec, ()))
        for _ in range(5):
            rows = draw.sample(sorted(specs), draw.randint(1, len(specs)))
            logits = rng.standard_normal((len(rows), VOCABULARY), np.float32)
            edited = ops.array(logits, "float32")
            rules.apply(edited, rows, range(len(rows)), [2 + len(given[row]) for row in rows])
            expected = [plainly(logits[index], specs[row], given[row]) for index, row in enumerate(rows)]
            assert np.array_equal(ops.to_numpy(edited), np.stack(expected))
            for row in rows:
                given[row].append(draw.randrange(4))
                rules.on_token(row, given[row][-1])
        for row in specs:
            rules.remove(row)
        assert not rules._rows


def test_what_does_not_look_at_tokens_waits_for_none(tiny_model: Path) -> None:
    free = SamplingSpec(
        temperature=0.0, logit_bias=((9, 3.0),), allowed_token_ids=tuple(range(5, 90)), min_tokens=4,
        stop_token_ids=(9, 10), bad_words=((11,),),
    )  # fmt: skip
    todo = plans([free, SamplingSpec(temperature=0.0)], 6)
    plain = runner(tiny_model, ReferenceOps(np))
    expected = [plain.execute(plan) for plan in todo]
    ops = LateOps(np)
    late = runner(tiny_model, ops)
    steps = [late.launch(plan) for plan in todo]
    assert ops.num_waits == 0
    assert [late.collect(step) for step in steps] == expected
