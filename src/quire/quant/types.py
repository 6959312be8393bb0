"""A scheme says how each weight is quantised while a model is loaded, and what the result weighs."""

from dataclasses import dataclass

from quire.ops.types import QuantSpec


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
    """Bytes of a quantised weight `[out, inputs]`: its values and one float32 for each scale, without padding."""
    if quant.group_size is None:
        return out * (inputs + 4)
    groups = -(-inputs // quant.group_size)
    return out * groups * (quant.group_size // 2 + 4)


def bits_per_weight(quant: QuantSpec) -> str:
    """For display: `4.5` with groups of 64; a row's single scale does not count."""
    return "8" if quant.group_size is None else f"{4 + 32 / quant.group_size:g}"
