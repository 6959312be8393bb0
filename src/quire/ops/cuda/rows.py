"""Rows of tables, norms, rotary positions, activations, copies of blocks: one pass each. Sums are over a row alone."""

import math

import torch
import triton
import triton.language as tl

from quire.ops.types import Activation, Array

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


def embed(table: Array, scales: Array | None, ids: Array, scale: float) -> Array:
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
    x: Array, residual: Array | None, weight: Array, bias: Array | None, eps: float, centre: bool, dtype: torch.dtype
) -> Array:
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
def rope_kernel(
    x, positions, cos, sin, x_stride,
    HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HALF_TILE)
    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cos + position * HALF + at, mask=at < HALF, other=0.0)[None, :]
    s = tl.load(sin + position * HALF + at, mask=at < HALF, other=0.0)[None, :]
    heads = tl.arange(0, HEADS_TILE)[:, None]
    mask = (heads < HEADS) & (at[None, :] < HALF)
    first = x + token * x_stride + heads * DIM + at[None, :]
    a = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    # Fused as in `attention.py`, to the same bits.
    tl.store(first, tl.fma(-b, s, a * c).to(x.dtype.element_ty), mask=mask)
    tl.store(first + HALF, tl.fma(a, s, b * c).to(x.dtype.element_ty), mask=mask)


def rope(x: Array, positions: Array, cos: Array, sin: Array) -> None:
    """See `Ops.rope`."""
    tokens, heads, dim = x.shape
    half = cos.shape[1]
    if tokens:
        rope_kernel[(tokens,)](
            x, positions, cos, sin, x.stride(0), HEADS=heads, HEADS_TILE=triton.next_power_of_2(heads), DIM=dim,
            HALF=half, HALF_TILE=triton.next_power_of_2(half), enable_fp_fusion=False,
        )  # fmt: skip


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


def activation(x: Array, kind: Activation, multiply: bool) -> Array:
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


@triton.jit(do_not_specialize=["pairs"])
def copy_kernel(cache, sources, targets, pairs, half_stride, block_stride, size, TILE: tl.constexpr):
    """A tile of every block that is copied, pair by pair: a target may be the source of a later pair."""
    part = cache + tl.program_id(0).to(tl.int64) * half_stride
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = at < size
    for pair in range(0, pairs):
        source, target = tl.load(sources + pair).to(tl.int64), tl.load(targets + pair).to(tl.int64)
        tl.store(part + target * block_stride + at, tl.load(part + source * block_stride + at, mask=mask), mask=mask)


def copy_blocks(cache: Array, source_ids: Array, target_ids: Array) -> None:
    """`cache [layers, 2, blocks, ...]`; ids `[pairs]`. See `Ops.copy_blocks`."""
    layers, halves, _, *block = cache.shape
    size = math.prod(block)
    if source_ids.shape[0] and size:
        tile = min(1024, triton.next_power_of_2(size))
        copy_kernel[(layers * halves, triton.cdiv(size, tile))](
            cache, source_ids, target_ids, source_ids.shape[0], cache.stride(1), cache.stride(2), size, TILE=tile,
            enable_fp_fusion=True,
        )  # fmt: skip
