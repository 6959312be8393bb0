"""Wrong shapes, types and indices are refused before anything is read; empty input gives an empty result."""

from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, SampleBatch


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def attention_with(ops: CpuOps, **changes: Any) -> Any:
    """Two rows of two and one tokens over a cache of four blocks of 16, with the given arguments changed."""
    cache = ops.make_cache(CacheShape(2, 4, 16, 1, 8, "float32"))
    values = {
        "q": zeros(3, 2, 8), "k": zeros(3, 1, 8), "v": zeros(3, 1, 8), "layer": 1, "query_starts": ints(0, 2, 3),
        "starts": ints(0, 16), "tables": np.array([[0, -1], [3, 1]], np.int32), "window": None, "sinks": None,
    }  # fmt: skip
    values.update(changes)
    batch = AttentionBatch(None, values["query_starts"], values["starts"], values["tables"])
    spec = AttentionSpec(1.0, values["window"], None, values["sinks"])
    return ops.attention(values["q"], values["k"], values["v"], cache, values["layer"], batch, spec)


def test_the_unchanged_call_is_right(cpu: CpuOps) -> None:
    assert attention_with(cpu).shape == (3, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": 2},
        {"layer": -1},
        {"q": zeros(3, 2, 16)},
        {"q": zeros(2, 2, 8)},
        {"q": zeros(3, 2, 8).astype(np.float64)},
        {"q": zeros(3, 8, 2).transpose(0, 2, 1)},
        {"k": zeros(3, 2, 8)},
        {"k": zeros(2, 1, 8)},
        {"v": zeros(3, 1, 4)},
        {"query_starts": ints(0, 2, 4)},
        {"query_starts": ints(0, 5, 3)},
        {"query_starts": ints(1, 2, 3)},
        {"query_starts": ints(0, 3)},
        {"query_starts": np.array([0, 2, 3], np.int64)},
        {"starts": ints(0, -1)},
        {"starts": ints(0, 2**31 - 1)},
        {"starts": ints(0, 32)},
        {"starts": ints(0)},
        {"tables": np.array([[0, -1], [3, 4]], np.int32)},
        {"tables": np.array([[0, -1], [3, -1]], np.int32)},
        {"tables": np.array([[0], [3]], np.int32)},
        {"tables": ints(0, 1)},
        {"window": 0},
        {"sinks": zeros(3)},
    ],
    ids=str,
)
def test_attention_refuses(cpu: CpuOps, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        attention_with(cpu, **changes)


CALLS: list[Callable[[CpuOps], Any]] = [
    lambda ops: ops.linear(zeros(3, 4), ops.pack_linear(zeros(2, 5), None, "float32")),
    lambda ops: ops.linear(zeros(4), ops.pack_linear(zeros(2, 4), None, "float32")),
    lambda ops: ops.pack_linear(zeros(2, 4), zeros(3), "float32"),
    lambda ops: ops.embed(ints(0, 2), ops.pack_embedding(zeros(2, 4), "bfloat16")),
    lambda ops: ops.embed(ints(-1), ops.pack_embedding(zeros(2, 4), "bfloat16")),
    lambda ops: ops.embed(np.array([0]), ops.pack_embedding(zeros(2, 4), "bfloat16")),
    lambda ops: ops.rms_norm(zeros(3, 4), zeros(5), 1e-5),
    lambda ops: ops.add_rms_norm(zeros(3, 4), zeros(2, 4), zeros(4), 1e-5),
    lambda ops: ops.layer_norm(zeros(3, 4), zeros(4), zeros(3), 1e-5),
    lambda ops: ops.activation_multiply(zeros(2, 5), "silu"),
    lambda ops: ops.logprobs(zeros(2, 5), ints(0, 5), 1),
    lambda ops: ops.logprobs(zeros(2, 5), ints(0, 1), 6),
    lambda ops: ops.logprobs(zeros(2, 5), ints(0), 1),
    lambda ops: ops.make_cache(CacheShape(1, 0, 16, 1, 8, "float32")),
    lambda ops: ops.block_bytes(ops.make_cache(CacheShape(1, 4, 16, 1, 8, "float32")), 4, 0),
    lambda ops: ops.block_bytes(ops.make_cache(CacheShape(1, 4, 16, 1, 8, "float32")), -1, 0),
    lambda ops: ops.block_bytes(ops.make_cache(CacheShape(1, 4, 16, 1, 8, "float32")), 0, 1),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_other_operations_refuse(cpu: CpuOps, number: int) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        CALLS[number](cpu)


def test_a_cache_larger_than_memory_is_a_memory_error(cpu: CpuOps) -> None:
    with pytest.raises(MemoryError):
        cpu.make_cache(CacheShape(2**20, 2**30, 2**20, 2**10, 256, "float32"))


def test_cache_memory_is_real_only_once_written(cpu: CpuOps) -> None:
    before = psutil.Process().memory_info().rss
    cache = cpu.make_cache(CacheShape(1, 2**16, 16, 8, 128, "bfloat16"))
    assert cache.bytes == 2**32
    assert psutil.Process().memory_info().rss - before < 2**26


def test_empty_input_gives_an_empty_result(cpu: CpuOps) -> None:
    packed = cpu.pack_linear(zeros(5, 4), None, "bfloat16")
    assert cpu.linear(zeros(0, 4), packed).shape == (0, 5)
    assert cpu.embed(ints(), packed).shape == (0, 4)
    assert cpu.activation_multiply(zeros(0, 6), "gelu").shape == (0, 3)
    none = zeros(0)
    batch = SampleBatch(none, ints(), none, none, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    assert cpu.sample(zeros(0, 7), batch).shape == (0,)
    assert cpu.logprobs(zeros(0, 7), ints(), 2).top_ids.shape == (0, 2)
    no_tables = np.zeros((0, 0), np.int32)
    result = attention_with(
        cpu, q=zeros(0, 2, 8), k=zeros(0, 1, 8), v=zeros(0, 1, 8), query_starts=ints(0), starts=ints(), tables=no_tables
    )
    assert result.shape == (0, 16)
