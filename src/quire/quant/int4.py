"""Four bits: one integer of sixteen values a weight, one scale for each group of a row's inputs.

Embedding and head stay `int8`. Their error is not averaged over layers, and the best token is chosen among a hundred
thousand rows of the head: with four bits there the divergence from the model is larger than that of all the layers
together (docs/howto/quantize.md).
"""

from quire.ops.types import QuantSpec
from quire.quant.types import Scheme

DEFAULT_GROUP_SIZE = 64
"""32 has a tenth less error and an eighth more bytes, 128 a tenth more and a seventeenth fewer."""


def int4(group_size: int) -> Scheme:
    """`group_size` is 32, 64 or 128."""
    return Scheme("int4", QuantSpec("int4", group_size), QuantSpec("int8", None))
