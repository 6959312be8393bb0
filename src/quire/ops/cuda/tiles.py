"""Which tiles a GEMM takes: by device and weight from `tiles.toml`, else by rule; nothing is tried at start.

A pick has one entry for few rows and others for many. That keeps rows independent because an output is the same
chain of sums in all of them: the matrix instruction is fixed by the type (on Hopper `wgmma` of 64 outputs, whose width
is the number of rows; before it `mma` of 16 x 8), it takes the inputs in the same pieces in ascending order into one
float32, and the tile decides only how many outputs and rows lie side by side. `fp8` leaves the instruction's own sums
after each `depth` inputs, int4 rounds by groups: there the depth is one for all entries. What a device makes of this is
for it to show: `scripts/gpu_check --only laws`.
"""

import functools
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

FP8_DEPTH = 128
LARGEST_ROWS = 1 << 30


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a GEMM is cut where it has up to `most_rows` rows."""

    most_rows: int
    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class GemmShape:
    """What a pick depends on."""

    format: str  # "float32", "16 bits", or that of a QuantizedWeight
    group_size: int
    outputs: int
    inputs: int

    @property
    def name(self) -> str:
        """A class of shapes that share an entry of the table: sizes to the next power of two."""
        outputs, inputs = (1 << max(0, math.ceil(math.log2(max(1, size)))) for size in (self.outputs, self.inputs))
        return f"{self.format} {outputs}x{inputs}"


@functools.cache
def _table() -> dict[str, dict[str, list[list[int]]]]:
    with Path(__file__).with_name("tiles.toml").open("rb") as file:
        return tomllib.load(file)


@functools.cache
def tiles_for(device: str, shape: GemmShape) -> tuple[Tiles, ...]:
    """The picks for `device` (its name as the driver gives it), those for fewer rows first; the last is for any."""
    entries = _table().get(device, {}).get(shape.name)
    if entries is not None:
        found = tuple(Tiles(*entry) for entry in entries)
        if all(keeps_sums(shape, tiles) for tiles in found):
            return found
    return default_tiles(shape)


def keeps_sums(shape: GemmShape, tiles: Tiles) -> bool:
    """Whether these tiles give the bits that all tiles for this shape have to give."""
    if shape.format.startswith("int4"):
        return tiles.depth == 2 * shape.group_size and tiles.outputs % 64 == 0
    if shape.format == "fp8":
        return tiles.depth == FP8_DEPTH and tiles.outputs % 64 == 0
    if shape.format == "float32":
        return tiles.depth == 32
    return tiles.outputs % 64 == 0 and tiles.depth % 32 == 0


def default_tiles(shape: GemmShape) -> tuple[Tiles, ...]:
    """For a device that the table does not have."""
    if shape.format == "float32":
        return (Tiles(16, 16, 32, 32, 4, 2), Tiles(LARGEST_ROWS, 32, 32, 32, 4, 2))
    if shape.format.startswith("int4"):
        depth = 2 * shape.group_size
        return (
            Tiles(16, 16, 64, depth, 4, 4),
            Tiles(64, 64, 64, depth, 4, 4),
            Tiles(LARGEST_ROWS, 128, 128, depth, 8, 3),
        )
    depth = FP8_DEPTH if shape.format == "fp8" else 128
    many = Tiles(LARGEST_ROWS, 128, 128, 64 if shape.format in ("16 bits", "int8") else depth, 8, 3)
    return (Tiles(16, 16, 64, depth, 4, 4), Tiles(64, 64, 64, depth, 4, 4), many)


def picked(picks: tuple[Tiles, ...], rows: int) -> Tiles:
    """The entry for `rows`."""
    return next(tiles for tiles in picks if rows <= tiles.most_rows)


def described(table: dict[str, dict[str, list[list[int]]]]) -> str:
    """A table as `tiles.toml` has it."""
    lines: list[str] = []
    for device, shapes in sorted(table.items()):
        lines += ["", f'["{device}"]']
        lines += [f'"{name}" = {entries}' for name, entries in sorted(shapes.items())]
    return "\n".join(lines) + "\n"
