"""`typical_p` against transformers, with known logits and end to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from quire import LLM, SamplingParams
from quire.core.request import SamplingSpec
from quire.ops.types import Ops
from quire.sampling.features.typical import Typical
from tests.sampling.known_rows import full_sampler, new_row, normal_logits

VOCABULARY = 400


def kept(ops: Ops, logits: Any, specs: list[SamplingSpec]) -> Any:
    """Which tokens may still be sampled, by row."""
    sampler = full_sampler(ops, len(specs))
    for row, spec in enumerate(specs):
        sampler.add(new_row(row, (1, 2), spec))
    array = ops.array(logits, "float32")
    sampler.sample(array, list(range(len(specs))), [2] * len(specs))
    return np.isfinite(ops.to_numpy(array))


def judged(logits: Any, temperature: float, mass: float) -> Any:
    """By transformers, in float64: its warpers in its order."""
    scores = torch.from_numpy(logits.astype(np.float64))[None] / temperature
    warper = transformers.generation.logits_process.TypicalLogitsWarper(mass)
    return np.isfinite(warper(torch.zeros((1, 1), dtype=torch.long), scores)[0].numpy())


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.9, 0.999])
def test_the_tokens_are_those_of_transformers(ops: Ops, mass: float) -> None:
    temperatures = (0.3, 0.7, 1.0, 1.8)
    logits = normal_logits(3, len(temperatures), VOCABULARY)
    specs = [SamplingSpec(temperature=one, typical_p=mass, seed=1) for one in temperatures]
    found = kept(ops, logits.copy(), specs)
    for row, temperature in enumerate(temperatures):
        assert found[row].tolist() == judged(logits[row], temperature, mass).tolist()
    assert 0 < found.sum() < found.size


def test_ties_stay_and_masked_tokens_stay_masked(ops: Ops) -> None:
    logits = np.zeros((1, VOCABULARY), np.float32)
    spec = SamplingSpec(temperature=1.0, typical_p=0.1, seed=1, allowed_token_ids=tuple(range(0, 40)))
    assert np.flatnonzero(kept(ops, logits, [spec])[0]).tolist() == list(range(40)), "all are equally far"


def test_other_rows_and_greedy_ones_are_left_alone(ops: Ops) -> None:
    feature = Typical(ops)
    assert not feature.uses(SamplingSpec()) and not feature.uses(SamplingSpec(temperature=0.0, typical_p=0.5))
    logits = normal_logits(5, 3, VOCABULARY)
    specs = [SamplingSpec(seed=1), SamplingSpec(seed=2, typical_p=0.3), SamplingSpec(temperature=0.0, typical_p=0.3)]
    assert kept(ops, logits, specs).sum(axis=1).tolist()[::2] == [VOCABULARY, VOCABULARY]


def test_a_row_has_the_same_mask_alone_and_among_others(ops: Ops) -> None:
    logits = normal_logits(6, 5, VOCABULARY)
    spec = SamplingSpec(temperature=0.9, typical_p=0.4, seed=1)
    together = kept(ops, logits.copy(), [spec] * 5)
    for row in range(5):
        assert (kept(ops, logits[row : row + 1].copy(), [spec])[0] == together[row]).all()


def test_every_sampled_token_is_typical(model: Path, judge: Any) -> None:
    """End to end: each token was one that transformers leaves at its place."""
    params = SamplingParams(max_tokens=16, temperature=0.8, typical_p=0.3, seed=4, ignore_eos=True)
    with LLM(str(model), dtype="float32") as llm:
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    ids = [5, 6, 7, *output.outputs[0].token_ids]
    with torch.no_grad():
        logits = judge(torch.tensor([ids])).logits[0].numpy()
    for place in range(3, len(ids)):
        assert judged(logits[place - 1], 0.8, 0.3)[ids[place]]
