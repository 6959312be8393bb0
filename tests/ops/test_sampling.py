import math
from typing import Any

import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.sampling_reference import kept_tokens, philox
from quire.ops.types import SampleBatch
from tests.ops.cases import normal

REFERENCE = ReferenceOps(np)


def batch(rows: int, *, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0) -> SampleBatch:
    """Each value for every row, or a list of one for each; seeds and positions beyond 32 bits."""
    return SampleBatch(
        *(
            np.array(np.broadcast_to(np.asarray(value, dtype), rows))
            for value, dtype in (
                (temperature, np.float32),
                (top_k, np.int32),
                (top_p, np.float32),
                (min_p, np.float32),
                (2**63 + 3 * np.arange(rows, dtype=np.uint64), np.uint64),
                (2**33 + np.arange(rows), np.int64),
            )
        )
    )


def test_philox_gives_the_published_words() -> None:
    """Known answers of the authors' library, Random123."""
    zero, ones = np.zeros(1, np.int64), np.full(1, 0xFFFFFFFF)
    pi = [np.array([word]) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    answers = [
        ((zero,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (tuple(pi), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, key, expected in answers:
        assert " ".join(f"{int(word[0]):08x}" for word in philox(counter, key)) == expected


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 1000, 50_003])
def test_sampling_equals_the_reference(cpu: CpuOps, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    for case in (
        {},
        {"temperature": 0.0},
        {"temperature": [1e-6, 0.3, 1.0, 5.0] * 2},
        {"top_k": [1, 2, 5, 50, 999, 1000, 2_000_000, 3]},
        {"top_p": [1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0, 0.3]},
        {"min_p": [1e-6, 0.01, 0.1, 0.5, 1.0, 0.2, 0.3, 0.9]},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ):
        logits = 4 * normal(rng, 8, vocabulary)
        logits[1, rng.random(vocabulary) < 0.5] = -np.inf
        logits[2] = np.round(logits[2])  # many ties
        logits[3] = 1.0
        logits[4, vocabulary // 2] = 80.0
        logits[1:5, 0] = np.maximum(logits[1:5, 0], -10.0)
        rows = batch(8, **case)
        assert np.array_equal(cpu.sample(logits, rows), REFERENCE.sample(logits, rows)), case


def test_sampling_on_torch_is_the_same() -> None:
    logits = 3 * normal(np.random.default_rng(0), 4, 500)
    rows = batch(4, temperature=[0.0, 1.0, 0.7, 2.0], top_k=[0, 0, 20, 0], top_p=[1, 0.8, 1, 0.9], min_p=0.001)
    names = SampleBatch.__slots__
    tensors = SampleBatch(*(torch.from_numpy(getattr(rows, name)) for name in names))
    sampled = ReferenceOps(torch).sample(torch.from_numpy(logits), tensors)
    assert np.array_equal(sampled.numpy(), REFERENCE.sample(logits, rows))


def test_samples_follow_the_softmax(cpu: CpuOps) -> None:
    """Chi-square over 40,000 samples; the bound is passed by chance once in about a million."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, -np.inf], np.float32)
    for temperature in (1.0, 0.5):
        p = np.exp(logits.astype(np.float64) / temperature)
        p /= p.sum()
        rows = batch(40_000, temperature=temperature)
        counts = np.bincount(cpu.sample(np.tile(logits, (40_000, 1)), rows), minlength=8)
        assert counts[7] == 0
        assert ((counts[:7] - 40_000 * p[:7]) ** 2 / (40_000 * p[:7])).sum() < 39.0  # 6 degrees of freedom


def seen(cpu: CpuOps, logits: list[float], count: int = 4000, **case: Any) -> set[int]:
    return set(cpu.sample(np.tile(np.float32(logits), (count, 1)), batch(count, **case)).tolist())


def test_the_kept_sets(cpu: CpuOps) -> None:
    even = [0.0] * 10
    log = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert seen(cpu, even, top_k=3) == {0, 1, 2}
    assert seen(cpu, even, top_p=0.5) == {0, 1, 2, 3, 4}
    assert seen(cpu, even, top_p=0.51) == {0, 1, 2, 3, 4, 5}
    assert seen(cpu, even, top_p=1e-9) == {0}
    assert seen(cpu, log, top_p=0.69) == {0, 1}
    assert seen(cpu, log, top_p=0.71) == {0, 1, 2}
    assert seen(cpu, log, min_p=0.26) == {0, 1, 2}
    assert seen(cpu, log, min_p=1.0) == {0}
    assert seen(cpu, log, top_k=3, top_p=0.75) == {0, 1}  # of the mass that top_k left: 0.4 + 0.3 of 0.9
    assert seen(cpu, log, min_p=0.3, top_p=0.75) == {0, 1}  # and of what min_p left
    assert seen(cpu, [0.0, 5.0, 5.0, 5.0], top_k=2) == {1, 2}
    assert seen(cpu, [1.0, 7.0, 7.0], temperature=0.0) == {1}


def test_kept_tokens_by_brute_force() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        scaled = np.round(normal(rng, 30), 1)
        scaled -= scaled.max()
        top_k, top_p, min_p = int(rng.integers(0, 12)), float(rng.uniform(0.05, 1.0)), float(rng.uniform(0, 0.3))
        order = sorted(range(30), key=lambda i: (-scaled[i], i))
        order = [i for i in order if math.exp(scaled[i]) >= min_p][: top_k or None]
        mass, kept, total = 0.0, set(), sum(math.exp(scaled[i]) for i in order)
        for i in order:
            if mass < top_p * total:
                kept.add(i)
            mass += math.exp(scaled[i])
        assert set(np.nonzero(kept_tokens(REFERENCE.xp, scaled, top_k, top_p, min_p))[0].tolist()) == kept


def test_a_mass_that_reaches_top_p_exactly_is_enough(cpu: CpuOps) -> None:
    """Ten equal tokens, of which five make half of the mass; eight, of which two make a quarter."""
    for size, top_p, count in ((10, 0.5, 5), (8, 0.25, 2), (4, 0.75, 3), (2, 0.5, 1)):
        for top_k in (0, size):
            kept = kept_tokens(REFERENCE.xp, np.zeros(size, np.float32), top_k, top_p, 0.0)
            assert kept.tolist() == [token < count for token in range(size)]
            assert seen(cpu, [0.0] * size, top_k=top_k, top_p=top_p) == set(range(count))


def test_extreme_logits(cpu: CpuOps) -> None:
    huge = np.float32(3e38)
    logits = np.array([[huge, -huge, 0, -np.inf], [-huge] * 3 + [-np.inf], [-np.inf] * 4, [-np.inf] * 3 + [5]])
    for case in ({}, {"temperature": 0.0}, {"temperature": 1e-30}, {"top_p": 0.5, "top_k": 2, "min_p": 0.1}):
        sampled = cpu.sample(logits.astype(np.float32), batch(4, **case))
        assert sampled[0] == 0 and sampled[1] in (0, 1, 2) and sampled[2] == 0 and sampled[3] == 3
    broken = np.array([[np.nan, 1, 2], [np.inf, np.nan, np.inf], [np.nan] * 3], np.float32)
    for case in ({}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 2, "min_p": 0.1}):
        assert all(0 <= token < 3 for token in cpu.sample(broken, batch(3, **case)))


def test_a_sample_does_not_depend_on_other_rows(cpu: CpuOps) -> None:
    logits = normal(np.random.default_rng(4), 20, 3000)
    rows = batch(20, top_p=0.95)
    together = cpu.sample(logits, rows)
    for row in range(20):
        alone = SampleBatch(*(getattr(rows, name)[row : row + 1] for name in SampleBatch.__slots__))
        assert cpu.sample(logits[row : row + 1], alone)[0] == together[row]


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 5003])
def test_logprobs_equal_the_reference(cpu: CpuOps, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = 3 * normal(rng, 5, vocabulary + 2)[:, :vocabulary]
    logits[1] = np.round(logits[1])
    logits[2, 1:] = -np.inf
    logits[3] *= 1e4
    ids = rng.integers(0, vocabulary, 5).astype(np.int32)
    for num_top in {0, 1, min(5, vocabulary), vocabulary}:
        actual, expected = (ops.logprobs(logits, ids, num_top) for ops in (cpu, REFERENCE))
        assert np.array_equal(actual.rank, expected.rank)
        assert np.array_equal(actual.top_ids, expected.top_ids)
        for name in ("chosen", "top_logprobs"):
            assert np.allclose(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-5)
        alone = cpu.logprobs(logits[3:4], ids[3:4], num_top)
        assert alone.chosen[0] == actual.chosen[3]
    torch_logits, torch_ids = torch.tensor(logits), torch.tensor(ids)
    on_torch = ReferenceOps(torch).logprobs(torch_logits, torch_ids, 1)
    assert np.allclose(on_torch.chosen.numpy(), expected.chosen, rtol=0, atol=1e-5)
    best = torch.log_softmax(torch_logits, dim=-1).max(dim=-1).values
    assert np.allclose(on_torch.top_logprobs[:, 0].numpy(), best.numpy(), rtol=0, atol=1e-5)


def test_the_best_token_of_broken_rows_is_nought(cpu: CpuOps) -> None:
    """`greedy` over a head of three tokens, which spoiled inputs make NaN, infinite, or nothing but -inf."""
    weight = np.array([[1, 0], [0, 1], [2, 2]], np.float32)
    x = np.array([[1, 3], [np.nan, 1], [np.inf, 1], [-np.inf, -np.inf], [-1, -3], [3, -2]], np.float32)
    for ops in (cpu, REFERENCE, ReferenceOps(torch)):
        packed = ops.pack_embedding(weight, "float32")
        with np.errstate(invalid="ignore"):
            tokens, finite = (ops.to_numpy(found).tolist() for found in ops.greedy(ops.array(x, "float32"), packed))
        assert tokens == [2, 0, 0, 0, 0, 0]
        assert finite == [True, False, False, False, True, True]


def test_rows_finite(cpu: CpuOps) -> None:
    rows = np.zeros((6, 70), np.float32)
    rows[1, 69], rows[2, 0], rows[3, 5] = np.nan, np.inf, -np.inf
    rows[4], rows[5, :69] = -np.inf, -np.inf
    for ops in (cpu, REFERENCE):
        assert ops.rows_finite(rows).tolist() == [True, False, False, True, False, True]
    assert ReferenceOps(torch).rows_finite(torch.tensor(rows)).tolist() == [True, False, False, True, False, True]
