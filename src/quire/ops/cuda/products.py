"""`y = x W^T + b` in Triton: one kernel for weights of 16 and 32 bits, int8 and int4.

An output is one chain of tile products over the inputs, from the first to the last, in tiles of a fixed depth. The
tiles are chosen by the shape of the weight alone (`tiles_for`), never by the number of rows, so a row's bits do not
depend on its companions. Weights are `[out, in]` as the checkpoint has them; int4 is two to a byte, for each group the
first half of its inputs in the low nibbles and the second half in the high ones.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl

from quire.ops.types import Array, QuantizedWeight


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows, outputs and inputs of a tile, and warps of a program."""

    rows: int
    outputs: int
    depth: int
    warps: int


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """A weight on the device. Also what `pack_embedding` returns."""

    weight: Array  # [out, in], int4: [out, in / 2]
    scales: Array | None  # [out, in / group_size] float32
    bias: Array | None  # [out] float32
    format: str  # "plain", or that of a QuantizedWeight
    group_size: int
    in_features: int
    dtype: torch.dtype
    """Of activations that go in and come out."""

    @property
    def out_features(self) -> int:
        """Outputs."""
        return int(self.weight.shape[0])

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        parts = (self.weight, self.scales, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def tiles_for(packed: CudaLinear) -> Tiles:
    """One choice for each kind of weight, whatever the number of rows."""
    if packed.format.startswith("int4"):
        return Tiles(32, 64, packed.group_size, 4)
    if packed.dtype == torch.float32:
        return Tiles(32, 32, 32, 4)
    return Tiles(64, 64, 64, 4)


@triton.jit
def linear_kernel(
    x, weight, scales, x_steps, bias, y, rows, outputs, inputs, x_stride, w_stride, y_stride, scale, softcap,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile `[BLOCK_M, BLOCK_N]` of y."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists, output_exists = (row < rows)[:, None], (output < outputs)[None, :]
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    columns = weight + output.to(tl.int64)[None, :] * w_stride
    if (FORMAT == "int4") | (FORMAT == "int4_w4a8"):
        HALF: tl.constexpr = BLOCK_K // 2
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        at = tl.arange(0, HALF)
        groups = tl.cdiv(inputs, BLOCK_K)
        for group in range(0, groups):
            low_at, high_at = group * BLOCK_K + at[None, :], group * BLOCK_K + HALF + at[None, :]
            low_x = tl.load(x_rows + low_at, mask=row_exists & (low_at < inputs), other=0)
            high_x = tl.load(x_rows + high_at, mask=row_exists & (high_at < inputs), other=0)
            pair = tl.load(columns + group * HALF + at[:, None], mask=output_exists, other=0).to(tl.int32)
            low, high = ((pair & 15) - 8).to(low_x.dtype), ((pair >> 4) - 8).to(low_x.dtype)
            if FORMAT == "int4":
                part = tl.dot(low_x, low, input_precision="ieee")
                part = tl.dot(high_x, high, part, input_precision="ieee")
            else:
                part = tl.dot(high_x, high, tl.dot(low_x, low)).to(tl.float32)
            total += part * tl.load(scales + output * groups + group, mask=output < outputs, other=0.0)[None, :]
        if FORMAT == "int4_w4a8":
            total *= tl.load(x_steps + row, mask=row < rows, other=0.0)[:, None]
    elif FORMAT == "int8_w8a8":
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for first in range(0, inputs, BLOCK_K):
            at = first + tl.arange(0, BLOCK_K)
            part_x = tl.load(x_rows + at[None, :], mask=row_exists & (at[None, :] < inputs), other=0)
            part_w = tl.load(columns + at[:, None], mask=output_exists & (at[:, None] < inputs), other=0)
            sums = tl.dot(part_x, part_w, sums)
        total = sums.to(tl.float32) * tl.load(x_steps + row, mask=row < rows, other=0.0)[:, None]
        total *= tl.load(scales + output, mask=output < outputs, other=0.0)[None, :]
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, inputs, BLOCK_K):
            at = first + tl.arange(0, BLOCK_K)
            part_x = tl.load(x_rows + at[None, :], mask=row_exists & (at[None, :] < inputs), other=0.0)
            part_w = tl.load(columns + at[:, None], mask=output_exists & (at[:, None] < inputs), other=0.0)
            total = tl.dot(part_x, part_w.to(part_x.dtype), total, input_precision="ieee")
        if FORMAT != "plain":
            total *= tl.load(scales + output, mask=output < outputs, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + output, mask=output < outputs, other=0.0)[None, :]
    total *= scale
    if SOFTCAP:
        total = softcap * (1.0 - 2.0 / (tl.exp(2.0 * total / softcap) + 1.0))
    at = y + row.to(tl.int64)[:, None] * y_stride + output[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=row_exists & output_exists)


@triton.jit
def round_rows_kernel(x, values, steps, x_stride, size, TILE: tl.constexpr):
    """One row to signed bytes: `Ops`' `round_inputs` with 127 levels."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    mask = at < size
    row_x = tl.load(x + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(row_x), 0)
    broken = (tl.sum((row_x != row_x).to(tl.int32), 0) > 0) | (largest == float("inf"))
    some = (largest >= 7.888609052210118e-31) & ~broken  # 2^-100
    inverse = tl.where(some, 127.0 / tl.where(some, largest, 1.0), 0.0)
    # Adding 1.5 * 2^23 rounds to the nearest integer, halves to even.
    rounded = (tl.where(some, row_x, 0.0) * inverse + 12582912.0) - 12582912.0
    tl.store(values + row * size + at, rounded.to(tl.int8), mask=mask)
    tl.store(steps + row, tl.where(broken, float("nan"), largest / 127.0))


def linear(x: Array, packed: CudaLinear, dtype: torch.dtype, scale: float = 1.0, softcap: float | None = None) -> Array:
    """`x [tokens, in]`, last dimension contiguous -> `[tokens, out]` of `dtype`."""
    rows, outputs = x.shape[0], packed.out_features
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    if rows == 0:
        return y
    x = x.to(packed.dtype)
    x_steps = y
    if packed.format in ("int8_w8a8", "int4_w4a8"):
        values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        x_steps = torch.empty(rows, dtype=torch.float32, device=x.device)
        round_rows_kernel[(rows,)](x, values, x_steps, x.stride(0), x.shape[1], TILE=triton.next_power_of_2(x.shape[1]))
        x = values
    tiles = tiles_for(packed)
    linear_kernel[(triton.cdiv(outputs, tiles.outputs), triton.cdiv(rows, tiles.rows))](
        x, packed.weight, y if packed.scales is None else packed.scales, x_steps,
        y if packed.bias is None else packed.bias, y, rows, outputs, packed.in_features, x.stride(0),
        packed.weight.stride(0), y.stride(0), scale, 1.0 if softcap is None else softcap,
        FORMAT=packed.format, GROUP=packed.group_size, BIAS=packed.bias is not None, SOFTCAP=softcap is not None,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.depth, num_warps=tiles.warps,
    )  # fmt: skip
    return y


def pack(weight: Any, bias: Any | None, dtype: torch.dtype, device: torch.device) -> CudaLinear:
    """To the device, one tensor at a time. `weight` is a numpy array `[out, in]` or a `QuantizedWeight`."""
    device_bias = None if bias is None else torch.from_numpy(np.ascontiguousarray(bias, np.float32)).to(device)
    if not isinstance(weight, QuantizedWeight):
        host = np.ascontiguousarray(weight)
        # torch reads no bfloat16 of numpy's: the bits go over as int16.
        is_bfloat16 = host.dtype == ml_dtypes.bfloat16
        tensor = torch.from_numpy(host.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(host)
        return CudaLinear(tensor.to(device, dtype), None, device_bias, "plain", 0, host.shape[1], dtype)
    scales = torch.from_numpy(np.ascontiguousarray(weight.scales, np.float32)).to(device)
    values, inputs = np.ascontiguousarray(weight.values), weight.values.shape[1]
    if weight.format.startswith("int4"):
        padded = np.pad(values, ((0, 0), (0, -inputs % weight.group_size)))
        groups = (padded.astype(np.int16) + 8).astype(np.uint8).reshape(len(values), -1, 2, weight.group_size // 2)
        values = (groups[:, :, 0] | groups[:, :, 1] << 4).reshape(len(values), -1)
    tensor = torch.from_numpy(values).to(device)
    return CudaLinear(tensor, scales, device_bias, weight.format, weight.group_size, inputs, dtype)


def rows_of(packed: CudaLinear, ids: Array) -> Array:
    """Rows of a table in float32: of floats, or of integers with a scale for each row."""
    rows = packed.weight[ids].to(torch.float32)
    return rows if packed.scales is None else rows * packed.scales[ids]
