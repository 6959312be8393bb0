"""A scheme says how each weight is rounded while a model is loaded, and what the result weighs."""

from dataclasses import dataclass

from quire.ops.types import QuantSpec


@dataclass(frozen=True, slots=True)
class Scheme:
    """Products of the layers are rounded by `layers`; embedding and head by `tables`, so that they can be one.

    Norms, biases and learned positions are not rounded: they are a thousandth of the bytes.
    """

    name: str
    layers: QuantSpec
    tables: QuantSpec


def quantized_bytes(rounding: QuantSpec, out: int, inputs: int) -> int:
    """Bytes of a weight `[out, inputs]`: its integers and one float32 for each scale. Kernels pad beside that."""
    if rounding.group_size is None:
        return out * (inputs + 4)
    groups = -(-inputs // rounding.group_size)
    return out * groups * (rounding.group_size // 2 + 4)


def bits_per_weight(rounding: QuantSpec) -> str:
    """For people: `4.5` with groups of 64; a row's single scale does not count."""
    return "8" if rounding.group_size is None else f"{4 + 32 / rounding.group_size:g}"
