"""Find the tiles of GEMMs for the device that is here, and write them into `src/quire/ops/cuda/tiles.toml`.

    python benchmarks/cuda_tune.py [--model m135|m1b|7b] [--formats plain int8 ...] [--seconds 200] [--write]

For each weight of the model and each class of rows (up to 16, up to 64, more) every candidate is timed; one whose bits
are not those of the default's is reported and left out. Without `--write` the table is printed. `--interpret` runs two
candidates of tiny shapes under Triton's interpreter, to show that every line works.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda_kernels import SHAPES, Bench, Shape

from quire.ops.cuda import tiles as tiling
from quire.ops.cuda.gemm import CudaLinear, linear
from quire.ops.cuda.provider import CudaOps
from quire.ops.cuda.tiles import LARGEST_ROWS, GemmShape, Tiles
from quire.ops.types import QuantSpec

TABLE = Path(tiling.__file__).with_name("tiles.toml")
CLASSES = {16: 16, 64: 64, LARGEST_ROWS: 2048}
"""Most rows of an entry, and the number that it is timed with."""


@dataclass(frozen=True)
class Weight:
    """A weight of the model in one format."""

    name: str
    packed: CudaLinear
    shape: GemmShape


def weights(ops: CudaOps, shape: Shape, formats: list[str], storage: Any) -> Iterator[Weight]:
    """Those of a layer, random."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {
        "qkv": (qkv, shape.hidden), "o": (shape.hidden, shape.heads * shape.head_dim),
        "gate_up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for kind, (name, (outputs, inputs)) in itertools.product(formats, sizes.items()):
        values: Any = rng.standard_normal((outputs, inputs), dtype=np.float32)
        if kind != "plain":
            values = ops.quantize(values, QuantSpec(kind, 64 if kind.startswith("int4") else None))  # type: ignore[arg-type]
        packed = ops.pack_linear(values, None, storage)
        label = kind if kind != "plain" else "float32" if packed.dtype == torch.float32 else "16 bits"
        yield Weight(f"{kind} {name}", packed, GemmShape(label, packed.group_size, outputs, inputs))


def candidates(shape: GemmShape, most_rows: int) -> Iterator[Tiles]:
    """All that keep the sums; the default comes first."""
    default = tiling.picked(tiling.default_tiles(shape), min(most_rows, 1 << 20))
    yield default
    heights = {16: (16,), 64: (32, 64), LARGEST_ROWS: (64, 128, 256)}[most_rows]
    for rows, outputs, depth, warps, stages in itertools.product(
        heights, (64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5, 6)
    ):
        found = Tiles(most_rows, rows, outputs, depth, warps, stages)
        held = stages * depth * (rows + outputs) * (2 if shape.format in ("16 bits", "int8", "int4") else 1)
        if (
            tiling.keeps_sums(shape, found)
            and held <= 220 * 1024
            and rows * outputs <= warps * 4096
            and found != default
        ):
            yield found


def best(bench: Bench, weight: Weight, most_rows: int, deadline: float, limit: int | None) -> tuple[Tiles, float]:
    """The quickest of the candidates that give the bits of the first, and its seconds."""
    rows = CLASSES[most_rows] if bench.on_device else 3
    x = torch.randn((rows, weight.packed.in_features), dtype=weight.packed.dtype, device=bench.device)
    expected, chosen, quickest = None, None, math.inf
    for index, found in enumerate(candidates(weight.shape, most_rows)):
        if time.monotonic() > deadline or (limit is not None and index >= limit):
            break
        packed = dataclasses.replace(weight.packed, tiles=(dataclasses.replace(found, most_rows=LARGEST_ROWS),))
        try:
            y = linear(x, packed, packed.dtype)
            expected = y if expected is None else expected
            if not torch.equal(y, expected):
                print(f"{weight.name}: {found} gives other bits")
                continue
            seconds = bench.seconds(lambda packed=packed: linear(x, packed, packed.dtype))
        except Exception as error:  # noqa: BLE001 -- of the compiler: this candidate has no place on the device
            print(f"{weight.name}: {found}: {type(error).__name__}")
            continue
        if chosen is None or seconds < quickest:
            chosen, quickest = dataclasses.replace(found, most_rows=most_rows), seconds
    return chosen or dataclasses.replace(next(candidates(weight.shape, most_rows)), most_rows=most_rows), quickest


def main() -> int:
    """Tune and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "tiny"], default="7b")
    parser.add_argument("--formats", nargs="*", default=["plain", "int8", "int4", "fp8"])
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.interpret or torch.cuda.is_available()):
        print("cuda_tune: torch finds no NVIDIA GPU that it can use here: nothing was measured")
        return 3
    device = "cpu" if arguments.interpret else "cuda"
    bench, ops = Bench(device, 10), CudaOps(device)
    shape = SHAPES["tiny" if arguments.interpret else arguments.model]
    deadline, found = time.monotonic() + arguments.seconds, {}
    for weight in weights(ops, shape, arguments.formats, "float32" if arguments.interpret else "bfloat16"):
        picks = []
        for most_rows in CLASSES:
            pick, seconds = best(bench, weight, most_rows, deadline, 2 if arguments.interpret else None)
            print(f"{weight.name:16} up to {most_rows:10} rows: {pick}: {seconds * 1e6:.1f} us", flush=True)
            picks.append(list(dataclasses.astuple(pick)))
        found[weight.shape.name] = picks
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    table = tomllib.loads(TABLE.read_text())
    text = tiling.described(table | {name: table.get(name, {}) | found})
    comments = "".join(line for line in TABLE.read_text().splitlines(keepends=True) if line.startswith("#"))
    if arguments.write:
        TABLE.write_text(comments + text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
