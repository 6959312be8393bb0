"""A GGUF file whose blocks stay blocks: numbers, scales and minima go into the engine's packed formats as they are.

Tensors that become one matrix (q, k and v; gate and up) and differ in type take the narrowest format that holds each of
them exactly: a part of 4 bits in one of 8, groups of 32 as two of 16, a minimum of 0 where a part has none.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.models.parameters import Concatenated, Parameter
from quire.ops.types import FORMATS, QuantizedWeight, QuantSpec
from quire.outputs import Decision
from quire.quant.types import bits_per_weight, joined, quantized_bytes
from quire.weights.formats.gguf import GgufWeights
from quire.weights.formats.gguf_blocks import BlockType, read_blocks
from quire.weights.source import StoredMatrix, Target, TensorInfo


class GgufBlocks:
    """The tensors of a GGUF file as a `WeightSource` that gives `QuantizedWeight`s. Closing it is the file's."""

    unused: tuple[str, ...] = ()
    """Names of tensors that are left over and may be: none."""

    def __init__(self, weights: GgufWeights, target: Target) -> None:
        self._weights, self._target = weights, target
        self._kept: Counter[str] = Counter()
        self._unpacked: Counter[str] = Counter()
        self._memory = self._values = 0

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """`WeightSource.tensors`."""
        return self._weights.tensors

    def size_bytes(self, parameter: Parameter) -> int:
        """`WeightSource.size_bytes`."""
        return self._weights.size_bytes(parameter)

    def packed(self, name: str) -> None:
        """`WeightSource.packed`."""

    def vector(self, array: Concatenated) -> NDArray[Any]:
        """`WeightSource.vector`."""
        return self._weights.vector(array)

    def matrix(self, array: Concatenated) -> StoredMatrix:
        """`WeightSource.matrix`."""
        spec = self._spec(array)
        self._count(array, spec)
        return self._weights.matrix(array) if spec is None else self._blocks(array, spec)

    def differ(self, one: str, other: str) -> bool:
        """`WeightSource.differ`."""
        return self._weights.differ(one, other)

    def close(self) -> None:
        """`WeightSource.close`."""
        self._weights.close()

    def quantized(self, parameter: Parameter) -> QuantSpec | None:
        """The format that a matrix is given in; None where it is given as values."""
        return self._spec(parameter.weight)

    def decisions(self) -> list[Decision]:
        """What became of the matrices of blocks, once all have been read."""
        words = [f"{count} matrices of {name}" for name, count in sorted(self._kept.items())]
        if self._unpacked:
            found = ", ".join(f"{count} of {name}" for name, count in sorted(self._unpacked.items()))
            reason = self._target.unpack or "the device has no format for them"
            words.append(f"unpacked to {self._target.dtype} ({reason}): {found}")
        if self._kept:
            bits = 8 * self._memory / self._values
            words.append(f"{self._memory / 2**20:,.1f} MiB, {bits:.2f} bits a weight")
        return [Decision("blocks", "kept" if self._kept else "unpacked", "; ".join(words))] if words else []

    def _count(self, array: Concatenated, spec: QuantSpec | None) -> None:
        types = {self._kind(name).name for name, _ in array.tensors if self._kind(name).quant is not None}
        shown = "+".join(sorted(types))
        if spec is None:
            if types:
                self._unpacked[shown] += 1
            return
        self._kept[
            f"{shown} as {spec.format} in groups of {spec.group_size}, {bits_per_weight(spec)} bits a weight"
        ] += 1
        rows, inputs = array.shape
        self._memory += quantized_bytes(spec, rows, inputs)
        self._values += rows * inputs

    def _kind(self, name: str) -> BlockType:
        return self._weights.tensors[name].kind

    def _spec(self, array: Concatenated) -> QuantSpec | None:
        """The format that holds all tensors of a matrix, if the provider has it."""
        if self._target.unpack is not None or array.transposed:
            return None
        specs = [self._kind(name).quant for name, _ in array.tensors]
        kept = [spec for spec in specs if spec is not None]
        spec = joined(kept) if len(kept) == len(specs) else None
        if spec is None or spec.format not in self._target.formats:
            return None
        is_table = any(name in self._target.tables for name, _ in array.tensors)
        return None if is_table and not self._target.has_blocks else spec

    def _blocks(self, array: Concatenated, spec: QuantSpec) -> QuantizedWeight:
        rows, inputs = array.shape
        groups = -(-inputs // (spec.group_size or inputs))
        dtype = np.float16 if spec.half_scales else np.float32
        scales = np.empty((rows, groups), dtype)
        minima = np.empty((rows, groups), dtype) if FORMATS[spec.format].has_minima else None
        weight = QuantizedWeight(
            spec.format, np.empty((rows, inputs), np.int8), scales, spec.group_size or inputs, minima
        )
        first = 0
        for name, shape in array.tensors:
            self._weights.read_raw(name, partial(_keep, weight, first))
            first += shape[0]
        return weight


def _keep(weight: QuantizedWeight, above: int, kind: BlockType, first: int, raw: NDArray[np.uint8]) -> None:
    """Rows of a tensor, `above` which are those of others, into `weight`."""
    blocks = read_blocks(kind, raw)
    numbers, scales, minima = blocks.numbers, blocks.scales, blocks.minima
    if weight.minima is not None and minima is None:
        zero = 8 if weight.format == "int4_min" else 0  # numbers with a sign become those without
        numbers = numbers + np.int8(zero)
        minima = np.float32(-zero) * scales
    rows = slice(above + first, above + first + len(raw))
    repeats = weight.scales.shape[1] // scales.shape[1]
    weight.values[rows] = numbers
    weight.scales[rows] = np.repeat(scales, repeats, axis=1)
    if weight.minima is not None and minima is not None:
        weight.minima[rows] = np.repeat(minima, repeats, axis=1)
