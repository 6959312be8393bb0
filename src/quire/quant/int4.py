"""W4A16: four-bit weights with a scale for each group of a row's inputs; activations are 16-bit integers.

Embedding and head stay `int8` (W8A16). Their error is not averaged over layers, and the most probable token is chosen
among a hundred thousand rows of the head: with four bits there the divergence from the model is larger than that of all
the layers together (docs/howto/quantize.md).
"""

from quire.ops.types import QuantSpec
from quire.quant.types import Scheme

DEFAULT_GROUP_SIZE = 64
"""32 has a tenth less error and an eighth more bytes, 128 a tenth more and a seventeenth fewer."""


def int4(group_size: int) -> Scheme:
    """The scheme with groups of 32, 64 or 128 inputs. Raises ValueError for another size."""
    return Scheme("int4", QuantSpec("int4", group_size), QuantSpec("int8", None))
