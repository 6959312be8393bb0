"""Mixture of experts, adapters and pooling: one definition for every provider, over its own products."""

from typing import Any

import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, Ops
from tests.ops.cases import normal, relative_error


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_moe_is_the_weighted_sum_of_the_best_experts(cpu: CpuOps) -> None:
    rng = np.random.default_rng(0)
    x, router = normal(rng, 9, 16), normal(rng, 4, 16)
    experts = [(normal(rng, 24, 16), normal(rng, 16, 12)) for _ in range(4)]
    for normalize in (True, False):
        expected = np.zeros_like(x)
        for token, row in enumerate(x):
            p = np.exp(router @ row) / np.exp(router @ row).sum()
            best = np.argsort(-p)[:2]
            for expert in best:
                gate_up, down = experts[expert]
                y = down @ (silu((gate_up @ row)[:12]) * (gate_up @ row)[12:])
                expected[token] += p[expert] / (p[best].sum() if normalize else 1) * y
        for ops in (cpu, ReferenceOps(np), ReferenceOps(torch)):
            packed = [tuple(ops.pack_linear(w, None, "float32") for w in pair) for pair in experts]
            tokens = ops.array(x, "float32")
            result = ops.to_numpy(ops.moe(tokens, ops.pack_linear(router, None, "float32"), packed, 2, normalize))
            assert relative_error(result, expected) < 5e-5
            one = ops.to_numpy(ops.moe(tokens[4:5], ops.pack_linear(router, None, "float32"), packed, 2, normalize))
            assert ops is not cpu or np.array_equal(one[0], result[4])


def test_each_token_gets_its_own_adapter(cpu: CpuOps) -> None:
    rng = np.random.default_rng(1)
    x, base = normal(rng, 5, 8), normal(rng, 5, 6)
    pairs = [(normal(rng, 2, 8), normal(rng, 6, 2), 0.5), (normal(rng, 3, 8), normal(rng, 6, 3), 2.0)]
    ids = [2, 0, 1, 2, 0]
    expected = base.copy()
    for token, adapter in enumerate(ids):
        if adapter:
            a, b, scale = pairs[adapter - 1]
            expected[token] += scale * (b @ (a @ x[token]))
    every: list[Ops] = [cpu, ReferenceOps(np), ReferenceOps(torch)]
    for ops in every:
        packed = [(ops.pack_linear(a, None, "float32"), ops.pack_linear(b, None, "float32"), s) for a, b, s in pairs]
        y = ops.array(base, "float32")
        ops.lora(ops.array(x, "float32"), y, [None, *packed], ops.array(ids, "int32"))
        assert relative_error(ops.to_numpy(y), expected) < 2e-5
        assert np.array_equal(ops.to_numpy(y)[1], base[1])


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_row_that_is_not_finite_gets_token_0_and_says_so(cpu: CpuOps) -> None:
    weight = np.float32([[1, 0], [2, 0], [3e38, 1], [-1, 0]])
    x = np.float32([[1, 0], [10, 0], [-1, 0]])  # the third token of the second row is infinite
    for ops in (cpu, ReferenceOps(np), ReferenceOps(torch)):
        packed = ops.pack_embedding(weight, "float32")
        tokens, finite = (ops.to_numpy(one) for one in ops.greedy(ops.array(x, "float32"), packed))
        assert tokens.tolist() == [2, 0, 3] and finite.tolist() == [True, False, True]


def test_a_step_gives_the_outputs_that_are_asked_for(cpu: CpuOps) -> None:
    rng = np.random.default_rng(3)
    table, square = normal(rng, 7, 16), normal(rng, 16, 16)
    providers: list[Ops] = [cpu, ReferenceOps(np), ReferenceOps(torch)]
    for provider in providers:
        weights = provider.pack_embedding(table, "float32"), provider.pack_linear(square, None, "float32")

        def forward(ops: Ops, ids: Any, batch: AttentionBatch, cache: Any, weights: Any = weights) -> Any:
            heads = ops.linear(ops.embed(ids, weights[0]), weights[1]).reshape((-1, 4, 4))
            return ops.attention(heads[:, :2], heads[:, 2:3], heads[:, 3:], cache, 0, batch, AttentionSpec(0.5))

        ids, *ints = (
            provider.array(one, "int32") for one in ([4, 2, 6, 1], [0, 1, 2, 0], [0, 3, 4], [0, 0], [[0], [1]])
        )
        step, cache = provider.compile(forward), provider.make_cache(CacheShape(1, 2, 16, 1, 4, "float32"))
        every = provider.to_numpy(step(ids, AttentionBatch(*ints), cache))
        some = provider.to_numpy(step(ids, AttentionBatch(*ints, np.array([1, 2, 3], np.int32)), cache))
        assert every.shape == (4, 8) and np.array_equal(some, every[[1, 2, 3]])


def test_pool(cpu: CpuOps) -> None:
    x = normal(np.random.default_rng(2), 6, 4)
    for ops in (cpu, ReferenceOps(np), ReferenceOps(torch)):
        tokens, starts = ops.array(x, "float32"), ops.array([0, 1, 6], "int32")
        assert np.array_equal(ops.to_numpy(ops.pool(tokens, starts, "last")), x[[0, 5]])
        assert np.array_equal(ops.to_numpy(ops.pool(tokens, starts, "first")), x[[0, 1]])
        assert relative_error(ops.to_numpy(ops.pool(tokens, starts, "mean"))[1], x[1:].mean(axis=0)) < 2e-6
