"""One quantised matrix: its numbers in blocks as they are read, its scales, and what becomes of them.

::

    numbers [out, in]        blocks of some rows, or of some columns, of at most `BLOCK_ELEMENTS`
    scales  [rows, groups]   row o of the matrix has row o // rows_per_scale, input i has group group_of[i]
    zeros   as the scales, or none
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.ops.types import E4M3_FORMATS, FORMATS, QuantizedFormat, QuantSpec
from quire.weights.formats.quantized.scheme import FP8_PER_TOKEN, INT8_PER_TOKEN, TensorScheme

BLOCK_ELEMENTS = 2**20
"""Of numbers that are unpacked at one time: 4 MB in float32."""

Block = tuple[slice, slice, NDArray[Any]]
"""Outputs, inputs, and the numbers there: uint8 or int8 `[outputs, inputs]`, or float8_e4m3fn."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of a matrix."""

    scales: NDArray[Any]  # [rows, groups] float32
    zeros: NDArray[Any] | None  # [rows, groups] float32, whole numbers
    rows_per_scale: int
    group_of: NDArray[Any]  # [in] int64

    def at(self, table: NDArray[Any], outputs: slice, inputs: slice) -> NDArray[Any]:
        """The entries of a block: `[outputs, inputs]`, or `[outputs, 1]` where there is one group."""
        rows: NDArray[Any] = table[np.arange(outputs.start, outputs.stop) // self.rows_per_scale]
        return rows if table.shape[1] == 1 else rows[:, self.group_of[inputs]]

    def group_size(self) -> int | None:
        """Inputs in each group, where they follow one another and all but the last are of one size; else None."""
        if self.scales.shape[1] == 1:
            return len(self.group_of)
        size = int(np.argmax(self.group_of != 0))
        in_order = np.array_equal(self.group_of, np.arange(len(self.group_of)) // max(1, size))
        return size if size and in_order else None


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix that is still in its files."""

    name: str
    """`....weight`, as the model names it."""
    file: str
    shape: tuple[int, int]
    """`[out, in]`."""
    scheme: TensorScheme
    num_bytes: int
    """Of all its parts."""
    parts: tuple[str, ...]
    """The names of the tensors that it is made of."""
    grid: Callable[[], Grid]
    """Reads the scales and the zero points. Raises ModelFileError where one is not finite or out of range."""
    blocks: Callable[[], Iterator[Block]]
    """Reads the numbers. Raises ModelFileError where a file ends early."""

    def unpack(self, grid: Grid, out: NDArray[Any]) -> None:
        """The values into `out [out, in]`: each the float32 product, rounded to the type of `out`, ties to even.

        Raises:
            ModelFileError: a number is out of range, or a file is damaged.
        """
        for outputs, inputs, numbers in self._checked():
            is_float = self.scheme.kind == "float"
            values = _E4M3_VALUES[numbers.view(np.uint8)] if is_float else numbers.astype(np.float32)
            if grid.zeros is not None:
                values -= grid.at(grid.zeros, outputs, inputs)
            with np.errstate(over="ignore"):
                values *= grid.at(grid.scales, outputs, inputs)
                out[outputs, inputs] = values

    def spec(self, grid: Grid, formats: tuple[QuantizedFormat, ...]) -> QuantSpec | str:
        """The engine's format that may hold the matrix exactly; else, in words, why none does."""
        size = grid.group_size()
        if size is None:
            return "inputs of a group are not side by side (act-order)"
        has_zeros = grid.zeros is not None and bool(np.any(grid.zeros != self._middle()))
        return fitting(self.scheme, size, self.shape[1], has_zeros, formats)

    def keep(
        self,
        grid: Grid,
        spec: QuantSpec,
        values: NDArray[Any],
        scales: NDArray[Any],
        minima: NDArray[Any] | None = None,
    ) -> str | None:
        """The numbers into `values [out, in]`, their scales into `scales [out, groups]` of `spec`, and its minima into
        `minima` as these, without loss; where a number or a minimum is outside the format, in words which.

        Raises:
            ModelFileError: as `unpack`.
        """
        low, high = FORMATS[spec.format].low, FORMATS[spec.format].high
        above = -8 if spec.format == "int4_min" else 0  # what the format has as zero, where numbers have a sign
        middle = self._middle() + above
        for outputs, inputs, numbers in self._checked():
            is_e4m3 = spec.format in E4M3_FORMATS
            whole = numbers if is_e4m3 else numbers.astype(np.int16) - np.int16(middle)
            if not is_e4m3 and whole.size and (whole.min() < low or whole.max() > high):
                return f"a number of {whole.min() if whole.min() < low else whole.max()}"
            values[outputs, inputs] = whole
        starts = np.arange(scales.shape[1]) * (spec.group_size or 1)
        rows = np.arange(self.shape[0]) // grid.rows_per_scale
        scales[...] = grid.scales[rows][:, grid.group_of[starts]]
        if minima is None:
            return None
        zeros = 0.0 if grid.zeros is None else grid.zeros[rows][:, grid.group_of[starts]]
        exact = scales.astype(np.float64) * (middle - zeros)  # weight = (number - zero) * scale
        minima[...] = exact
        return None if np.array_equal(minima, exact) else "a zero point times a scale that float32 does not hold"

    def _middle(self) -> int:
        return 0 if self.scheme.layout == "plain" else 1 << (self.scheme.bits - 1)

    def _checked(self) -> Iterator[Block]:
        """The blocks. ModelFileError for a number that is NaN or outside its bits."""
        for outputs, inputs, numbers in self.blocks():
            if self.scheme.kind == "float":
                if np.any((numbers.view(np.uint8) & 0x7F) == 0x7F):
                    raise ModelFileError(f"{self.file}: {self.name} has a number that is NaN")
            elif numbers.dtype == np.int8 and self.scheme.bits < 8:
                self._require_range(numbers)
            yield outputs, inputs, numbers

    def _require_range(self, numbers: NDArray[Any]) -> None:
        half = 1 << (self.scheme.bits - 1)
        if numbers.size and (numbers.min() < -half or numbers.max() >= half):
            worst = int(numbers.min()) if numbers.min() < -half else int(numbers.max())
            raise ModelFileError(f"{self.file}: {self.name} has the number {worst}, outside {self.scheme.bits} bits")


def fitting(
    scheme: TensorScheme, size: int, inputs: int, has_zeros: bool, formats: tuple[QuantizedFormat, ...]
) -> QuantSpec | str:
    """The engine's format for numbers in groups of `size` of a row's `inputs`; else, in words, why there is none.

    Args:
        has_zeros: a zero point is not the middle of the numbers' range.
    """
    small = scheme.activations == INT8_PER_TOKEN
    if scheme.kind == "float":
        whole_rows = scheme.activations == FP8_PER_TOKEN and "fp8" in formats
        if whole_rows and size == inputs:
            return QuantSpec("fp8", None)
        if "fp8_groups" not in formats:
            is_slow = "fp8 is multiplied on GPUs of compute capability 8.9 on, with a scale for each token"
            return "blocks have a scale each" if whole_rows else is_slow
        return _in_groups("fp8_groups", size, inputs)
    if scheme.bits == 8 and size == inputs and not has_zeros:
        return QuantSpec("int8_w8a8" if small else "int8", None)
    kind: QuantizedFormat = "int4_w4a8" if small else "int4"
    if has_zeros:
        kind = "int8_min" if scheme.bits == 8 else "int4_min"
    elif scheme.bits == 8:
        kind = "int8_groups"
    if kind not in formats:
        return "zero points" if has_zeros else "8 bits in groups"
    return _in_groups(kind, size, inputs)


def _in_groups(kind: QuantizedFormat, size: int, inputs: int) -> QuantSpec | str:
    group = next((one for one in FORMATS[kind].group_sizes[::-1] if size % one == 0 or size == inputs), None)
    return f"groups of {size}" if group is None else QuantSpec(kind, group)


def unpack_bits(words: NDArray[Any], bits: int) -> NDArray[Any]:
    """`words [rows, n]` int32 -> the numbers `[rows, 32 n / bits]` uint8 that lie in them side by side, from the lowest
    bit on (with 3 bits a number may begin in one word and end in the next)."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if 8 % bits == 0:
        numbers = np.empty((*data.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            numbers[:, :, i] = (data >> np.uint8(i * bits)) & np.uint8((1 << bits) - 1)
        return numbers.reshape(len(data), -1)
    each = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, bits)
    return np.packbits(each, axis=2, bitorder="little")[:, :, 0]


E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
"""By their bits: looking up is three times as fast as converting."""
