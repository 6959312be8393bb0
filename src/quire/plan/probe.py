"""Measure this machine's kernels for two seconds: `MachineRates`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from quire.ops.cpu import CpuOps
from quire.ops.types import AttentionBatch, AttentionSpec, CacheDtype, CacheShape, Provider, QuantSpec
from quire.plan.machine import FLOATS, QUANTIZED, Points

SIDE = 1024
"""Outputs and inputs of the weight that is multiplied."""
ROWS = (1, 4, 16, 64, 128, 512)
READ_BYTES = (2**24, 2**26, 2**28)
SLICE_BYTES = 2**22
READ_ALL = 2**29
"""Bytes that are read of each size; what is smaller is read again and again."""
LEAST_S, TIMINGS = 0.003, 5
"""Of one timing, and how many of which the best counts: so short that on a busy machine some are undisturbed."""
HEADS, KV_HEADS, HEAD_DIM, KEYS, BLOCK = 8, 4, 64, 1024, 16
QUERIES = 128


def probe_reads(probe: Callable[[str, Any], int], clock: Callable[[], float]) -> Points:
    """Bytes a second by size: what a cache holds is read faster."""
    data = np.ones(READ_BYTES[-1], np.uint8)
    found = []
    for size in READ_BYTES:
        times = []
        for start in range(0, READ_ALL, SLICE_BYTES):
            part = data[start % size : start % size + SLICE_BYTES]
            begun = clock()
            probe("read", part)
            times.append(clock() - begun)
        undisturbed = sorted(times[size // SLICE_BYTES - 1 :])  # once through: what is smaller is in a cache then
        found.append((size, SLICE_BYTES / undisturbed[len(undisturbed) // 4]))
    return tuple(found)


def probe_linear(ops: Provider, clock: Callable[[], float]) -> Mapping[str, Points]:
    """Operations a second of a GEMM by format and rows, its weight in the cache."""
    dice = np.random.default_rng(0)
    weight = dice.standard_normal((SIDE, SIDE), np.float32)
    inputs = dice.standard_normal((ROWS[-1], SIDE), np.float32)
    found: dict[str, Points] = {}
    weights: dict[str, Any] = {name: ops.pack_linear(weight, None, name) for name in FLOATS}
    for kind in QUANTIZED:
        quantized = ops.quantize(weight, QuantSpec(kind, 64 if kind.startswith("int4") else None))
        weights[kind] = ops.pack_linear(quantized, None, "bfloat16")
    for name, packed in weights.items():
        points = []
        for rows in ROWS:
            seconds = _least(partial(ops.linear, inputs[:rows], packed), clock)
            points.append((rows, 2 * SIDE * SIDE * rows / seconds))
        found[name] = tuple(points)
    return found


def probe_call(ops: Provider, clock: Callable[[], float]) -> float:
    """Seconds of an operation that computes next to nothing."""
    packed = ops.pack_linear(np.ones((64, 64), np.float32), None, "float32")
    x = np.ones((1, 64), np.float32)
    return _least(lambda: ops.linear(x, packed), clock)


def probe_cold(ops: CpuOps, read_bytes_per_s: float, call_s: float, clock: Callable[[], float]) -> float:
    """Seconds that a GEMM of one row takes beyond the reading of its weight and what any call takes, where the weight
    lies in memory: until the first bytes are there, and until the last thread has ended."""
    state = ops.packed_state(ops.pack_linear(np.ones((SIDE // 2, SIDE), np.float32), None, "bfloat16"))
    (one,) = state.buffers
    memory = np.ones(READ_BYTES[-1], np.uint8)
    begin, size = -memory.ctypes.data % 64, -(-len(one) // 64) * 64
    places = range(begin, len(memory) - size, size)
    weights = [ops.map_packed(state.header, [memory[place : place + len(one)].data.toreadonly()]) for place in places]
    x, times = np.ones((1, SIDE), np.float32), []
    for packed in weights:
        begun = clock()
        ops.linear(x, packed)
        times.append(clock() - begun)
    return max(0.0, sorted(times)[len(times) // 4] - size / read_bytes_per_s - call_s)


def probe_attention(ops: Provider, dtype: CacheDtype, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a key, for each head and number of it: in a step of single tokens, and in a prompt."""
    blocks = KEYS // BLOCK
    shape = CacheShape(1, blocks, BLOCK, KV_HEADS, HEAD_DIM, dtype)
    cache, spec = ops.make_cache(shape), AttentionSpec(HEAD_DIM**-0.5)
    found = []
    for tokens in (1, QUERIES):
        start = KEYS - tokens
        batch = AttentionBatch(
            positions=np.arange(start, KEYS, dtype=np.int32),
            query_starts=np.array([0, tokens], np.int32),
            starts=np.array([start], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
        )
        q, kv = (np.ones((tokens, heads, HEAD_DIM), np.float32) for heads in (HEADS, KV_HEADS))
        seconds = _least(partial(ops.attention, q, kv, kv, cache, 0, batch, spec), clock)
        keys = sum(range(start + 1, KEYS + 1))
        found.append(seconds / (HEADS * HEAD_DIM * keys))
    return found[0], found[1]


def _least(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of one call: the least of a few timings of as many as take `LEAST_S`."""
    work()
    count, best = 1, float("inf")
    for _ in range(TIMINGS):
        begun = clock()
        for _ in range(count):
            work()
        seconds = (clock() - begun) / count
        best = min(best, seconds)
        count = max(1, min(10_000, int(LEAST_S / max(seconds, 1e-9))))
    return best
