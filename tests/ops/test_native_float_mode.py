"""What an operation computes does not depend on the floating-point state of the thread that calls it, nor on that of
the thread in which its workers were made: torch, or anything else in the process, may have set either to flush."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape
from tests.ops.test_native_threads import run

TOKENS, SIZE = 600, 64
ONES = np.ones(SIZE, np.float32)


def subnormal(rng: np.random.Generator, *shape: int) -> Any:
    """Numbers below the smallest normal one, 2^-126."""
    return (rng.integers(1, 2**23, shape, dtype=np.uint32)).view(np.float32)


def flushing(work: Callable[[], Any]) -> Any:
    """What `work` gives in a thread that takes subnormal numbers for zero, and does so still when it is done."""
    results: list[Any] = []

    def body() -> None:
        if not torch.set_flush_denormal(True):
            return
        results.append(work())
        results.append(float(torch.tensor([1e-40]) * 1.0))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if not results:
        pytest.skip("this processor cannot flush")
    result, product = results
    assert product == 0.0, "the caller's own state was not put back"
    return result


def by_embed(ops: CpuOps, x: Any) -> Any:
    table = ops.pack_embedding(x, "float32")
    return lambda: ops.embed(np.arange(TOKENS, dtype=np.int32), table)


def by_linear(ops: CpuOps, x: Any) -> Any:
    identity = ops.pack_linear(np.eye(SIZE, dtype=np.float32), None, "float32")
    return lambda: ops.linear(x, identity)


def by_program(ops: CpuOps, x: Any) -> Any:
    table, identity = ops.pack_embedding(x, "float32"), ops.pack_linear(np.eye(SIZE, dtype=np.float32), None, "float32")
    forward = ops.compile(lambda ops, ids, batch, cache: ops.linear(ops.embed(ids, table), identity))
    cache = ops.make_cache(CacheShape(1, TOKENS // 8, 8, 1, SIZE, "float32"))
    numbers = np.arange(TOKENS, dtype=np.int32)
    blocks = np.arange(TOKENS // 8, dtype=np.int32)[None]
    batch = AttentionBatch(numbers, np.array([0, TOKENS], np.int32), np.zeros(1, np.int32), blocks)
    return lambda: forward(numbers, batch, cache)


def by_attention(ops: CpuOps, x: Any) -> Any:
    """Each token sees itself alone: its value, with weight 1."""
    cache = ops.make_cache(CacheShape(1, TOKENS, 16, 1, SIZE, "float32"))
    numbers = np.arange(TOKENS, dtype=np.int32)
    batch = AttentionBatch(None, np.arange(TOKENS + 1, dtype=np.int32), numbers * 0, numbers[:, None].copy())
    heads = x[:, None]
    return lambda: ops.attention(heads, heads, heads, cache, 0, batch, AttentionSpec(1.0))


def by_norm(ops: CpuOps, x: Any) -> Any:
    def add() -> Any:
        residual = np.zeros_like(x)
        ops.add_rms_norm(x, residual, ONES, 1e-5)
        return residual

    return add


@pytest.mark.parametrize("operation", [by_embed, by_linear, by_program, by_attention, by_norm])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", instruction_sets())
def test_a_caller_that_flushes_gets_the_same_bits(
    isa: str, threads: int, operation: Callable[[CpuOps, Any], Any]
) -> None:
    x = subnormal(np.random.default_rng(0), TOKENS, SIZE)
    work = operation(CpuOps(threads, isa), x)
    assert np.array_equal(work().view(np.uint32), x.view(np.uint32))  # each of them is the identity
    assert np.array_equal(flushing(work).view(np.uint32), x.view(np.uint32))


def test_workers_made_by_a_thread_that_flushes_do_not() -> None:
    run("""
    import torch

    if torch.set_flush_denormal(True):
        ops = CpuOps(4, instruction_sets()[-1])
        torch.set_flush_denormal(False)
        x = rng.integers(1, 2**23, (4000, 64), dtype=np.uint32).view(np.float32)
        identity = ops.pack_linear(np.eye(64, dtype=np.float32), None, "float32")
        for _ in range(20):
            assert np.array_equal(ops.linear(x, identity).view(np.uint32), x.view(np.uint32))
    """)
