"""How near the CUDA kernels come to the device's limits, measured in the same run.

    python benchmarks/cuda_kernels.py [--model m135|m1b|7b] [--json]

Prints for each kernel the median time of `--reps` launches, GB/s of what it must read and write, TFLOP/s, and the
fraction of this device's own copy bandwidth or bfloat16 matrix rate. `--interpret` runs tiny shapes under Triton's
interpreter: it shows that every line works, and its times mean nothing.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from quire.ops.cuda.provider import CudaOps
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, QuantSpec


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that kernels see."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SHAPES = {
    "m135": Shape(576, 1536, 9, 3, 64, 49152),
    "m1b": Shape(2048, 8192, 32, 8, 64, 128256),
    "7b": Shape(4096, 11008, 32, 32, 128, 32000),
    "gemma2": Shape(2304, 9216, 8, 4, 256, 256000),
    "tiny": Shape(64, 96, 4, 2, 16, 130),
}


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    kernel: str
    shape: str
    microseconds: float
    gb_per_s: float
    tflop_per_s: float
    fraction: float
    """Of the copy bandwidth, or of the matrix rate, whichever the kernel is nearer to."""


class Bench:
    """Times launches on one device; `limits` are its copy bandwidth in bytes/s and its matrix rate in flop/s."""

    def __init__(self, device: str, reps: int) -> None:
        self.device, self.reps, self.on_device = device, reps, device != "cpu"
        self.limits = self._limits()

    def seconds(self, launch: Callable[[], Any]) -> float:
        """The median of single launches, after some that compile and warm up."""
        for _ in range(3 if self.on_device else 1):
            launch()
        if not self.on_device:
            return math.nan
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.reps)
        ]
        flush = torch.empty(64 << 20, dtype=torch.int32, device=self.device)
        for start, end in events:
            flush.zero_()  # nothing of the last launch stays in the cache
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def result(self, kernel: str, shape: str, launch: Callable[[], Any], moved_bytes: float, flop: float) -> Result:
        """Time one kernel."""
        seconds = self.seconds(launch)
        rates = moved_bytes / seconds, flop / seconds
        fraction = max(rate / limit for rate, limit in zip(rates, self.limits, strict=True))
        return Result(kernel, shape, seconds * 1e6, rates[0] / 1e9, rates[1] / 1e12, fraction)

    def _limits(self) -> tuple[float, float]:
        size = 1 << 30 if self.on_device else 1 << 10
        source, target = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        copy = 2 * size / self.seconds(lambda: target.copy_(source))
        side = 8192 if self.on_device else 64
        a, b = (torch.randn((side, side), dtype=torch.bfloat16, device=self.device) for _ in range(2))
        return copy, 2 * side**3 / self.seconds(lambda: a @ b)


def gemms(bench: Bench, ops: CudaOps, shape: Shape, rows: list[int]) -> Iterator[Result]:
    """Three matrices of a layer and the head, in bfloat16 (float32 where interpreted)."""
    storage: Any = "bfloat16" if bench.on_device else "float32"
    item = 2 if bench.on_device else 4
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = [(qkv, shape.hidden), (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
    for out, inputs in [*sizes, (shape.vocabulary, shape.hidden)]:
        packed = ops.pack_linear(np.random.default_rng(0).standard_normal((out, inputs), np.float32), None, storage)
        for count in rows:
            x = torch.randn((count, inputs), dtype=packed.dtype, device=bench.device)
            moved = item * (out * inputs + count * (inputs + out))
            name = f"{count} x {inputs} -> {out}"
            yield bench.result(
                "linear", name, lambda x=x, p=packed: ops.linear(x, p), moved, 2.0 * count * out * inputs
            )
            w = packed.weight.T
            yield bench.result("cuBLAS", name, lambda x=x, w=w: x @ w, moved, 2.0 * count * out * inputs)


def quantised(bench: Bench, ops: CudaOps, shape: Shape, rows: list[int]) -> Iterator[Result]:
    """Gate and up in each format, whose bytes are counted as they lie."""
    storage: Any = "bfloat16" if bench.on_device else "float32"
    outputs = 2 * shape.intermediate
    values = np.random.default_rng(0).standard_normal((outputs, shape.hidden), np.float32)
    for kind in ops.formats:
        rounded = ops.quantize(values, QuantSpec(kind, 64 if kind.startswith("int4") else None))
        packed = ops.pack_linear(rounded, None, storage)
        for count in rows:
            x = torch.randn((count, shape.hidden), dtype=packed.dtype, device=bench.device)
            moved = sum(
                part.nbytes for part in (packed.weight, packed.scales, packed.bias) if part is not None
            ) + x.element_size() * count * (shape.hidden + outputs)
            yield bench.result(
                f"linear {kind}", f"{count} x {shape.hidden} -> {outputs}", lambda x=x, p=packed: ops.linear(x, p),
                moved, 2.0 * count * outputs * shape.hidden,
            )  # fmt: skip


def cost_of_row_independence(results: list[Result]) -> Iterator[str]:
    """Time of our GEMMs over cuBLAS's, by number of rows, over all matrices."""
    times: dict[str, dict[str, float]] = {}
    for result in results:
        if result.kernel in ("linear", "cuBLAS"):
            by_kernel = times.setdefault(result.shape.split(" x ")[0], {"linear": 0.0, "cuBLAS": 0.0})
            by_kernel[result.kernel] += result.microseconds
    for rows, found in times.items():
        cost = found["linear"] / found["cuBLAS"] - 1
        remark = "  over 10 %: batch_invariant=False is quicker" if cost > 0.1 else ""
        yield f"row independence costs {cost:7.1%} at {rows:>5} rows{remark}"


def attention(bench: Bench, ops: CudaOps, shape: Shape, cases: list[tuple[int, int, int]]) -> Iterator[Result]:
    """`(rows, context, new tokens of each)`: one layer."""
    storage: Any = "bfloat16" if bench.on_device else "float32"
    for rows, context, new in cases:
        blocks = -(-context // 16)
        cache = ops.make_cache(CacheShape(1, rows * blocks, 16, shape.kv_heads, shape.head_dim, storage))
        tables = np.random.default_rng(0).permutation(rows * blocks).reshape(rows, blocks)
        batch = AttentionBatch(
            positions=ops.array(np.tile(np.arange(context - new, context), rows), "int32"),
            query_starts=ops.array(np.arange(rows + 1) * new, "int32"),
            starts=ops.array(np.full(rows, context - new), "int32"),
            block_tables=ops.array(tables, "int32"),
        )
        q, k, v = (
            torch.randn((rows * new, heads, shape.head_dim), dtype=cache.dtype, device=bench.device)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        moved = 2 * rows * context * shape.kv_heads * shape.head_dim * cache.element_size()
        seen = rows * (new * context - new * (new - 1) / 2)
        spec = AttentionSpec(shape.head_dim**-0.5)
        yield bench.result(
            "attention",
            f"{rows} rows x {new} new, context {context}",
            lambda q=q, k=k, v=v, c=cache, b=batch, s=spec: ops.attention(q, k, v, c, 0, b, s),
            moved,
            4.0 * seen * shape.heads * shape.head_dim,
        )


def elementwise(bench: Bench, ops: CudaOps, shape: Shape, tokens: int) -> Iterator[Result]:
    """Norm, rope, activation."""
    dtype = torch.bfloat16 if bench.on_device else torch.float32
    x = torch.randn((tokens, shape.hidden), dtype=dtype, device=bench.device)
    residual = torch.randn((tokens, shape.hidden), device=bench.device)
    weight = torch.ones(shape.hidden, device=bench.device)
    item = x.element_size()
    yield bench.result(
        "add_rms_norm", f"{tokens} x {shape.hidden}", lambda: ops.add_rms_norm(x, residual, weight, 1e-5),
        tokens * shape.hidden * (2 * item + 8), 0.0,
    )  # fmt: skip
    gate_up = torch.randn((tokens, 2 * shape.intermediate), dtype=dtype, device=bench.device)
    yield bench.result(
        "activation_multiply", f"{tokens} x {shape.intermediate}", lambda: ops.activation_multiply(gate_up, "silu"),
        3 * item * tokens * shape.intermediate, 0.0,
    )  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "tiny"], default="7b")
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--interpret", action="store_true", help="tiny shapes under the interpreter; times mean nothing"
    )
    arguments = parser.parse_args()
    if not (arguments.interpret or torch.cuda.is_available()):
        print("cuda_kernels: torch finds no NVIDIA GPU that it can use here: nothing was measured")
        return 3
    device = "cpu" if arguments.interpret else "cuda"
    bench, ops = Bench(device, arguments.reps), CudaOps(device)
    shape = SHAPES["tiny" if arguments.interpret else arguments.model]
    tiny = arguments.interpret
    print(f"{ops.name}; torch {torch.__version__}; copy {bench.limits[0] / 1e9:.0f} GB/s,"
          f" bfloat16 GEMM {bench.limits[1] / 1e12:.0f} TFLOP/s; medians of {arguments.reps}")  # fmt: skip
    results = [
        *gemms(bench, ops, shape, [1, 3] if tiny else [1, 16, 64, 256, 1024, 4096]),
        *quantised(bench, ops, shape, [3] if tiny else [1, 64, 4096]),
        *attention(bench, ops, shape, [(2, 20, 1), (1, 20, 20)] if tiny else
                   [(1, 2048, 1), (1, 32768, 1), (32, 1024, 1), (256, 1024, 1), (1, 2048, 2048), (1, 8192, 8192)]),
        *elementwise(bench, ops, shape, 3 if tiny else 8192),
    ]  # fmt: skip
    for result in results:
        if arguments.json:
            print(json.dumps(asdict(result)))
        else:
            print(f"{result.kernel:20} {result.shape:34} {result.microseconds:10.1f} us {result.gb_per_s:8.1f} GB/s"
                  f" {result.tflop_per_s:8.2f} TFLOP/s {result.fraction:7.1%}")  # fmt: skip
    for line in cost_of_row_independence(results):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
