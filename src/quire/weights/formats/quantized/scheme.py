"""What a quantised checkpoint says of its tensors, whatever tool wrote it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Layout = Literal["gptq", "awq", "packed", "plain"]
"""How the numbers lie: `gptq` in words of 32 bits along the inputs of `[in, out]`, `awq` along its outputs, `packed`
along the inputs of `[out, in]` (compressed-tensors), `plain` one number for each element."""
Strategy = Literal["tensor", "channel", "group", "block"]  # what shares a scale

AS_FLOAT = "none"
INT8_PER_TOKEN = "int8, a scale for each token"
FP8_PER_TOKEN = "fp8, a scale for each token"


@dataclass(frozen=True, slots=True)
class TensorScheme:
    """`weight[o, i] = (number[o, i] - zero) * scale`, where a scale and a zero belong to what the strategy says."""

    layout: Layout
    kind: Literal["int", "float"]
    bits: int
    strategy: Strategy
    """What shares a scale: the tensor, a row of `[out, in]`, a group of a row's inputs, or a block of both."""
    group_size: int | None = None
    """Inputs in a group."""
    block: tuple[int, int] | None = None
    """Outputs and inputs in a block."""
    symmetric: bool = True
    """There are no zero points in the files (of `packed` and `plain`), or they are all the middle."""
    zero_offset: int = 0
    """Added to a stored zero point: 1 in version 1 of GPTQ's files."""
    activations: str = AS_FLOAT
    """What the inputs are quantised to: one of the words above, or a description of what Quire has not."""

    def __str__(self) -> str:
        shared = {"group": f"groups of {self.group_size}", "channel": "a scale for each output channel"}
        block = "x".join(map(str, self.block or ()))
        shared |= {"tensor": "one scale for each tensor", "block": f"blocks of {block}"}
        return f"{'fp' if self.kind == 'float' else 'int'}{self.bits}, {shared[self.strategy]}"


@dataclass(frozen=True, slots=True)
class Quantization:
    """`quantization_config` of one checkpoint, read and found to be held."""

    method: str
    """`quant_method`."""
    file: str
    """That states it."""
    scheme_of: Callable[[str], TensorScheme | None]
    """Of a module by its name; None where the config says that it is not quantised. Raises ModelFileError."""
    cache_is_quantized: bool = False
    """The config asks for a quantised key-value cache, and there may be scales for it."""
