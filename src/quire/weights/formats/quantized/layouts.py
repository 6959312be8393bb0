"""From the tensors of a module in a file to a `QuantizedTensor`: one function for each layout.

Types and shapes are checked here, from the headers alone, against each other and against what the config says.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.weights.formats.quantized.scheme import Quantization, TensorScheme
from quire.weights.formats.quantized.tensors import BLOCK_ELEMENTS, Block, Grid, QuantizedTensor, unpack_bits
from quire.weights.formats.safetensors import CheckpointWeights
from quire.weights.formats.safetensors_file import FileTensor, SafetensorsFile
from quire.weights.json_file import printable

_FLOATS = ("F32", "F16", "BF16")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word the n-th of eight numbers lies: the tool packs them in the order 0, 2, 4, 6, 1, 3, 5, 7."""

MARKS = {"gptq": "qweight", "awq": "qweight", "packed": "weight_packed", "plain": "weight"}
"""The tensor that holds the numbers."""
PARTS = frozenset(
    "qweight qzeros scales g_idx weight_packed weight_shape weight_scale weight_scale_inv weight_zero_point"
    " weight_g_idx input_scale input_zero_point input_scale_ub output_scale".split()
)
"""What a quantised module has beside its bias and, in the `plain` layout, its weight."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one module."""

    checkpoint: CheckpointWeights
    module: str
    names: frozenset[str]
    """Of its tensors, without the module's."""
    scheme: TensorScheme
    config_file: str

    def full(self, part: str) -> str:
        """The name of a tensor."""
        return f"{self.module}.{part}"

    def file(self, part: str) -> SafetensorsFile:
        """The file of a tensor. ModelFileError where there is none."""
        if part not in self.names:
            other = self.checkpoint.file_of(self.full(MARKS[self.scheme.layout]))
            raise ModelFileError(f"{other.name}: {printable(self.full(part))} is missing, of {self.scheme}")
        return self.checkpoint.file_of(self.full(part))

    def info(self, part: str) -> FileTensor:
        """What the header says of a tensor."""
        return self.file(part).tensors[self.full(part)]

    def read(self, part: str, first: int = 0, count: int | None = None) -> NDArray[Any]:
        """Rows of a tensor, `[count, ...]`."""
        return self.file(part).read_rows(self.full(part), first, count)

    def require(self, part: str, formats: tuple[str, ...], *shapes: tuple[int, ...]) -> FileTensor:
        """The tensor must be of a type and, where shapes are given, of one of them."""
        info = self.info(part)
        if info.format not in formats:
            raise self.wrong(part, f"is {info.format}, not {' or '.join(formats)}")
        if shapes and info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.wrong(
                part, f"has the shape {list(info.shape)}; {self.scheme} ({self.config_file}) asks for {wanted}"
            )
        return info

    def wrong(self, part: str, text: str) -> ModelFileError:
        """The error that names file and tensor."""
        return ModelFileError(f"{self.file(part).name}: {printable(self.full(part))} {text}")

    def tensor(
        self, shape: tuple[int, int], grid: Callable[[], Grid], blocks: Callable[[], Iterator[Block]]
    ) -> QuantizedTensor:
        """The whole, once its parts have been checked."""
        infos = [self.info(part) for part in self.names]
        return QuantizedTensor(
            self.full("weight"),
            self.file(MARKS[self.scheme.layout]).name,
            shape,
            self.scheme,
            sum(info.end - info.start for info in infos),
            tuple(self.full(part) for part in sorted(self.names)),
            grid,
            blocks,
        )


def quantized_tensor(parts: Parts) -> QuantizedTensor:
    """The matrix of one module. Raises ModelFileError where a tensor is missing or its type or shape does not fit."""
    return _LAYOUTS[parts.scheme.layout](parts)


def _words_by_input(parts: Parts) -> QuantizedTensor:
    """GPTQ and AWQ: `qweight` in words of 32 bits, `scales [groups, out]`, `qzeros [groups, out]` in words."""
    bits, is_awq = parts.scheme.bits, parts.scheme.layout == "awq"
    stored = parts.require("qweight", ("I32",)).shape
    if len(stored) != 2 or (not is_awq and stored[0] * 32 % bits):
        raise parts.wrong("qweight", f"has the shape {list(stored)}, in which numbers of {bits} bits do not fit")
    inputs, out = (stored[0], stored[1] * 32 // bits) if is_awq else (stored[0] * 32 // bits, stored[1])
    groups = _num_groups(parts, inputs)
    parts.require("scales", _FLOATS, (groups, out))
    if "qzeros" in parts.names or not parts.scheme.symmetric or not is_awq:
        if out * bits % 32:
            raise parts.wrong("qzeros", f"cannot hold {out} zero points of {bits} bits in words of 32")
        parts.require("qzeros", ("I32",), (groups, out * bits // 32))
    if "g_idx" in parts.names:
        parts.require("g_idx", ("I32",), (inputs,))
    unpack = _unpack_awq if is_awq else partial(unpack_bits, bits=bits)

    def grid() -> Grid:
        middle = np.full((out, groups), 1 << (bits - 1), np.int16)
        zeros = unpack(parts.read("qzeros")).T.astype(np.int16) if "qzeros" in parts.names else middle
        # Modulo 2^bits, as the tool's own PyTorch code has it: version 1 stores a zero point of 0 as all ones.
        zeros = ((zeros + parts.scheme.zero_offset) & ((1 << bits) - 1)).astype(np.float32)
        return Grid(_scales(parts, "scales", (groups, out)).T, zeros, 1, _groups(parts, "g_idx", inputs, groups))

    def blocks() -> Iterator[Block]:
        step = max(32, BLOCK_ELEMENTS // max(1, out) // 32 * 32)
        for first in range(0, inputs, step):
            last = min(inputs, first + step)
            if is_awq:
                numbers = _unpack_awq(parts.read("qweight", first, last - first)).T.copy()
            else:
                begin, end = first * bits // 32, last * bits // 32
                numbers = unpack_bits(parts.read("qweight", begin, end - begin).T, bits)
            yield slice(0, out), slice(first, last), numbers

    return parts.tensor((out, inputs), grid, blocks)


def _packed(parts: Parts) -> QuantizedTensor:
    """compressed-tensors: `weight_packed [out, words]`, the numbers plus half their range; `weight_shape` says `in`."""
    bits = parts.scheme.bits
    stored = parts.require("weight_packed", ("I32",)).shape
    parts.require("weight_shape", ("I64", "I32"), (2,))
    shape = [int(size) for size in parts.read("weight_shape")]
    words = -(-shape[1] * bits // 32)
    if min(shape) < 0 or stored != (shape[0], words):
        raise parts.wrong(
            "weight_packed",
            f"has the shape {list(stored)}; weight_shape {shape} and {parts.scheme} ({parts.config_file})"
            f" ask for {[shape[0], words]}",
        )
    out, inputs = shape
    grid = _grid_by_rows(parts, out, inputs, "weight_scale")

    return _by_rows(parts, out, inputs, grid, lambda words: unpack_bits(words, bits)[:, :inputs])


def _plain(parts: Parts) -> QuantizedTensor:
    """One number an element: int8 or fp8."""
    wanted = "F8_E4M3" if parts.scheme.kind == "float" else "I8"
    shape = parts.require("weight", (wanted,)).shape
    if len(shape) != 2:
        raise parts.wrong("weight", f"has the shape {list(shape)}, which is no matrix")
    out, inputs = shape
    scale = "weight_scale_inv" if "weight_scale_inv" in parts.names else "weight_scale"
    return _by_rows(parts, out, inputs, _grid_by_rows(parts, out, inputs, scale), lambda stored: stored)


def _by_rows(
    parts: Parts, out: int, inputs: int, grid: Callable[[], Grid], numbers: Callable[[NDArray[Any]], NDArray[Any]]
) -> QuantizedTensor:
    """A matrix whose stored rows are its own; `numbers` makes `[rows, in]` of some of them."""

    def blocks() -> Iterator[Block]:
        step = max(1, BLOCK_ELEMENTS // max(1, inputs))
        for first in range(0, out, step):
            last = min(out, first + step)
            stored = parts.read(MARKS[parts.scheme.layout], first, last - first)
            yield slice(first, last), slice(0, inputs), numbers(stored)

    return parts.tensor((out, inputs), grid, blocks)


def _grid_by_rows(parts: Parts, out: int, inputs: int, scale: str) -> Callable[[], Grid]:
    """Scales `[rows, groups]` of `packed` and `plain`, checked; the result reads them."""
    rows_per, per_group = (out, inputs)
    if parts.scheme.strategy == "block":
        rows_per, per_group = parts.scheme.block or (1, 1)
    elif parts.scheme.strategy != "tensor":
        rows_per, per_group = 1, parts.scheme.group_size or inputs
    elif parts.info(scale).shape in ((out,), (out, 1)):
        rows_per = 1  # some tools give one scale for the tensor and one for each row under one name
    rows, groups = -(-out // max(1, rows_per)), -(-inputs // max(1, per_group))
    alone: list[tuple[int, ...]] = [(rows,)] if groups == 1 else []
    parts.require(scale, (*_FLOATS, "F8_E8M0"), (rows, groups), *alone, *([()] if rows == groups == 1 else []))
    if not parts.scheme.symmetric:
        _require_zeros(parts, rows, groups)
    index = "weight_g_idx"
    if index in parts.names:
        parts.require(index, ("I32",), (inputs,))

    def grid() -> Grid:
        if index in parts.names and parts.scheme.strategy == "group":
            group_of = _groups(parts, index, inputs, groups)
        else:
            group_of = np.arange(inputs) // max(1, per_group)
        return Grid(_scales(parts, scale, (rows, groups)), _zeros(parts, rows, groups), rows_per, group_of)

    return grid


def _require_zeros(parts: Parts, rows: int, groups: int) -> None:
    if parts.info("weight_zero_point").format == "I32":
        parts.require("weight_zero_point", ("I32",), (-(-rows * parts.scheme.bits // 32), groups))
    else:
        parts.require("weight_zero_point", ("I8",), (rows, groups), *([(rows,)] if groups == 1 else []))


def _zeros(parts: Parts, rows: int, groups: int) -> NDArray[Any] | None:
    """`weight_zero_point`: int8, or in words along the rows. Packed numbers are half their range above zero; None where
    nothing is to be taken off."""
    bits, half = parts.scheme.bits, 1 << (parts.scheme.bits - 1)
    above = half if parts.scheme.layout == "packed" else 0
    if parts.scheme.symmetric:
        return np.full((rows, groups), above, np.float32) if above else None
    stored = parts.read("weight_zero_point")
    if stored.dtype != np.int8:
        stored = unpack_bits(stored.T, bits)[:, :rows].T.astype(np.int16) - half
    zeros = stored.reshape(rows, groups).astype(np.float32)
    if zeros.size and not -half <= zeros.min() <= zeros.max() < half:
        worst = int(zeros.min() if zeros.min() < -half else zeros.max())
        raise parts.wrong("weight_zero_point", f"has the zero point {worst}, outside {bits} bits")
    return zeros + np.float32(above)


def _num_groups(parts: Parts, inputs: int) -> int:
    return -(-inputs // parts.scheme.group_size) if parts.scheme.group_size else 1


def _groups(parts: Parts, part: str, inputs: int, groups: int) -> NDArray[Any]:
    """The group of each input: as `part` says, else in order."""
    if part not in parts.names:
        return np.arange(inputs) // (parts.scheme.group_size or max(1, inputs))
    found = parts.read(part).astype(np.int64)
    bad = np.flatnonzero((found < 0) | (found >= groups))
    if bad.size:
        raise parts.wrong(part, f"has the group {found[bad[0]]} at {bad[0]}; there are {groups}")
    return found


def _scales(parts: Parts, part: str, shape: tuple[int, int]) -> NDArray[Any]:
    found = parts.read(part).astype(np.float32).reshape(shape)
    bad = np.argwhere(~np.isfinite(found))
    if bad.size:
        row, group = bad[0]
        raise parts.wrong(part, f"has the scale {found[row, group]} at {[int(row), int(group)]}")
    return found


def _unpack_awq(words: NDArray[Any]) -> NDArray[Any]:
    numbers = unpack_bits(words, 4)
    return numbers.reshape(len(numbers), -1, 8)[:, :, _AWQ_ORDER].reshape(len(numbers), -1)


_LAYOUTS: Mapping[str, Callable[[Parts], QuantizedTensor]] = {
    "gptq": _words_by_input,
    "awq": _words_by_input,
    "packed": _packed,
    "plain": _plain,
}


def find_quantized(checkpoint: CheckpointWeights, quantization: Quantization) -> dict[str, QuantizedTensor]:
    """The quantised matrices of a checkpoint, by the names that the model has for them.

    Raises:
        ModelFileError: the config and the tensors disagree, or a part of a matrix is missing or does not fit.
    """
    modules: dict[str, set[str]] = {}
    for name, info in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        is_number = part == "weight" and info.format not in _FLOATS
        if part in PARTS or is_number:
            modules.setdefault(module, set()).add(part)
    found = {}
    for module, names in modules.items():
        if not names & {"qweight", "weight_packed", "weight", "weight_scale", "weight_scale_inv", "scales"}:
            continue  # only scales of activations, which stay with the tensors and are refused as left over
        if f"{module}.weight" in checkpoint.tensors:
            names.add("weight")
        scheme = quantization.scheme_of(module)
        shown = f"{printable(module)}.{sorted(names)[0]}"
        if scheme is None:
            raise ModelFileError(f"{shown} is quantised; {quantization.file} says that {printable(module)} is not")
        parts = Parts(checkpoint, module, frozenset(names), scheme, quantization.file)
        if MARKS[scheme.layout] not in names:
            raise ModelFileError(f"{shown}: {quantization.file} asks for {module}.{MARKS[scheme.layout]} ({scheme})")
        found[f"{module}.weight"] = quantized_tensor(parts)
    if not found:
        raise ModelFileError(f"{quantization.file} says {quantization.method!r}, and no tensor is quantised")
    return found
