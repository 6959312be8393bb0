"""Packed weights of the CPU as headers and bytes (`ops/packed.py`). The layouts are drawn in native/kernels.h."""

from collections.abc import Sequence
from typing import Any

from quire.ops import _native
from quire.ops.packed import VERSION, Buffer, PackedHeader, PackedState, byte_views, check_group_size, check_header
from quire.ops.types import FORMATS, HALF_SCALES, QuantizedFormat

HELD: tuple[QuantizedFormat, ...] = tuple(name for name in FORMATS if name != "fp8")
"""Formats that the kernels multiply. (`fp8`, whose inputs are e4m3 too, is for tensor cores.)"""
Integers = tuple[int, int, int, int, bool]
"""Bits, inputs in a group, the largest integer of an input (0: inputs stay as they are, weights are e4m3), bytes of a
scale, whether groups have minima."""


def native_integers(format: QuantizedFormat, group_size: int, half_scales: bool) -> Integers:
    """A format as the native module takes it."""
    stated = FORMATS[format]
    return stated.bits, group_size, stated.activation_qmax, 2 if half_scales else 4, stated.has_minima


def _format_of(integers: Integers, in_features: int) -> str:
    group_size, scale_bytes = integers[1], integers[3]
    for name in HELD:
        # A row of 16, 32, 64 or 128 inputs is one group either way.
        fits = group_size in FORMATS[name].group_sizes if FORMATS[name].group_sizes else group_size == in_features
        halves = scale_bytes == 2
        if fits and (name in HALF_SCALES or not halves) and native_integers(name, group_size, halves) == integers:
            return name
    raise AssertionError(f"integers that are no format: {integers}")


def packed_state(packed: _native.PackedLinear) -> PackedState:
    """`PackedStore.packed_state`: the weights in the layout's order, then the bias if there is one."""
    integers = packed.integers
    bias = packed.bias
    header = PackedHeader(
        version=VERSION,
        provider="cpu",
        layout=packed.layout,
        format=_format_of(integers, packed.in_features) if integers[0] else packed.dtype,
        dtype=packed.dtype,
        out_features=packed.out_features,
        in_features=packed.in_features,
        group_size=integers[1],
        gated=packed.gated,
        has_bias=bias is not None,
        scale_dtype="float16" if integers[0] and integers[3] == 2 else "float32",
    )
    return PackedState(header, tuple(memoryview(part) for part in (packed.weights, bias) if part is not None))


def map_packed(runtime: _native.Runtime, header: PackedHeader, buffers: Sequence[Buffer]) -> _native.PackedLinear:
    """`PackedStore.map_packed`. Raises ValueError, which names the field."""
    check_header(header, "cpu")
    integers: Integers | None = None
    kind = next((name for name in HELD if name == header.format), None)
    check_header(header, "cpu", **({"format": header.dtype} if kind is None else {"dtype": "float32"}))
    check_group_size(header)
    if kind is None or kind not in HALF_SCALES:
        check_header(header, "cpu", scale_dtype="float32")
    if kind is not None:
        integers = native_integers(kind, header.group_size, header.scale_dtype == "float16")
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
