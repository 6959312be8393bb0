"""Eight bits: one integer a weight, one scale for each output; half of bfloat16's bytes.

`int8` multiplies them with inputs of sixteen bits, `int8_w8a8` with inputs of eight, at which AMX and tensor
cores are fastest. The head keeps inputs of sixteen bits in both: its rounding goes into the logits as it is, and one
product of many is not where the time goes (docs/howto/quantize.md has the figures).
"""

from quire.ops.types import Rounding
from quire.quant.types import Scheme

INT8 = Scheme("int8", Rounding("int8", None), Rounding("int8", None))
INT8_W8A8 = Scheme("int8_w8a8", Rounding("int8_w8a8", None), Rounding("int8", None))
