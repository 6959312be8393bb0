"""Packed weights on the device as headers and tensors of bytes (`ops/packed.py`)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch

from quire.ops.cuda.gemm import CudaLinear, packed_linear
from quire.ops.packed import (
    VERSION,
    Buffer,
    PackedHeader,
    PackedState,
    check_group_size,
    check_header,
    checked_buffers,
    require_field,
)
from quire.ops.types import QuantizedFormat

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def packed_state(packed: CudaLinear) -> PackedState:
    """`PackedStore.packed_state`: uint8 tensors of the device over weight, scales and bias, those that there are."""
    dtype = next(name for name, kind in _DTYPES.items() if kind == packed.dtype)
    header = PackedHeader(
        version=VERSION,
        provider="cuda",
        layout="rows",
        format=dtype if packed.format == "plain" else packed.format,
        dtype=dtype,
        out_features=packed.out_features,
        in_features=packed.in_features,
        group_size=packed.group_size,
        gated=False,
        has_bias=packed.bias is not None,
    )
    tensors = (packed.weight, packed.scales, packed.bias)
    return PackedState(header, tuple(x.contiguous().view(-1).view(torch.uint8) for x in tensors if x is not None))


def map_packed(
    header: PackedHeader, buffers: Sequence[Buffer], device: torch.device, formats: Sequence[str]
) -> CudaLinear:
    """`PackedStore.map_packed`: tensors of the device are used as they are, memory of the host is copied to it.
    ValueError for a format that the device does not have."""
    kind = "plain" if header.format in _DTYPES else header.format
    check_header(header, "cuda", layout="rows", gated=False, scale_dtype="float32")
    if kind not in ("plain", *formats):
        raise ValueError(f"packed weight: format is {kind!r}; this device has {', '.join(formats)}")
    if header.dtype not in ((header.format,) if kind == "plain" else _DTYPES):
        raise ValueError(f"packed weight: dtype is {header.dtype!r} with format {header.format!r}")
    check_group_size(header)
    shapes = _shapes(header)
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    if buffers and all(torch.is_tensor(buffer) for buffer in buffers):
        require_field("sizes of buffers", [buffer.nbytes for buffer in buffers], sizes)
        views = [buffer.to(device) for buffer in buffers]
    else:
        views = [torch.tensor(view, device=device) for view in checked_buffers(buffers, sizes)]
    tensors = [view.view(dtype).view(shape) for view, (shape, dtype) in zip(views, shapes, strict=True)]
    return packed_linear(
        tensors[0],
        None if kind == "plain" else tensors[1],
        tensors[-1] if header.has_bias else None,
        cast(QuantizedFormat | Literal["plain"], kind),
        header.group_size,
        header.in_features,
        _DTYPES[header.dtype],
    )


def _shapes(header: PackedHeader) -> list[tuple[tuple[int, ...], Any]]:
    """Of the weight, of its scales if it is quantised, of the bias if there is one."""
    rows, inputs, size = header.out_features, header.in_features, header.group_size
    found: list[tuple[tuple[int, ...], Any]]
    if header.format.startswith("int4"):
        pairs = -(-inputs // (2 * size))  # of groups
        found = [((rows, pairs * size), torch.uint8), ((2 * pairs, rows), torch.float32)]
    elif header.format in _DTYPES:
        found = [((rows, inputs), _DTYPES[header.format])]
    else:
        values = torch.float8_e4m3fn if header.format == "fp8" else torch.int8
        found = [((rows, inputs), values), ((rows, 1), torch.float32)]
    return [*found, ((rows,), torch.float32)] if header.has_bias else found
