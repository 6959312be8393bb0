"""Decode attention over a cache in each type: one step of one token, calls of all types in turn.

    python benchmarks/cache_formats.py [--tokens 8192] [--heads 9,3,64] [--threads 1] [--isa avx512] [--json]

Each call reads another layer, and all layers together are more than any cache of the processor holds. Printed are the
median time, the tenth percentile, and the median of the ratios of neighbouring calls to the first type's.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionBatch, AttentionSpec, CacheDtype, CacheShape

TYPES: tuple[CacheDtype, ...] = ("bfloat16", "int8", "fp8")
MEMORY_BYTES = 200 << 20
BLOCK_SIZE = 16


def decode_step(ops: CpuOps, dtype: CacheDtype, tokens: int, heads: tuple[int, int, int]) -> Callable[[int], object]:
    """`step(turn)`: one new token behind `tokens` others, in the layer of that turn."""
    query_heads, kv_heads, dim = heads
    blocks = -(-(tokens + 1) // BLOCK_SIZE)
    one = CacheShape(1, blocks, BLOCK_SIZE, kv_heads, dim, dtype)
    layers = max(1, MEMORY_BYTES // (one.bytes_per_block * blocks))
    cache = ops.make_cache(CacheShape(layers, blocks, BLOCK_SIZE, kv_heads, dim, dtype))
    tables = np.arange(blocks, dtype=np.int32)[None]

    def batch(first: int, last: int) -> AttentionBatch:
        bounds, starts = np.array([0, last - first], np.int32), np.array([first], np.int32)
        return AttentionBatch(np.arange(first, last, dtype=np.int32), bounds, starts, tables)

    rng = np.random.default_rng(0)

    def vectors(count: int) -> list[Any]:
        return [rng.standard_normal((count, n, dim), dtype=np.float32) for n in (query_heads, kv_heads, kv_heads)]

    known, new, spec = vectors(tokens), vectors(1), AttentionSpec(dim**-0.5)
    for layer in range(layers):
        ops.attention(*known, cache, layer, batch(0, tokens), AttentionSpec(1.0, window=1))
    step = batch(tokens, tokens + 1)
    return lambda turn: ops.attention(*new, cache, turn % layers, step, spec)


def measure(steps: dict[CacheDtype, Callable[[int], object]], turns: int) -> dict[CacheDtype, list[float]]:
    """Seconds of each call, in turn."""
    times: dict[CacheDtype, list[float]] = {dtype: [] for dtype in steps}
    for turn in range(turns):
        for dtype, step in steps.items():
            begun = time.perf_counter()
            step(turn)
            times[dtype].append(time.perf_counter() - begun)
    return times


def main() -> None:
    """Print a line for each type."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", default="9,3,64", help="of queries, of keys and values, dimensions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=instruction_sets()[-1], choices=instruction_sets())
    parser.add_argument("--types", nargs="+", default=TYPES, choices=get_args(CacheDtype))
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    query_heads, kv_heads, dim = map(int, options.heads.split(","))
    ops = CpuOps(options.threads, options.isa)
    steps = {one: decode_step(ops, one, options.tokens, (query_heads, kv_heads, dim)) for one in options.types}
    times = measure(steps, options.turns)
    first = times[options.types[0]]
    found = {
        dtype: {
            "median_us": statistics.median(those) * 1e6,
            "p10_us": sorted(those)[len(those) // 10] * 1e6,
            "times_as_fast": statistics.median(a / b for a, b in zip(first, those, strict=True)),
        }
        for dtype, those in times.items()
    }
    setting = {**vars(options), "provider": ops.name, "load": os.getloadavg()[0]}
    if options.json:
        print(json.dumps({"setting": setting, "types": found}))
        return
    print(f"{ops.name}, {options.tokens} tokens, heads {options.heads}, load {setting['load']:.1f}")
    for dtype, one in found.items():
        numbers = "  ".join(f"{name} {value:.2f}" for name, value in one.items())
        print(f"{dtype:<9} {numbers}")


if __name__ == "__main__":
    main()
