"""Compile every kernel for GPUs that are not here, as the provider launches it, and print what the compiler made of it.

    python benchmarks/cuda_compile.py [--model m135|m1b|7b] [--arch 80 90] [--json]

Needs Triton and no GPU: the provider runs over tensors of the host, and each launch is compiled (ptxas comes with
Triton) and not run. What the interpreter cannot show is found so: operand types of GEMMs, shapes that an
instruction does not have, names of the device's library, too much shared memory. For each launch the table has the
registers of a thread, spilled bytes, shared memory, and the matrix instructions that are in the machine code.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is first imported

import torch
import triton
from cuda_kernels import SHAPES, Shape
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from quire.ops.cuda import rows, sampling
from quire.ops.cuda.attention import attention
from quire.ops.cuda.gemm import linear, packed_linear
from quire.ops.types import Activation, AttentionBatch, AttentionSpec, RopeTables, SampleBatch

LARGEST_SHARED = {80: 166912, 90: 232448}
"""Bytes of shared memory that one program may have."""
MOST_SPILLED = 256
"""Bytes of a thread; attention of prompts puts its sums over segments aside while it computes one."""


@dataclass(frozen=True)
class Compiled:
    """One launch."""

    kernel: str
    arch: int
    shape: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: str


class _Driver:
    """What Triton asks of a device before it compiles for it."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


@contextmanager
def compiling(arch: int, label: Callable[[], str]) -> Iterator[dict[Any, Compiled]]:
    """Inside, launches compile and do not run; what they became is in the dictionary, each once."""
    found: dict[Any, Compiled] = {}
    driver, run = triton.runtime.driver, JITFunction.run
    before = driver._active

    @functools.wraps(run)
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None and id(kernel) not in found:
            found[id(kernel)] = _described(kernel, arch, label())
            _KEPT.append(kernel)
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        yield found
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = before


_KEPT: list[Any] = []


def _described(kernel: Any, arch: int, shape: str) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    names = sorted(set(re.findall(r"\b([HIQDB]G?MMA\.[\w.]+)", code)))
    return Compiled(
        kernel.metadata.name, arch, shape, kernel.metadata.num_warps, int(registers[1]) if registers else -1,
        int(registers[2]) if registers else -1, kernel.metadata.shared, " ".join(names),
    )  # fmt: skip


FORMATS = ("plain", "int8", "int8_w8a8", "int4", "int4_w4a8", "fp8")
META = torch.device("meta")


def empty(dtype: torch.dtype, *shape: int) -> Any:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=META)


def weight(kind: str, outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16, group_size: int = 64) -> Any:
    """A weight of a format, without memory."""
    if kind == "plain":
        return packed_linear(empty(dtype, outputs, inputs), None, None, kind, 0, inputs, dtype)
    if kind.startswith("int4"):
        scales = empty(torch.float32, inputs // group_size, outputs)
        return packed_linear(
            empty(torch.uint8, outputs, inputs // 2), scales, None, kind, group_size, inputs, dtype
        )  # fmt: skip
    values = empty(torch.float8_e4m3fn if kind == "fp8" else torch.int8, outputs, inputs)
    return packed_linear(values, empty(torch.float32, outputs, 1), None, kind, inputs, inputs, dtype)


def launch_gemms(shape: Shape, formats: Sequence[str], rows: Sequence[int]) -> Iterator[str]:
    """Each kind of weight with each number of rows."""
    for kind in formats:
        packed = weight(kind, 2 * shape.intermediate, shape.hidden)
        for count in rows:
            yield f"{kind} {count} x {packed.out_features} x {packed.in_features}"
            linear(empty(torch.bfloat16, count, shape.hidden), packed, torch.bfloat16)


def launch_attention(shape: Shape, dtype: torch.dtype = torch.bfloat16, special: bool = False) -> Iterator[str]:
    """Single queries and prompts; `special` has a window, a soft cap and sinks, and no rope."""
    cache = empty(dtype, 1, 2, 64, shape.kv_heads, 16, shape.head_dim)
    tables = RopeTables(*(empty(torch.float32, 64, shape.head_dim // 2) for _ in range(2)))
    spec = AttentionSpec(0.1, 100, 30.0, empty(torch.float32, shape.heads)) if special else AttentionSpec(0.1)
    for count, new in ((4, 1), (1, 64)):
        yield f"{count} rows x {new} new{', window, cap, sinks' if special else ''}"
        q, k, v = (empty(dtype, count * new, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads))
        batch = AttentionBatch(
            *(empty(torch.int32, n) for n in (count * new, count + 1, count)), empty(torch.int32, count, 8)
        )
        attention(q, k, v, cache, 0, batch, spec, None if special else tables)


def launch_rows(shape: Shape) -> Iterator[str]:
    """Norms, rope, activations."""
    x, residual = empty(torch.bfloat16, 4, shape.hidden), empty(torch.float32, 4, shape.hidden)
    vector = empty(torch.float32, shape.hidden)
    yield f"{shape.hidden}"
    ids = empty(torch.int32, 4)
    for table, scales in ((x, None), (empty(torch.int8, 4, shape.hidden), empty(torch.float32, 4, 1))):
        rows.embed(table, scales, ids, 1.0)
    rows.norm(x, residual, vector, None, 1e-5, False, torch.bfloat16)
    rows.norm(residual, None, vector, vector, 1e-5, True, torch.bfloat16)
    for kind in rows.KINDS:
        rows.activation(empty(torch.bfloat16, 4, 2 * shape.intermediate), cast(Activation, kind), multiply=True)


def launch_sampling(shape: Shape) -> Iterator[str]:
    """Sampling and log-probabilities."""
    logits = empty(torch.float32, 4, shape.vocabulary)
    floats, integers = empty(torch.float32, 4), empty(torch.int32, 4)
    yield f"{shape.vocabulary}"
    wide = empty(torch.int64, 4)
    sampling.sample(logits, SampleBatch(floats, integers, floats, floats, wide, wide))
    sampling.logprobs(logits, integers, 20)


def compile_all(arch: int, launches: Iterable[Iterator[str]]) -> list[Compiled]:
    """Every kernel of these launches for one architecture."""
    label = [""]
    with compiling(arch, lambda: label[0]) as found:
        for part in launches:
            for label[0] in part:
                pass
    return list(found.values())


def one_of_each(shape: Shape, arch: int) -> list[Iterator[str]]:
    """A launch of every kernel on the newer architecture, on the older one of those with matrix instructions."""
    if arch < 90:
        return [launch_gemms(shape, ("plain",), (64,)), launch_attention(shape)]
    return [
        launch_gemms(shape, ("plain",), (1, 64, 2048)), launch_gemms(shape, ("int4", "fp8"), (64,)),
        launch_attention(shape), launch_rows(shape), launch_sampling(shape),
    ]  # fmt: skip


def launches_of(shape: Shape, arch: int) -> list[Iterator[str]]:
    """All that a model of this shape launches."""
    formats = [kind for kind in FORMATS if kind != "fp8" or arch >= 89]
    return [
        launch_gemms(shape, formats, (1, 64, 2048)), launch_attention(shape),
        launch_attention(shape, special=True), launch_rows(shape), launch_sampling(shape),
    ]  # fmt: skip


def main() -> int:
    """Compile and print; 1 where a kernel spills many registers or wants more shared memory than there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--arch", type=int, nargs="+", choices=LARGEST_SHARED, default=list(LARGEST_SHARED))
    parser.add_argument("--quick", action="store_true", help="one launch of each kernel")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    bad = 0
    for arch in arguments.arch:
        launches = (one_of_each if arguments.quick else launches_of)(SHAPES[arguments.model], arch)
        for one in compile_all(arch, launches):
            bad += one.spilled_bytes > MOST_SPILLED or one.shared_bytes > LARGEST_SHARED[arch]
            print(json.dumps(asdict(one)) if arguments.json else (
                f"sm_{arch} {one.kernel:18} {one.shape:32} {one.warps} warps {one.registers:4} registers"
                f" {one.spilled_bytes:4} B spilled {one.shared_bytes / 1024:6.1f} KiB shared {one.matrix_instructions}"
            ), flush=True)  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
