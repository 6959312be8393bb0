"""Floats of eight bits (e4m3): a scale for each output, inputs rounded too, with a scale for each row.

Half of bfloat16's bytes, and the tensor cores of NVIDIA GPUs from compute capability 8.9 on multiply them at twice
its rate. Embedding and head are `int8`, whose inputs keep their own type: their error goes into the logits as it is.
"""

from quire.ops.types import Rounding
from quire.quant.types import Scheme

FP8 = Scheme("fp8", Rounding("fp8", None), Rounding("int8", None))
