"""What is written over other operations: one definition for every provider."""

from typing import Any

import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, Ops, Provider
from tests.ops.cases import normal


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
    providers: list[Provider] = [cpu, ReferenceOps(np), ReferenceOps(torch)]
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
