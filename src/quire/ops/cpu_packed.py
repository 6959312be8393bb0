"""Packed weights of the CPU as headers and bytes (`ops/packed.py`). The layouts are drawn in native/kernels.h."""

from collections.abc import Sequence
from typing import Any

from quire.ops import _native
from quire.ops.packed import VERSION, Buffer, PackedHeader, PackedState, byte_views, check_group_size, check_header
from quire.ops.types import ACTIVATION_QMAX, QuantizedFormat

BITS: dict[QuantizedFormat, int] = {"int8": 8, "int8_w8a8": 8, "int4": 4, "int4_w4a8": 4}
_FORMATS = {(bits, ACTIVATION_QMAX[name]): name for name, bits in BITS.items()}


def packed_state(packed: _native.PackedLinear) -> PackedState:
    """`PackedStore.packed_state`: the weights in the layout's order, then the bias if there is one."""
    bits, group_size, qmax = packed.integers
    bias = packed.bias
    header = PackedHeader(
        version=VERSION,
        provider="cpu",
        layout=packed.layout,
        format=_FORMATS[bits, qmax] if bits else packed.dtype,
        dtype=packed.dtype,
        out_features=packed.out_features,
        in_features=packed.in_features,
        group_size=packed.in_features if bits == 8 else group_size,
        gated=packed.gated,
        has_bias=bias is not None,
    )
    return PackedState(header, tuple(memoryview(part) for part in (packed.weights, bias) if part is not None))


def map_packed(runtime: _native.Runtime, header: PackedHeader, buffers: Sequence[Buffer]) -> _native.PackedLinear:
    """`PackedStore.map_packed`. Raises ValueError, which names the field."""
    check_header(header, "cpu")
    integers: tuple[int, int, int] | None = None
    if header.format in BITS:
        check_header(header, "cpu", dtype="float32")
        integers = BITS[header.format], header.group_size, ACTIVATION_QMAX[header.format]
    else:
        check_header(header, "cpu", format=header.dtype)
    check_group_size(header)
    views: list[Any] = byte_views(buffers, 1 + header.has_bias)
    return runtime.map_packed(
        views[0],
        views[1] if header.has_bias else None,
        header.out_features,
        header.in_features,
        header.format,
        header.layout,
        header.gated,
        integers,
    )
