"""Penalties against their published definitions, and against transformers, with known logits and end to end."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from quire import LLM, SamplingParams
from quire.core.request import PenaltySpec, SamplingSpec
from quire.ops.types import Ops
from quire.sampling.sampler import Sampler
from tests.sampling.known_rows import full_sampler, new_row, normal_logits

VOCABULARY = 400


def penalised(logits: Any, prompt: Sequence[int], output: Sequence[int], spec: SamplingSpec) -> Any:
    """One row in float64. Repetition (CTRL, arXiv 1909.05858) is of tokens of prompt and output; frequency and presence
    (OpenAI's reference) are of generated tokens, as vLLM documents it."""
    found = logits.astype(np.float64)
    for token, bias in spec.logit_bias:
        found[token] += bias
    for token in {*prompt, *output}:
        found[token] = (
            found[token] / spec.penalties.repetition if found[token] > 0 else found[token] * spec.penalties.repetition
        )
    for token, count in Counter(output).items():
        found[token] -= count * spec.penalties.frequency + spec.penalties.presence
    return found


def edited(sampler: Sampler, ops: Ops, logits: Any, rows: Sequence[int], positions: Sequence[int]) -> Any:
    """The logits as sampling sees them."""
    array = ops.array(logits, "float32")
    sampler.sample(array, rows, positions)
    return ops.to_numpy(array)


SPECS = {
    "repetition": SamplingSpec(penalties=PenaltySpec(repetition=1.7)),
    "repetition below one": SamplingSpec(penalties=PenaltySpec(repetition=0.6)),
    "frequency": SamplingSpec(penalties=PenaltySpec(frequency=0.3)),
    "negative frequency": SamplingSpec(penalties=PenaltySpec(frequency=-0.25)),
    "presence": SamplingSpec(penalties=PenaltySpec(presence=0.9)),
    "negative presence": SamplingSpec(penalties=PenaltySpec(presence=-1.1)),
    "all": SamplingSpec(penalties=PenaltySpec(repetition=1.3, frequency=0.7, presence=-0.4)),
    "bias first": SamplingSpec(
        penalties=PenaltySpec(repetition=1.5), logit_bias=tuple((token, -6.0) for token in range(0, 400, 7))
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_each_penalty_is_its_formula(ops: Ops, name: str) -> None:
    """Token 5 stands in the prompt alone, 6 in both, 7 was generated once, 8 three times; the others never occurred."""
    prompt, output = [5, 6, 5, 49], [6, 7, 8, 8, 8]
    logits = np.tile(np.float32([2.5, -1.5, 0.0]), VOCABULARY)[:VOCABULARY]
    logits = np.stack([logits, np.roll(logits, 1), np.roll(logits, 2)])  # each token positive, negative and zero
    sampler = full_sampler(ops, 4)
    for row in (1, 2, 3):
        sampler.add(new_row(row, prompt, SPECS[name], output))
    found = edited(sampler, ops, logits, [1, 2, 3], [9, 9, 9])
    expected = np.stack([penalised(one, prompt, output, SPECS[name]) for one in logits])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert not np.array_equal(found, logits)


def test_repetition_is_that_of_transformers(ops: Ops) -> None:
    rng = random.Random(2)
    for penalty in (0.5, 0.8, 1.2, 2.0):
        judge = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        token_ids = [rng.randrange(VOCABULARY) for _ in range(150)]
        logits = normal_logits(int(10 * penalty), 1, VOCABULARY)
        sampler = full_sampler(ops, 1)
        sampler.add(new_row(0, token_ids[:90], SamplingSpec(penalties=PenaltySpec(repetition=penalty)), token_ids[90:]))
        expected = judge(torch.tensor([token_ids]), torch.tensor(logits)).numpy()
        assert np.array_equal(edited(sampler, ops, logits, [0], [150]), expected)


def test_rows_with_and_without_penalties_over_many_tokens(ops: Ops) -> None:
    """Rows in any order, prompts with more than 64 (and more than 128) distinct tokens, and tokens counted while the
    sequence grows."""
    rng, draw = np.random.default_rng(5), random.Random(5)
    specs = [*SPECS.values(), SamplingSpec(), SamplingSpec(temperature=0.0)]
    sampler = full_sampler(ops, len(specs))
    prompts = {row: [draw.randrange(VOCABULARY) for _ in range(draw.choice([1, 60, 64, 65, 130, 300]))]
               for row in range(len(specs))}  # fmt: skip
    outputs: dict[int, list[int]] = {row: [draw.randrange(30) for _ in range(draw.randrange(3))] for row in prompts}
    for row, spec in enumerate(specs):
        sampler.add(new_row(row, prompts[row], spec, outputs[row]))
    for step in range(120):
        rows = draw.sample(range(len(specs)), draw.randint(1, len(specs)))
        for row in rows:
            outputs[row].append(draw.randrange(VOCABULARY) if step % 2 else draw.randrange(5))
            sampler.on_token(row, outputs[row][-1])
        if step % 10 in (0, 1):
            logits = 3 * rng.standard_normal((len(rows), VOCABULARY), np.float32)
            found = edited(sampler, ops, logits, rows, [len(prompts[row]) + len(outputs[row]) for row in rows])
            for index, row in enumerate(rows):
                expected = penalised(logits[index], prompts[row], outputs[row], specs[row])
                np.testing.assert_allclose(found[index], expected, rtol=0, atol=3e-5)


# End to end.


PROMPTS = [[10, 11, 12, 10, 11], [40] * 9, [7, 200, 31, 90, 91, 92, 93, 94, 95, 96, 97, 98]]


def test_greedy_with_repetition_is_that_of_transformers(model: Path, judge: Any) -> None:
    penalties = [1.15, 1.4, 0.9]
    params = [
        SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, repetition_penalty=one) for one in penalties
    ]
    with LLM(model=str(model), dtype="float32") as llm:
        outputs = llm.generate([*PROMPTS], params, use_tqdm=False)
    for prompt, penalty, output in zip(PROMPTS, penalties, outputs, strict=True):
        expected = judge.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=48,
            min_new_tokens=48, repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("overlap", [False, True])
def test_each_greedy_token_is_the_best_of_the_penalised_logits(model: Path, judge: Any, overlap: bool) -> None:
    """Teacher-forced: transformers gives the logits of the same tokens, the formula penalises them. One of the rows in
    the batch has no penalty."""
    specs = [
        SamplingSpec(penalties=PenaltySpec(frequency=0.6)),
        SamplingSpec(penalties=PenaltySpec(presence=1.5, repetition=1.2)),
        SamplingSpec(),
        SamplingSpec(penalties=PenaltySpec(frequency=-0.5, presence=-1.0)),
    ]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=40, ignore_eos=True, repetition_penalty=one.penalties.repetition,
            frequency_penalty=one.penalties.frequency, presence_penalty=one.penalties.presence,
        )
        for one in specs
    ]  # fmt: skip
    prompts = [*PROMPTS, [20, 21]]
    with LLM(model=str(model), dtype="float32", async_scheduling=overlap) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, spec, output in zip(prompts, specs, outputs, strict=True):
        chosen = output.outputs[0].token_ids
        assert len(chosen) == 40
        with torch.no_grad():
            logits = judge(torch.tensor([[*prompt, *chosen]])).logits[0].numpy()
        for place, token in enumerate(chosen):
            expected = penalised(logits[len(prompt) + place - 1], prompt, chosen[:place], spec)
            assert expected[token] > expected.max() - 1e-3
