"""Weights of bfloat16 from one CPU layout to another (native/kernels.h draws both): what an engine directory needs that
was built for a processor with other instructions. All other formats have one layout on every processor."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quire.ops.packed import PackedHeader, PackedState, checked_buffers

BfloatLayout = Literal["panels", "amx_bf16"]
_WIDTH = {"panels": 64, "amx_bf16": 32}
"""Outputs in a panel."""
_SIDE, _DEPTH = 16, 32
"""Outputs, and inputs, in a tile."""


def bfloat16_layout(instruction_set: str) -> BfloatLayout:
    """The one that an instruction set reads."""
    return "amx_bf16" if instruction_set == "amx" else "panels"


def relayout(state: PackedState, layout: BfloatLayout) -> PackedState:
    """The same weight in another layout, bit for bit; the state itself, where its format has no other.

    Raises:
        ValueError: it is no weight of the CPU, or its buffers are not those of its header; it names the field.
    """
    header = state.header
    if header.provider != "cpu":
        raise ValueError(f"packed weight: provider is {header.provider!r}, not 'cpu'")
    if header.format != "bfloat16" or header.layout == layout:
        return state
    if header.layout not in _WIDTH:
        raise ValueError(f"packed weight: layout is {header.layout!r}, not one of {', '.join(_WIDTH)}")
    old, new = _Panels(header, _WIDTH[header.layout]), _Panels(header, _WIDTH[layout])
    sizes = [2 * old.number * old.width * old.depth(header.layout), 4 * old.number * old.width]
    buffers = checked_buffers(state.buffers, sizes[: 1 + header.has_bias])
    rows = np.zeros((header.out_features, header.in_features), np.uint16)
    used = old.rows >= 0
    rows[old.rows[used]] = old.columns(buffers[0].view(np.uint16), header.layout)[used]
    packed = [new.packed(rows, layout)]
    if header.has_bias:
        bias = np.zeros(header.out_features, np.float32)
        bias[old.rows[used]] = buffers[1].view(np.float32)[used]
        packed.append(np.where(new.rows >= 0, bias[new.rows], np.float32(0)))
    return PackedState(replace(header, layout=layout), tuple(packed))


@dataclass(frozen=True, slots=True)
class _Panels:
    """The panels of a weight, `width` columns each."""

    header: PackedHeader
    width: int

    @property
    def number(self) -> int:
        """Panels; half of the columns of a gated weight's are outputs of up."""
        out, width = (size // 2 if self.header.gated else size for size in (self.header.out_features, self.width))
        return -(-out // width)

    @property
    def rows(self) -> NDArray[Any]:
        """The weight's row in each column, `[number * width]`; -1 for padding."""
        header = self.header
        out, width = (size // 2 if header.gated else size for size in (header.out_features, self.width))
        panel, column = np.divmod(np.arange(self.number * self.width), self.width)
        output = panel * width + column % width
        return np.where(output >= out, -1, output + np.where(column < width, 0, out))

    def depth(self, layout: str) -> int:
        """Inputs with their padding."""
        inputs = self.header.in_features
        return inputs if layout == "panels" else -(-inputs // _DEPTH) * _DEPTH

    def columns(self, data: NDArray[Any], layout: str) -> NDArray[Any]:
        """A layout's values as `[number * width, in]`."""
        if layout == "panels":
            found = data.reshape(self.number, -1, self.width).swapaxes(1, 2)
        else:
            tiles = data.reshape(self.number, -1, 2, _DEPTH // 2, _SIDE, 2)
            found = tiles.transpose(0, 2, 4, 1, 3, 5)
        return found.reshape(self.number * self.width, -1)[:, : self.header.in_features]

    def packed(self, weight: NDArray[Any], layout: str) -> NDArray[Any]:
        """A weight `[out, in]` in a layout, flat."""
        columns = np.zeros((self.number * self.width, self.depth(layout)), weight.dtype)
        used = self.rows >= 0
        columns[used, : self.header.in_features] = weight[self.rows[used]]
        if layout == "panels":
            found = columns.reshape(self.number, self.width, -1).swapaxes(1, 2)
        else:
            found = columns.reshape(self.number, 2, _SIDE, -1, _DEPTH // 2, 2).transpose(0, 3, 1, 4, 2, 5)
        return np.ascontiguousarray(found).reshape(-1)
