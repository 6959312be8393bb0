"""FP8 W8A8: weights in e4m3 (arXiv 2209.05433) with a scale for each output channel, activations in e4m3 with a dynamic
scale for each token.

Half of bfloat16's bytes, and the tensor cores of NVIDIA GPUs from compute capability 8.9 on multiply them at twice its
rate. Embedding and head are `int8` (W8A16): their error goes into the logits as it is.
"""

from quire.ops.types import QuantSpec
from quire.quant.types import Scheme

FP8 = Scheme("fp8", QuantSpec("fp8", None), QuantSpec("int8", None))
