"""GEMMs, `y = x W^T + b`, on the device: weights as they lie there, and their launches (`gemm_kernels.py`, `tiles.py`).

An output is one chain of sums over the inputs, from the first to the last, whatever the tile, so a row's bits do not
depend on the other rows. Weights are `[out, in]` as the checkpoint has them; int4 is two to a byte: of each pair of
groups the first lies in the low halves and the second in the high ones.
"""

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
import triton

from quire.ops.cuda.gemm_kernels import linear_kernel, quantize_rows_kernel
from quire.ops.cuda.tiles import GemmShape, Tiles, picked, tiles_for
from quire.ops.types import ACTIVATION_QMAX, BLOCK_FORMATS, QuantizedFormat, QuantizedWeight

ACTIVATION_DTYPES: dict[QuantizedFormat, torch.dtype] = {
    "int8_w8a8": torch.int8,
    "int4_w4a8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""Of activations that are quantised before they are multiplied."""
GROUP_M = 8
"""Tiles of rows whose programs run beside each other and share a tile of weights."""


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """A weight on the device. Also what `pack_embedding` returns."""

    weight: torch.Tensor  # [out, in], int4: [out, in / 2]
    scales: torch.Tensor | None  # [out, 1], int4: [groups, out], float32
    bias: torch.Tensor | None  # [out] float32
    format: QuantizedFormat | Literal["plain"]  # or that of a QuantizedWeight
    group_size: int
    in_features: int
    dtype: torch.dtype
    """Of activations that go in and come out."""
    tiles: tuple[Tiles, ...]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return int(self.weight.shape[0])


def linear(
    x: torch.Tensor, packed: CudaLinear, dtype: torch.dtype, scale: float = 1.0, softcap: float | None = None
) -> torch.Tensor:
    """`x [tokens, in]`, last dimension contiguous -> `[tokens, out]` of `dtype`."""
    rows, outputs = x.shape[0], packed.out_features
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    if rows == 0:
        return y
    x = x.to(packed.dtype)
    x_scales = y
    if packed.format != "plain" and packed.format in ACTIVATION_DTYPES:
        x, x_scales = quantize_activations(x, packed.format)
    tiles = picked(packed.tiles, rows)
    count = triton.cdiv(outputs, tiles.outputs) * triton.cdiv(rows, tiles.rows)
    programs = min(count, _processors(x.device) * max(1, 8 // tiles.warps) if tiles.rows > 16 else count)
    linear_kernel[(programs,)](
        x, packed.weight, y if packed.scales is None else packed.scales, x_scales,
        y if packed.bias is None else packed.bias, y, rows, outputs, packed.in_features, x.stride(0),
        packed.weight.stride(0), y.stride(0), programs, scale, 1.0 if softcap is None else softcap,
        FORMAT=packed.format, GROUP=packed.group_size, BIAS=packed.bias is not None, SOFTCAP=softcap is not None,
        EVEN=packed.in_features % tiles.depth == 0, BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.depth,
        GROUP_M=GROUP_M, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def cublas_linear(x: torch.Tensor, packed: CudaLinear) -> torch.Tensor:
    """The same by torch's library, for a weight that is not quantised; a row's bits depend on the number of rows."""
    bias = None if packed.bias is None else packed.bias.to(packed.dtype)
    return torch.nn.functional.linear(x.to(packed.dtype), packed.weight, bias)


def quantize_activations(x: torch.Tensor, kind: QuantizedFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """`x [tokens, in]` as a format multiplies it, of its shape, and the activation scale of each row `[tokens]`
    float32: `quantize_activations` of the reference."""
    values = torch.empty(x.shape, dtype=ACTIVATION_DTYPES[kind], device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    quantize_rows_kernel[(x.shape[0],)](
        x, values, scales, x.stride(0), x.shape[1], QMAX=ACTIVATION_QMAX[kind], TILE=triton.next_power_of_2(x.shape[1]),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return values, scales


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _device_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def pack(weight: Any, bias: Any | None, dtype: torch.dtype, device: torch.device) -> CudaLinear:
    """To the device, one tensor at a time. `weight` is a numpy array `[out, in]`, or a `QuantizedWeight` of numpy
    arrays or of tensors; `bias` is `[out]`. ValueError where a value is outside its format."""
    device_bias = None if bias is None else torch.from_numpy(np.ascontiguousarray(bias, np.float32)).to(device)
    if not isinstance(weight, QuantizedWeight):
        # In its own type first: the conversion is the device's. A copy in any case: the memory is used again.
        tensor = to_tensor(np.ascontiguousarray(weight)).to(device, copy=True).to(dtype)
        return packed_linear(tensor, None, device_bias, "plain", 0, tensor.shape[1], dtype)
    inputs, size = weight.values.shape[1], weight.group_size
    if weight.format in BLOCK_FORMATS:
        raise ValueError(f"CUDA has no GEMM of {weight.format}")
    if not torch.is_tensor(weight.values):  # tensors are what `quantize` made
        weight.require_range()
    parts: list[Any] = [weight.values, weight.scales]
    values, scales = (
        x.to(device) if torch.is_tensor(x) else to_tensor(np.ascontiguousarray(x)).to(device, copy=True) for x in parts
    )
    if weight.format.startswith("int4"):
        padded = torch.nn.functional.pad(values, (0, -inputs % (2 * size)))
        pairs = (padded + 8).to(torch.uint8).reshape(len(values), -1, 2, size)
        values = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(values), -1)
        scales = torch.nn.functional.pad(scales, (0, scales.shape[1] % 2)).T.contiguous()
    return packed_linear(values, scales, device_bias, weight.format, size, inputs, dtype)


def packed_linear(
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: QuantizedFormat | Literal["plain"],
    group_size: int,
    inputs: int,
    dtype: torch.dtype,
) -> CudaLinear:
    """What lies on a device already, with its tiles."""
    name = kind if kind != "plain" else "float32" if dtype == torch.float32 else "16 bits"
    shape = GemmShape(name, group_size, weight.shape[0], inputs)
    return CudaLinear(
        weight, scales, bias, kind, group_size, inputs, dtype, tiles_for(_device_name(weight.device), shape)
    )


def to_tensor(host: Any) -> torch.Tensor:
    """A numpy array as a tensor over the same memory."""
    # torch reads neither bfloat16 nor e4m3 of numpy's: the bits go over as integers.
    if host.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
    if host.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(host.view(np.int8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(host)
