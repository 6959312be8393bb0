"""A scheme says how each weight is quantised while a model is loaded, and what the result weighs."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire.ops.types import E4M3_FORMATS, FORMATS, QuantizedFormat, QuantSpec


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a model are quantised.

    Norms, biases and learned positions are not: they are a thousandth of the bytes.
    """

    name: str
    linear: QuantSpec
    """Of the linear layers."""
    embedding: QuantSpec
    """Of embedding and head alike, so that they can be one."""


def quantized_bytes(quant: QuantSpec, out: int, inputs: int) -> int:
    """Bytes of a quantised weight `[out, inputs]`: its values, its scales and its minima, without padding of rows.
    Groups of integers are all as long."""
    if quant.group_size is None:
        return out * (inputs + 4)
    groups = -(-inputs // quant.group_size)
    if quant.format in E4M3_FORMATS:
        return out * (inputs + groups * _group_bytes(quant))
    return out * groups * (quant.group_size * FORMATS[quant.format].bits // 8 + _group_bytes(quant))


def bits_per_weight(quant: QuantSpec) -> str:
    """For display: `4.5` with groups of 64; a row's single scale does not count."""
    if quant.group_size is None:
        return "8"
    return f"{FORMATS[quant.format].bits + 8 * _group_bytes(quant) / quant.group_size:g}"


def _group_bytes(quant: QuantSpec) -> int:
    """Of a group's scale, and of its minimum if it has one."""
    return (2 if quant.half_scales else 4) * (2 if FORMATS[quant.format].has_minima else 1)


def joined(specs: Sequence[QuantSpec]) -> QuantSpec | None:
    """The format that holds matrices of each of `specs` exactly, as one; None where there is none."""
    first = specs[0]
    if all(spec.format == first.format for spec in specs):
        sizes = [spec.group_size for spec in specs if spec.group_size is not None]
        return QuantSpec(first.format, min(sizes, default=None), all(spec.half_scales for spec in specs))
    by_blocks = _BLOCKS.values()
    if any(spec.format not in by_blocks or spec.group_size is None for spec in specs):
        return None
    stated = [FORMATS[spec.format] for spec in specs]
    kind = _BLOCKS[max(one.bits for one in stated), any(one.has_minima for one in stated)]
    return QuantSpec(kind, min(spec.group_size or 0 for spec in specs))


_BLOCKS: dict[tuple[int, bool], QuantizedFormat] = {
    (4, False): "int4",
    (4, True): "int4_min",
    (8, False): "int8_groups",
    (8, True): "int8_min",
}
"""By the bits, and whether there are minima: the formats by groups that multiply inputs of 16 bits."""
