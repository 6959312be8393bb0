"""Eight-bit weights, symmetric, a scale for each output channel; half of bfloat16's bytes.

`int8` is W8A16: activations are 16-bit integers. `int8_w8a8` is W8A8: activations are 8-bit integers, which AMX and
tensor cores multiply fastest. Both have a dynamic scale for each token. The head stays W8A16 in both: its error goes
into the logits as it is, and one GEMM of many is not where the time goes (docs/howto/quantize.md has the figures).
"""

from quire.ops.types import QuantSpec
from quire.quant.types import Scheme

INT8 = Scheme("int8", QuantSpec("int8", None), QuantSpec("int8", None))
INT8_W8A8 = Scheme("int8_w8a8", QuantSpec("int8_w8a8", None), QuantSpec("int8", None))
