"""Sampling against a reference of its own: Philox and the Gumbel maximum in plain Python, from the papers' constants.

The lists of tokens below are pinned: a request with a seed gives the same tokens in every version of Quire, or the
change is one for users.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire import LLM, SamplingParams
from quire.core.request import SamplingSpec
from quire.ops import sampling_reference
from quire.ops.reference import ReferenceOps
from quire.ops.types import Ops
from tests.sampling.known_rows import full_sampler, new_row

PINNED: dict[tuple[int, int], list[int]] = {
    # (seed, first position) -> sixteen tokens, one at each position
    (0, 1): [45, 49, 46, 95, 56, 75, 34, 5, 57, 60, 57, 17, 79, 42, 54, 13],
    (7, 1): [84, 27, 62, 65, 60, 84, 85, 19, 38, 95, 85, 27, 68, 44, 94, 95],
    (7, 5): [60, 84, 85, 19, 38, 95, 85, 27, 68, 44, 94, 95, 35, 0, 59, 85],
    (2**32 + 7, 1): [87, 68, 24, 70, 54, 7, 53, 8, 4, 8, 67, 70, 5, 24, 90, 79],
    (2**63 + 7, 2**32 + 1): [1, 49, 87, 65, 14, 10, 49, 99, 49, 72, 65, 89, 67, 90, 87, 18],
}


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11), section 3.3."""
    (a, b, c, d), (left, right) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ left, second % 2**32, (first >> 32) ^ d ^ right, first % 2**32
        left, right = (left + 0x9E3779B9) % 2**32, (right + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def noise(seed: int, position: int, token: int) -> float:
    """Standard Gumbel (arXiv 1411.0030), a function of seed, position and token id (docs/design/decisions.md)."""
    counter = [position % 2**32, position >> 32, token // 4, int.from_bytes(b"QUIR", "big")]
    word = philox(counter, [seed % 2**32, seed >> 32])[token % 4]
    uniform = min((word + 0.5) / 2**32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


def sampled(logits: Any, seed: int, position: int, temperature: float = 1.0) -> int:
    scores = [float(one) / temperature + noise(seed, position, token) for token, one in enumerate(logits)]
    return max(range(len(scores)), key=scores.__getitem__)


def known_logits() -> Any:
    return np.array([((token * 37) % 101) / 40 for token in range(101)], np.float32)


def test_the_reference_gives_the_published_words() -> None:
    """Known answers of the authors' library, Random123."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize(("seed", "first"), PINNED)
def test_pinned_samples(ops: Ops, seed: int, first: int) -> None:
    expected = [sampled(known_logits(), seed, position) for position in range(first, first + 16)]
    assert expected == PINNED[seed, first], "the reference itself"
    sampler = full_sampler(ops, 1)
    sampler.add(new_row(0, [1], SamplingSpec(temperature=1.0, seed=seed)))
    found = []
    for position in range(first, first + 16):
        logits = ops.array(known_logits()[None], "float32")
        found += sampler.sample(logits, [0], [position]).read([0])[0].token_ids
    assert found == expected


def test_rows_of_one_step_sample_by_their_own_numbers(ops: Ops) -> None:
    """Permanent rows in any order, each with its seed, position and temperature; one of them greedy."""
    temperatures, order = [0.7, 1.0, 0.0, 1.9, 0.3], [3, 0, 4, 2, 1]
    sampler = full_sampler(ops, 5)
    for row, temperature in enumerate(temperatures):
        sampler.add(new_row(row, [1], SamplingSpec(temperature=temperature, seed=1000 + row)))
    for start in range(0, 60, 6):
        positions = [start + row for row in order]
        logits = ops.array(np.tile(known_logits(), (5, 1)), "float32")
        results = sampler.sample(logits, order, positions).read(range(5))
        for row, position, result in zip(order, positions, results, strict=True):
            if temperatures[row] == 0:
                expected = int(known_logits().argmax())
            else:
                expected = sampled(known_logits(), 1000 + row, position, temperatures[row])
            assert result.token_ids == (expected,)


def kept(logits: Any, spec: SamplingSpec) -> list[int]:
    """The cut-offs in their order, in float64: min_p, of those the top_k, of those as many as reach top_p."""
    scaled = (logits.astype(np.float64) - logits.max()) / spec.temperature
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    order = [token for token in order if np.exp(scaled[token]) >= spec.min_p][: spec.top_k or None]
    total, before, found = sum(np.exp(scaled[order])), 0.0, []
    for token in order:
        if before < spec.top_p * total:
            found.append(token)
        before += np.exp(scaled[token])
    return found


def test_rows_of_one_step_cut_off_by_their_own_numbers(ops: Ops) -> None:
    settings: list[dict[str, Any]] = [
        {"top_p": 0.13}, {"top_p": 0.4}, {"top_p": 0.75}, {"top_k": 3}, {"top_k": 20}, {"min_p": 0.3}, {"min_p": 0.77},
        {"top_k": 30, "top_p": 0.6, "min_p": 0.2}, {"top_p": 0.3, "temperature": 0.5}, {},
    ]  # fmt: skip
    specs = [SamplingSpec(**{"temperature": 1.0, "seed": 50 + row, **one}) for row, one in enumerate(settings)]
    sampler, order = full_sampler(ops, len(specs)), [(3 * row) % len(specs) for row in range(len(specs))]
    for row, spec in enumerate(specs):
        sampler.add(new_row(row, [1], spec))
    logits, rng = known_logits(), np.random.default_rng(0)
    logits += rng.standard_normal(len(logits), np.float32) / 100  # no ties, and no mass at an edge
    for position in range(1, 60):
        array = ops.array(np.tile(logits, (len(specs), 1)), "float32")
        results = sampler.sample(array, order, [position] * len(order)).read(range(len(order)))
        for row, result in zip(order, results, strict=True):
            spec = specs[row]
            scores = {
                token: logits[token] / spec.temperature + noise(spec.seed, position, token)
                for token in kept(logits, spec)
            }
            assert result.token_ids == (max(scores, key=scores.__getitem__),)


def test_the_largest_word_gives_noise_that_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to float32 it would be 1, and its token could never be sampled."""
    xp = ReferenceOps(np).xp
    for word in (0, 1, 2**31, 2**32 - 256, 2**32 - 1):
        words = tuple(np.full(1, word, np.int64) for _ in range(4))
        monkeypatch.setattr(sampling_reference, "philox", lambda *_, words=words: words)
        found = sampling_reference.gumbel(xp, 0, 0, np.zeros(4, np.float32))
        uniform = min((word + 0.5) / 2**32, 1 - 2.0**-24)
        np.testing.assert_allclose(found, -math.log(-math.log1p(-uniform)), rtol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_generation_is_the_reference_over_the_logits_of_transformers(model: Path, judge: Any, overlap: bool) -> None:
    """End to end, each token sampled with the noise of its index in the sequence, whatever the length of the prompt."""
    prompts = [[10], [11, 12, 13, 14, 15, 16], [30 + place for place in range(40)]]
    params = [
        SamplingParams(temperature=temperature, seed=seed, max_tokens=20, ignore_eos=True)
        for seed, temperature in ((3, 1.0), (2**62, 0.8), (5, 1.3))
    ]
    with LLM(model=str(model), dtype="float32", async_scheduling=overlap, max_num_batched_tokens=16) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        chosen = output.outputs[0].token_ids
        with torch.no_grad():
            logits = judge(torch.tensor([[*prompt, *chosen]])).logits[0].numpy()
        expected = [
            sampled(logits[position - 1], one.seed, position, one.temperature)
            for position in range(len(prompt), len(prompt) + 20)
        ]
        assert chosen == expected
