"""The types of GGUF's tensors, and how their blocks become float32: bit for bit what ggml's own rows give.

A row is cut into blocks of 32 or 256 values. A block holds a scale (and a minimum, and scales of its groups), and small
integers packed low bits first: `value = scale * number + minimum`, computed in float32 in ggml's order, without a fused
multiply-add. So are they kept, too, in the format of `BlockType.quant`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quire.ops.types import QuantSpec

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """What blocks hold. Scales and minima are exact: what two factors make fits into float32."""

    numbers: Numbers  # [blocks, values of one]
    scales: Floats  # [blocks, groups of one]
    minima: Floats | None = None  # as scales


Read = Callable[[Bytes], Blocks]
"""Of `[blocks, bytes of one]`."""

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Doubled; so the scale of MXFP4 is halved."""
_EXPONENTS = np.array([0x200000 << e if e < 2 else (e - 1) << 23 for e in range(256)], np.uint32).view(np.float32)
"""Half of E8M0: 2 to the power of e - 128."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type of tensors: how many values and bytes a block has."""

    name: str
    values: int
    bytes: int
    read: Read | None
    """None: the values lie there as `dtype`."""
    quant: QuantSpec | None = None
    """The format that holds blocks exactly; None as `read`. One with minima has them whether blocks do or not."""
    dtype: Any = None


def unpack(kind: BlockType, raw: Bytes) -> Floats:
    """Rows of a tensor.

    Args:
        raw: `[rows, bytes of a row]`, whole blocks.

    Returns:
        `[rows, values of a row]`.
    """
    raw = np.ascontiguousarray(raw)
    if kind.read is None:
        plain: Floats = raw.view(kind.dtype).astype(np.float32)
        return plain
    with np.errstate(invalid="ignore", over="ignore"):  # what a file says may be no number; so is what comes of it
        blocks = kind.read(raw.reshape(-1, kind.bytes))
        grouped = blocks.scales[:, :, None] * blocks.numbers.reshape(*blocks.scales.shape, -1).astype(np.float32)
        if blocks.minima is not None:
            grouped = grouped + blocks.minima[:, :, None]
    return grouped.reshape(len(raw), -1)


def read_blocks(kind: BlockType, raw: Bytes) -> Blocks:
    """The same rows as they are held, each array `[rows, ...]`; of a type with `read`."""
    assert kind.read is not None
    with np.errstate(invalid="ignore", over="ignore"):
        found = kind.read(np.ascontiguousarray(raw).reshape(-1, kind.bytes))
    rows = len(raw)
    minima = None if found.minima is None else found.minima.reshape(rows, -1)
    return Blocks(found.numbers.reshape(rows, -1), found.scales.reshape(rows, -1), minima)


def _half(raw: Bytes, at: int) -> Floats:
    """The float16 at byte `at`: `[blocks, 1]`."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(raw: Bytes, bits: int, run: int) -> Bytes:
    """Numbers of so many bits: the lowest of each byte of a run, then the next of each; then the next run."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((raw.reshape(len(raw), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _signed(numbers: Bytes, zero: int) -> Numbers:
    return numbers.view(np.int8) - np.int8(zero)


def _q4_0(raw: Bytes) -> Blocks:
    return Blocks(_signed(_fields(raw[:, 2:], 4, 16), 8), _half(raw, 0))


def _q4_1(raw: Bytes) -> Blocks:
    return Blocks(_fields(raw[:, 4:], 4, 16).view(np.int8), _half(raw, 0), _half(raw, 2))


def _five_bits(raw: Bytes, at: int) -> Bytes:
    """Four bytes with the fifth bits, sixteen with the others."""
    fifth = np.unpackbits(raw[:, at : at + 4], axis=1, bitorder="little")
    return _fields(raw[:, at + 4 :], 4, 16) | fifth << np.uint8(4)


def _q5_0(raw: Bytes) -> Blocks:
    return Blocks(_signed(_five_bits(raw, 2), 16), _half(raw, 0))


def _q5_1(raw: Bytes) -> Blocks:
    return Blocks(_five_bits(raw, 4).view(np.int8), _half(raw, 0), _half(raw, 2))


def _q8_0(raw: Bytes) -> Blocks:
    return Blocks(raw[:, 2:].view(np.int8), _half(raw, 0))


def _q2_k(raw: Bytes) -> Blocks:
    """16 scales and minima of 4 bits, 256 numbers of 2 bits, two factors."""
    scales = _half(raw, 80) * (raw[:, :16] & 15).astype(np.float32)
    minima = _half(raw, 82) * (raw[:, :16] >> 4).astype(np.float32)
    return Blocks(_fields(raw[:, 16:80], 2, 32).view(np.int8), scales, -minima)


def _q3_k(raw: Bytes) -> Blocks:
    """The third bits (0 takes 4 off), 256 numbers of 2 bits, 16 scales of 6 bits, a factor."""
    six_bits = _fields(raw[:, 96:104], 4, 8) | _fields(raw[:, 104:108], 2, 4) << np.uint8(4)
    numbers = _fields(raw[:, 32:96], 2, 32) | _fields(raw[:, :32], 1, 32) << np.uint8(2)
    return Blocks(_signed(numbers, 4), _half(raw, 108) * _signed(six_bits, 32).astype(np.float32))


def _k_scales(raw: Bytes) -> tuple[Floats, Floats]:
    """The scales and minima of the 8 groups of Q4_K and Q5_K: two factors, and 6 bits each in 12 bytes."""
    first, second, rest = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=1)
    return _half(raw, 0) * scales.astype(np.float32), -(_half(raw, 2) * minima.astype(np.float32))


def _q4_k(raw: Bytes) -> Blocks:
    return Blocks(_fields(raw[:, 16:], 4, 32).view(np.int8), *_k_scales(raw))


def _q5_k(raw: Bytes) -> Blocks:
    numbers = _fields(raw[:, 48:], 4, 32) | _fields(raw[:, 16:48], 1, 32) << np.uint8(4)
    return Blocks(numbers.view(np.int8), *_k_scales(raw))


def _q6_k(raw: Bytes) -> Blocks:
    """256 times 4 bits, 256 times 2 bits, 16 scales of 8 bits, a factor."""
    scales = _half(raw, 208) * raw[:, 192:208].view(np.int8).astype(np.float32)
    numbers = _fields(raw[:, :128], 4, 64) | _fields(raw[:, 128:192], 2, 32) << np.uint8(4)
    return Blocks(_signed(numbers, 32), scales)


def _iq4_nl(raw: Bytes) -> Blocks:
    return Blocks(_IQ4[_fields(raw[:, 2:], 4, 16)], _half(raw, 0))


def _iq4_xs(raw: Bytes) -> Blocks:
    """A factor, 8 scales of 2 high and 4 low bits, 256 numbers of 4 bits that name values."""
    six_bits = _fields(raw[:, 4:8], 4, 1) | _fields(raw[:, 2:4], 2, 1) << np.uint8(4)
    scales = _half(raw, 0) * _signed(six_bits, 32).astype(np.float32)
    return Blocks(_IQ4[_fields(raw[:, 8:], 4, 16)], scales)


def _mxfp4(raw: Bytes) -> Blocks:
    return Blocks(_E2M1[_fields(raw[:, 1:], 4, 16)], _EXPONENTS[raw[:, :1]])


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, None, dtype="<f4"),
    1: BlockType("F16", 1, 2, None, dtype="<f2"),
    2: BlockType("Q4_0", 32, 18, _q4_0, QuantSpec("int4", 32)),
    3: BlockType("Q4_1", 32, 20, _q4_1, QuantSpec("int4_min", 32, half_scales=True)),
    6: BlockType("Q5_0", 32, 22, _q5_0, QuantSpec("int8_groups", 32, half_scales=True)),
    7: BlockType("Q5_1", 32, 24, _q5_1, QuantSpec("int8_min", 32, half_scales=True)),
    8: BlockType("Q8_0", 32, 34, _q8_0, QuantSpec("int8_groups", 32, half_scales=True)),
    10: BlockType("Q2_K", 256, 84, _q2_k, QuantSpec("int4_min", 16)),
    11: BlockType("Q3_K", 256, 110, _q3_k, QuantSpec("int4_min", 16)),
    12: BlockType("Q4_K", 256, 144, _q4_k, QuantSpec("int4_min", 32)),
    13: BlockType("Q5_K", 256, 176, _q5_k, QuantSpec("int8_min", 32)),
    14: BlockType("Q6_K", 256, 210, _q6_k, QuantSpec("int8_groups", 16)),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl, QuantSpec("int8_groups", 32, half_scales=True)),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs, QuantSpec("int8_groups", 32)),
    30: BlockType("BF16", 1, 2, None, dtype=ml_dtypes.bfloat16),
    39: BlockType("MXFP4", 32, 17, _mxfp4, QuantSpec("int8_groups", 32)),
}
"""By ggml's number."""

OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip
"""Types that Quire does not read, for the error that names them."""
