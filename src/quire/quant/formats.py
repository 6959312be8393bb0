"""The schemes that there are, by the argument `quantization`. Each has dynamic activation scales, one for each token.

`int8` is W8A16: symmetric eight-bit weights with a scale for each output channel (or for each group of its inputs,
which leaves a little less error), half of bfloat16's bytes; activations are 16-bit integers. `int8_w8a8` is W8A8:
activations are 8-bit integers, which AMX and tensor cores multiply fastest.

`int4` is W4A16: four-bit weights with a scale for each group of a row's inputs; activations are 16-bit integers.

`int4_min` is `int4` with a minimum for each group; scale and minimum are float16, so it takes as many bits (the kind of
GGUF's Q4_1, and of AWQ's and GPTQ's asymmetric groups).

`fp8` is W8A8 in e4m3 (arXiv 2209.05433), a scale for each output channel: the tensor cores of NVIDIA GPUs from compute
capability 8.9 on multiply them at twice bfloat16's rate. The CPU has e4m3 for weights alone, in groups of 128.

Embedding and head are `int8` in all of them. Their error is not averaged over layers but goes into the logits as it is,
and one GEMM of many is not where the time goes: with four bits there the divergence from the model is larger than that
of all the layers together (docs/design/formats.md has the figures).
"""

from typing import Literal

from quire.ops.types import QuantSpec
from quire.quant.types import Scheme

INT8 = Scheme("int8", QuantSpec("int8", None), QuantSpec("int8", None))
INT8_W8A8 = Scheme("int8_w8a8", QuantSpec("int8_w8a8", None), QuantSpec("int8", None))
FP8 = Scheme("fp8", QuantSpec("fp8", None), QuantSpec("int8", None))
FP8_WEIGHTS = Scheme("fp8", QuantSpec("fp8_groups", 128), QuantSpec("int8", None))
DEFAULT_GROUP_SIZE = 64
"""32 has a tenth less error and an eighth more bytes, 128 a tenth more and a seventeenth fewer."""


def int8(group_size: int) -> Scheme:
    """`INT8` with groups of 32, 64 or 128 inputs, embedding and head too. Raises ValueError for another size."""
    return Scheme("int8", QuantSpec("int8_groups", group_size), QuantSpec("int8_groups", group_size))


def four_bits(name: Literal["int4", "int4_min"], group_size: int) -> Scheme:
    """The scheme with groups of 32, 64 or 128 inputs. Raises ValueError for another size."""
    return Scheme(name, QuantSpec(name, group_size, half_scales=name == "int4_min"), QuantSpec("int8", None))
