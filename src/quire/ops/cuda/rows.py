"""Rows of tables, norms, activations: one pass each. Sums are over a row alone."""

import torch
import triton
import triton.language as tl

from quire.ops.types import Activation

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


@triton.jit
def embed_kernel(table, scales, ids, y, table_stride, size, scale, SCALED: tl.constexpr, TILE: tl.constexpr):
    """A tile of one row."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    values = tl.load(table + row * table_stride + at, mask=at < size).to(tl.float32)
    if SCALED:
        values *= tl.load(scales + row)
    tl.store(y + place * size + at, values * scale, mask=at < size)


def embed(table: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows `ids [n]` of a table of floats, or of small numbers with a scale for each row `[rows, 1]`, times `scale`:
    float32 `[n, size]`."""
    size = table.shape[1]
    y = torch.empty((ids.shape[0], size), dtype=torch.float32, device=table.device)
    if y.numel():
        tile = min(1024, triton.next_power_of_2(size))
        embed_kernel[(ids.shape[0], triton.cdiv(size, tile))](
            table, table if scales is None else scales, ids, y, table.stride(0), size, float(scale),
            SCALED=scales is not None, TILE=tile, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@triton.jit
def norm_kernel(
    x, residual, weight, bias, y, x_stride, residual_stride, size, eps,
    RESIDUAL: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    mask = at < size
    values = tl.load(x + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        values += tl.load(residual + row * residual_stride + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual + row * residual_stride + at, values.to(residual.dtype.element_ty), mask=mask)
    if CENTRE:
        values = tl.where(mask, values - tl.sum(values, 0) / size, 0.0)
    scaled = values / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    scaled = scaled * tl.load(weight + at, mask=mask, other=0.0)
    if BIAS:
        scaled += tl.load(bias + at, mask=mask, other=0.0)
    tl.store(y + row * size + at, scaled.to(y.dtype.element_ty), mask=mask)


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centre: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`x [..., size]`; `residual` is added to first, in place. The result has `dtype`."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if flat.shape[0]:
        norm_kernel[(flat.shape[0],)](
            flat, flat if residual is None else residual, weight, weight if bias is None else bias, y, flat.stride(0),
            0 if residual is None else residual.stride(0), size, eps,
            RESIDUAL=residual is not None, CENTRE=centre, BIAS=bias is not None, TILE=triton.next_power_of_2(size),
            num_warps=8 if size > 2048 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return y


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * u))
    else:
        return tl.where(x < 0.0, 0.0 * x, x)


@triton.jit
def activation_kernel(x, y, x_stride, size, KIND: tl.constexpr, MULTIPLY: tl.constexpr, TILE: tl.constexpr):
    """A tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = at < size
    result = _activate(tl.load(x + row * x_stride + at, mask=mask, other=0.0).to(tl.float32), KIND)
    if MULTIPLY:
        result *= tl.load(x + row * x_stride + size + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, result.to(y.dtype.element_ty), mask=mask)


def activation(x: torch.Tensor, kind: Activation, multiply: bool) -> torch.Tensor:
    """`kind(x)`, or `kind(x[:, :n]) * x[:, n:]` where `multiply`; `x [..., size]`."""
    flat = x.reshape(-1, x.shape[-1])
    size = flat.shape[1] // 2 if multiply else flat.shape[1]
    y = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        tile = min(1024, triton.next_power_of_2(size))
        activation_kernel[(flat.shape[0], triton.cdiv(size, tile))](
            flat, y, flat.stride(0), size, KIND=KINDS[kind], MULTIPLY=multiply, TILE=tile, enable_fp_fusion=True
        )
    return y
