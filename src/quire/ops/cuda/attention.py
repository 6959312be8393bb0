"""Paged attention in Triton (PagedAttention, arXiv 2309.06180; running softmax, arXiv 2205.14135).

The cache is `[layers, 2, blocks, kv_heads, block_size, head_dim]`, keys before values. A context is cut at multiples
of `SEGMENT` positions. A query folds each segment into `(m_i, l_i, acc)` from fresh values, then folds the segments
in ascending order. One program does all of it for a tile of queries of a prompt. A row with one query is too little for
a program: each of its segments is one, and `merge` folds them with the same formula. Where a step has rows of both
kinds, both are launched, and each leaves the other's rows alone. What a query computes is a function of its own
position alone: not of the other rows, nor of how a prompt is cut.
Three things that a compiler may choose by the shape of a tile are not left to it: sums over keys are GEMMs with ones
(a reduction's order depends on how a tile lies over threads), fused multiplications are written out and no others are
made, and a maximum has no order.

::

    tile of queries:  [BLOCK_Q tokens x GROUP query heads of one kv head]      (each read of K and V serves the group)
    tiles of a row r: from query_starts[r] // BLOCK_Q + r on; a program finds its row by bisection
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from quire.ops.types import AttentionBatch, AttentionSpec, RopeTables

SEGMENT = 256
"""Positions of the context that are folded together; a multiple of every block size."""
LOG2_E = math.log2(math.e)


@triton.jit
def _row_of(place, query_starts, rows, BLOCK_Q: tl.constexpr, TILES: tl.constexpr):
    """The last row whose first place is at or before `place`: a token, or with TILES a tile of queries."""
    left, right = 0, rows
    while left < right:
        middle = (left + right) // 2
        if tl.load(query_starts + middle) // BLOCK_Q + middle * TILES <= place:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit
def _rotated(heads, dims, mask, position, cos, sin, HALF: tl.constexpr):
    """Heads from pointers `heads [n, 1]`, turned by `position [n, 1]`; dimensions from 2 HALF on stay as they are."""
    x = tl.load(heads + dims, mask=mask, other=0.0)
    if HALF > 0:
        turns = mask & (dims < 2 * HALF)
        partner = tl.load(heads + tl.where(dims < HALF, dims + HALF, dims - HALF), mask=turns, other=0.0).to(tl.float32)
        at = position.to(tl.int64) * HALF + dims % HALF
        c, s = tl.load(cos + at, mask=turns, other=1.0), tl.load(sin + at, mask=turns, other=0.0)
        wide = x.to(tl.float32)
        x = tl.fma(tl.where(dims < HALF, -partner, partner), s, wide * c).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["rows", "table_stride"])
def store_kernel(
    k, v, keys, values, cos, sin, query_starts, starts, tables, rows, k_stride, v_stride, table_stride,
    block_stride, head_stride,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, HEADS_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The keys and values of one token into their slot."""
    token = tl.program_id(0)
    row = _row_of(token, query_starts, rows, 1, 0)
    position = tl.load(starts + row) + token - tl.load(query_starts + row)
    block = tl.load(tables + row * table_stride + position // BLOCK_SIZE).to(tl.int64)
    heads, dims = tl.arange(0, HEADS_TILE), tl.arange(0, DIM_TILE)
    mask = (heads[:, None] < KV_HEADS) & (dims[None, :] < DIM)
    source = heads[:, None] * DIM + dims[None, :]
    target = block * block_stride + heads[:, None] * head_stride + (position % BLOCK_SIZE) * DIM + dims[None, :]
    key_heads = k + token.to(tl.int64) * k_stride + heads[:, None] * DIM
    key = _rotated(key_heads, dims[None, :], mask, position, cos, sin, HALF)
    value = tl.load(v + token.to(tl.int64) * v_stride + source, mask=mask)
    tl.store(keys + target, key.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + target, value.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _fold(m_i, l_i, acc, next_m, next_l, next_acc):
    """Two parts of one softmax, the earlier positions first. `m_i [n, 1]`, `l_i [n, 1]`, `acc [n, dims]`."""
    new_m = tl.maximum(m_i, next_m)
    finite = tl.where(new_m == -float("inf"), 0.0, new_m)
    a, b = tl.exp2(m_i - finite), tl.exp2(next_m - finite)
    return new_m, tl.fma(l_i, a, next_l * b), tl.fma(acc, a, next_acc * b)


@triton.jit
def _tiles(
    m_i, l_i, acc, query, keys, values, table, position, first, last, scale, softcap, window, block_stride,
    DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys of positions `[first, last)`, tile by tile; without MASKED every query sees all of them."""
    dims = tl.arange(0, acc.shape[1])
    for start in range(first, last, TILE):
        key_position = start + tl.arange(0, TILE)
        exists = key_position < last
        block = tl.load(table + key_position // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        slot = block * block_stride + (key_position % BLOCK_SIZE) * DIM
        at, mask = slot[:, None] + dims[None, :], exists[:, None] & (dims[None, :] < DIM)
        key = tl.load(keys + at, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        factor = scale
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (scores * scale) / softcap) + 1.0))
            factor = 1.4426950408889634
        if MASKED:
            distance = position[:, None] - key_position[None, :]
            scores = tl.where((distance >= 0) & (distance < window) & exists[None, :], scores, -float("inf"))
        new_m = tl.maximum(m_i, tl.max(scores, 1, keep_dims=True) * factor)
        finite = tl.where(new_m == -float("inf"), 0.0, new_m)
        rescale = tl.exp2(m_i - finite)
        value = tl.load(values + at, mask=mask, other=0.0)
        p = tl.exp2(tl.fma(scores, factor, -finite)).to(value.dtype)
        l_i = tl.dot(p, tl.full([TILE, 16], 1.0, value.dtype), l_i * rescale, input_precision="ieee")
        acc = tl.dot(p, value, acc * rescale, input_precision="ieee")
        m_i = new_m
    return m_i, l_i, acc


@triton.jit
def _segment(
    query, keys, values, table, position, start, first, last, scale, softcap, window, block_stride,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The keys of positions `[first, last)` against `query [BLOCK_M, DIM_TILE]`, whose rows stand at `position`, the
    first of them at `start`. Exponents are to the base 2; `scale` has its logarithm in it."""
    m_i = tl.full([BLOCK_M, 1], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M, 16], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
    middle = first
    if not WINDOW:
        middle += tl.maximum(tl.minimum(last, start + 1) - first, 0) // TILE * TILE
        m_i, l_i, acc = _tiles(
            m_i, l_i, acc, query, keys, values, table, position, first, middle, scale, softcap, window,
            block_stride, DIM, TILE, BLOCK_SIZE, SOFTCAP, False,
        )  # fmt: skip
    m_i, l_i, acc = _tiles(
        m_i, l_i, acc, query, keys, values, table, position, middle, last, scale, softcap, window, block_stride,
        DIM, TILE, BLOCK_SIZE, SOFTCAP, True,
    )  # fmt: skip
    return m_i, tl.max(l_i, 1, keep_dims=True), acc


@triton.jit(do_not_specialize=["rows", "table_stride", "parts_stride"])
def attention_kernel(
    q, keys, values, out, parts, cos, sin, query_starts, starts, tables, sinks, rows, q_stride, table_stride,
    block_stride, head_stride, parts_stride, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SEGMENT_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Programs: tile of queries and kv head, of rows of several queries, to `out`; with SPLIT row, kv head and segment,
    of rows of one, to `parts`."""
    BLOCK_M: tl.constexpr = BLOCK_Q * GROUP_TILE
    # The last tiles of a prompt have the most to read: they begin first.
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row = tile if SPLIT else _row_of(tile, query_starts, rows, BLOCK_Q, 1)
    first_token = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - first_token
    offset = 0 if SPLIT else (tile - first_token // BLOCK_Q - row) * BLOCK_Q
    start = tl.load(starts + row)
    if (count == 1) if SPLIT else ((offset < count) & (count > 1)):
        lanes = tl.arange(0, BLOCK_M)
        token = offset + lanes // GROUP_TILE
        head = kv_head * GROUP + lanes % GROUP_TILE
        valid = (token < count) & (lanes % GROUP_TILE < GROUP)
        dims = tl.arange(0, DIM_TILE)
        lane_token = (first_token + token).to(tl.int64)
        mask = valid[:, None] & (dims[None, :] < DIM)
        position = start + token
        query_heads = q + lane_token[:, None] * q_stride + head[:, None] * DIM
        query = _rotated(query_heads, dims[None, :], mask, position[:, None], cos, sin, HALF).to(keys.dtype.element_ty)
        last = tl.minimum(start + offset + BLOCK_Q, start + count)
        first_seen = tl.maximum(start + offset - window + 1, 0)
        table = tables + row.to(tl.int64) * table_stride
        layer_keys, layer_values = keys + kv_head * head_stride, values + kv_head * head_stride
        if SPLIT:
            segment = tl.program_id(2)
            if (segment * SEGMENT_SIZE < last) & ((segment + 1) * SEGMENT_SIZE > first_seen):
                m_i, l_i, acc = _segment(
                    query, layer_keys, layer_values, table, position, start + offset, segment * SEGMENT_SIZE,
                    tl.minimum((segment + 1) * SEGMENT_SIZE, last), scale, softcap, window, block_stride,
                    DIM, DIM_TILE, BLOCK_M, TILE, BLOCK_SIZE, SOFTCAP, WINDOW,
                )  # fmt: skip
                at = parts + ((row.to(tl.int64) * HEADS + head) * parts_stride + segment * (DIM + 2))[:, None]
                tl.store(at, m_i, mask=valid[:, None])
                tl.store(at + 1, l_i, mask=valid[:, None])
                tl.store(at + 2 + dims[None, :], acc, mask=mask)
        else:
            m_i = tl.full([BLOCK_M, 1], -float("inf"), tl.float32)
            l_i = tl.zeros([BLOCK_M, 1], tl.float32)
            acc = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
            for segment in range(first_seen // SEGMENT_SIZE, tl.cdiv(last, SEGMENT_SIZE)):
                next_m, next_l, next_acc = _segment(
                    query, layer_keys, layer_values, table, position, start + offset, segment * SEGMENT_SIZE,
                    tl.minimum((segment + 1) * SEGMENT_SIZE, last), scale, softcap, window, block_stride,
                    DIM, DIM_TILE, BLOCK_M, TILE, BLOCK_SIZE, SOFTCAP, WINDOW,
                )  # fmt: skip
                m_i, l_i, acc = _fold(m_i, l_i, acc, next_m, next_l, next_acc)
            if SINKS:
                sink = tl.load(sinks + head, mask=valid, other=0.0)[:, None] * 1.4426950408889634
                m_i, l_i, acc = _fold(m_i, l_i, acc, sink, sink * 0.0 + 1.0, acc * 0.0)
            at = out + (lane_token[:, None] * HEADS + head[:, None]) * DIM + dims[None, :]
            tl.store(at, (acc / l_i).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts_stride"])
def merge_kernel(
    parts, out, query_starts, starts, sinks, parts_stride, window,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, SEGMENT_SIZE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The segments of a row of one query and head, in ascending order."""
    row, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_starts + row).to(tl.int64)
    if tl.load(query_starts + row + 1) == token + 1:
        position = tl.load(starts + row)
        dims = tl.arange(0, DIM_TILE)
        mask = dims < DIM
        m_i, l_i = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.float32)
        acc = tl.zeros([DIM_TILE], tl.float32)
        first_seen = tl.maximum(position - window + 1, 0)
        for segment in tl.range(first_seen // SEGMENT_SIZE, position // SEGMENT_SIZE + 1, loop_unroll_factor=4):
            at = parts + (row.to(tl.int64) * HEADS + head) * parts_stride + segment * (DIM + 2)
            next_acc = tl.load(at + 2 + dims, mask=mask, other=0.0)
            m_i, l_i, acc = _fold(m_i, l_i, acc, tl.load(at), tl.load(at + 1), next_acc)
        if SINKS:
            sink = tl.load(sinks + head) * 1.4426950408889634
            m_i, l_i, acc = _fold(m_i, l_i, acc, sink, sink * 0.0 + 1.0, acc * 0.0)
        tl.store(out + (token * HEADS + head) * DIM + dims, (acc / l_i).to(out.dtype.element_ty), mask=mask)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Any,
    layer: int,
    batch: AttentionBatch,
    spec: AttentionSpec,
    rope: RopeTables | None,
) -> torch.Tensor:
    """See `Ops.attention`. `cache` is the tensor of the module's docstring. Launches without waiting for the device."""
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    keys, values = cache[layer, 0], cache[layer, 1]
    kv_heads, block_size = keys.shape[1], keys.shape[2]
    block_tables: torch.Tensor = batch.block_tables
    rows, width = block_tables.shape
    group, dim_tile = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    strides = (keys.stride(0), keys.stride(1))
    tables, half = ((q, q), 0) if rope is None else ((rope.cos, rope.sin), rope.cos.shape[1])
    store_kernel[(tokens,)](
        k, v, keys, values, *tables, batch.query_starts, batch.starts, block_tables, rows,
        k.stride(0), v.stride(0), block_tables.stride(0), *strides,
        KV_HEADS=kv_heads, DIM=dim, DIM_TILE=dim_tile, HEADS_TILE=triton.next_power_of_2(kv_heads),
        BLOCK_SIZE=block_size, HALF=half, enable_fp_fusion=False,
    )  # fmt: skip
    group_tile, wide = triton.next_power_of_2(group), dim_tile > 128
    window = 2**30 if spec.window is None else spec.window
    sinks = q if spec.sinks is None else spec.sinks
    segments = -(-width * block_size // SEGMENT)
    parts = q
    for split in (False, True):
        if (tokens == 1 or rows > 1) if split else tokens != rows:
            block_m, warps = (16, 4) if split else (64, 8) if wide else (128, 8)
            block_q = max(1, block_m // group_tile)
            if split:
                shape = (rows * heads, segments * (dim + 2))
                parts = torch.empty(shape, dtype=torch.float32, device=q.device)
            grid = (rows, kv_heads, segments) if split else (tokens // block_q + rows, kv_heads, 1)
            attention_kernel[grid](
                q, keys, values, out, parts, *tables, batch.query_starts, batch.starts, block_tables, sinks, rows,
                q.stride(0), block_tables.stride(0), *strides, parts.stride(0),
                spec.scale * (1.0 if spec.softcap is not None else LOG2_E), spec.softcap or 1.0, window,
                HEADS=heads, GROUP=group, GROUP_TILE=group_tile, DIM=dim, DIM_TILE=dim_tile, BLOCK_Q=block_q,
                TILE=32 if wide else 64, BLOCK_SIZE=block_size, SEGMENT_SIZE=SEGMENT, SPLIT=split,
                SOFTCAP=spec.softcap is not None, SINKS=spec.sinks is not None, HALF=half,
                WINDOW=spec.window is not None, num_warps=warps, num_stages=3, enable_fp_fusion=False,
            )  # fmt: skip
    if parts is not q:
        merge_kernel[(rows, heads)](
            parts, out, batch.query_starts, batch.starts, sinks, parts.stride(0), window, HEADS=heads, DIM=dim,
            DIM_TILE=dim_tile, SEGMENT_SIZE=SEGMENT, SINKS=spec.sinks is not None, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
