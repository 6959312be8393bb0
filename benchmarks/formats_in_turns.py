"""A GEMM of each format in turns, by its number of rows: medians of single calls, and bfloat16's time over them.

    python benchmarks/formats_in_turns.py --rows 1 8 32 128 512 --shapes 3072x576 2048x2048
    python benchmarks/formats_in_turns.py --isa avx2 --formats int4_64 fp8_groups_128

With one thread a time is of the processor, which other processes take none of; with more it is of the wall.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.ops.types import FORMATS, QuantSpec

KINDS = ("bfloat16", "int8", "int8_w8a8", "int8_groups_64", "int4_64", "int4_32", "int4_w4a8_64", "fp8_groups_128")
COPIES_BYTES = 24 * 2**20
"""Of a weight together: more than the second level of a cache."""


def packed(ops: CpuOps, kind: str, weight: Any) -> Any:
    """`weight [out, in]` in a format; its name ends in the size of its groups, if it has any."""
    if kind == "bfloat16":
        return ops.pack_linear(weight.astype(ml_dtypes.bfloat16), None, "bfloat16")
    name, _, size = kind.rpartition("_")
    found = next(one for one in FORMATS if one in (kind, name))
    quant = QuantSpec(found, int(size) if found == name and FORMATS[found].group_sizes else None)
    return ops.pack_linear(ops.quantize(weight, quant), None, "bfloat16")


def medians(
    ops: CpuOps, weights: dict[str, list[Any]], x: Any, clock: Callable[[], float], calls: int
) -> dict[str, float]:
    """Seconds of a call by its format."""
    times: dict[str, list[float]] = {kind: [] for kind in weights}
    for turn in range(calls + 1):
        for kind, copies in weights.items():
            begun = clock()
            ops.linear(x, copies[turn % len(copies)])
            times[kind].append(clock() - begun)
    return {kind: statistics.median(found[1:]) for kind, found in times.items()}


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=["3072x576", "2048x2048"], help="outputs x inputs")
    parser.add_argument("--isa", default=instruction_sets()[-1], choices=instruction_sets())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=15)
    options = parser.parse_args()
    ops, rng = CpuOps(options.threads, options.isa), np.random.default_rng(0)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(f"{ops.name}; microseconds, medians of {options.calls} in turns")
    for shape in options.shapes:
        out, inputs = map(int, shape.split("x"))
        weight = (rng.standard_normal((out, inputs)) * 0.05).astype(np.float32)
        weights = {
            kind: [packed(ops, kind, weight) for _ in range(max(1, COPIES_BYTES // (out * inputs)))]
            for kind in options.formats
        }
        print(f"{shape:>12} " + " ".join(f"{kind:>18}" for kind in weights))
        for rows in options.rows:
            x = rng.standard_normal((rows, inputs)).astype(np.float32)
            found = medians(ops, weights, x, clock, options.calls)
            first = next(iter(found.values()))
            print(f"{rows:>12} " + " ".join(f"{1e6 * s:>11,.0f} {first / s:>6.2f}" for s in found.values()), flush=True)


if __name__ == "__main__":
    main()
