"""Paged attention in Triton (PagedAttention, arXiv 2309.06180; running softmax, arXiv 2205.14135).

The cache is `[layers, 2, blocks, kv_heads, block_size, head_dim]`, keys before values. A context is cut at multiples
of `SEGMENT` positions. A query folds each segment into `(top, total, mixed)` from fresh values, then folds the segments
in ascending order. One program does all of it for a tile of queries of a prompt; for single queries, where there are
too few programs to fill a device, each segment is a program of its own and `merge` folds them with the same formula.
What a query computes is a function of its own position alone: not of its companions, nor of how a prompt is cut.

::

    tile of queries:  [BLOCK_Q tokens x GROUP query heads of one kv head]      (each read of K and V serves the group)
    tiles of a row r: from query_starts[r] // BLOCK_Q + r on; a program finds its row by bisection
"""

from typing import Any

import torch
import triton
import triton.language as tl

from quire.ops.types import Array, AttentionBatch, AttentionSpec, RopeTables

SEGMENT = 512
"""Positions of the context that are folded together; a multiple of every block size."""


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
        x = tl.where(dims < HALF, wide * c - partner * s, wide * c + partner * s).to(x.dtype)
    return x


@triton.jit
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
def _fold(top, total, mixed, next_top, next_total, next_mixed):
    """Two parts of one softmax, the earlier positions first."""
    new_top = tl.maximum(top, next_top)
    finite = tl.where(new_top == -float("inf"), 0.0, new_top)
    a, b = tl.exp(top - finite), tl.exp(next_top - finite)
    return new_top, total * a + next_total * b, mixed * a[:, None] + next_mixed * b[:, None]


@triton.jit
def _segment(
    query, keys, values, table, position, first, last, scale, softcap, window, block_stride,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The keys of positions `[first, last)` against `query [BLOCK_M, DIM_TILE]`, whose rows stand at `position`."""
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
    dims = tl.arange(0, DIM_TILE)
    for start in range(first, last, TILE):
        key_position = start + tl.arange(0, TILE)
        exists = key_position < last
        block = tl.load(table + key_position // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        slot = block * block_stride + (key_position % BLOCK_SIZE) * DIM
        at, mask = slot[:, None] + dims[None, :], exists[:, None] & (dims[None, :] < DIM)
        key = tl.load(keys + at, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        distance = position[:, None] - key_position[None, :]
        scores = tl.where((distance >= 0) & (distance < window) & exists[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp(scores - finite[:, None])
        shrink = tl.exp(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + at, mask=mask, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = new_top
    return top, total, mixed


@triton.jit
def attention_kernel(
    q, keys, values, out, parts, cos, sin, query_starts, starts, tables, sinks, rows, q_stride, table_stride,
    block_stride, head_stride, parts_stride, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SEGMENT_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Programs: tile of queries, kv head, and with SPLIT the segment. Without SPLIT writes `out`, with it `parts`."""
    BLOCK_M: tl.constexpr = BLOCK_Q * GROUP_TILE
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = _row_of(tile, query_starts, rows, BLOCK_Q, 1)
    first_token = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - first_token
    offset = (tile - first_token // BLOCK_Q - row) * BLOCK_Q
    start = tl.load(starts + row)
    if offset < count:
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
        table = tables + row * table_stride
        layer_keys, layer_values = keys + kv_head * head_stride, values + kv_head * head_stride
        if SPLIT:
            segment = tl.program_id(2)
            if (segment * SEGMENT_SIZE < last) & ((segment + 1) * SEGMENT_SIZE > first_seen):
                top, total, mixed = _segment(
                    query, layer_keys, layer_values, table, position, segment * SEGMENT_SIZE,
                    tl.minimum((segment + 1) * SEGMENT_SIZE, last), scale, softcap, window, block_stride,
                    DIM, DIM_TILE, BLOCK_M, TILE, BLOCK_SIZE, SOFTCAP,
                )  # fmt: skip
                at = parts + (lane_token * HEADS + head) * parts_stride + segment * (DIM + 2)
                tl.store(at, top, mask=valid)
                tl.store(at + 1, total, mask=valid)
                tl.store(at[:, None] + 2 + dims[None, :], mixed, mask=mask)
        else:
            top = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            mixed = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
            for segment in range(first_seen // SEGMENT_SIZE, tl.cdiv(last, SEGMENT_SIZE)):
                next_top, next_total, next_mixed = _segment(
                    query, layer_keys, layer_values, table, position, segment * SEGMENT_SIZE,
                    tl.minimum((segment + 1) * SEGMENT_SIZE, last), scale, softcap, window, block_stride,
                    DIM, DIM_TILE, BLOCK_M, TILE, BLOCK_SIZE, SOFTCAP,
                )  # fmt: skip
                top, total, mixed = _fold(top, total, mixed, next_top, next_total, next_mixed)
            if SINKS:
                sink = tl.load(sinks + head, mask=valid, other=0.0)
                top, total, mixed = _fold(top, total, mixed, sink, tl.full([BLOCK_M], 1.0, tl.float32), mixed * 0.0)
            result = mixed / total[:, None]
            at = out + (lane_token[:, None] * HEADS + head[:, None]) * DIM + dims[None, :]
            tl.store(at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def merge_kernel(
    parts, out, query_starts, starts, sinks, rows, parts_stride, window,
    HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The segments of one token, all heads, in ascending order."""
    token = tl.program_id(0)
    row = _row_of(token, query_starts, rows, 1, 0)
    position = tl.load(starts + row) + token - tl.load(query_starts + row)
    heads, dims = tl.arange(0, HEADS_TILE), tl.arange(0, DIM_TILE)
    exists = heads < HEADS
    mask = exists[:, None] & (dims[None, :] < DIM)
    top = tl.full([HEADS_TILE], -float("inf"), tl.float32)
    total = tl.zeros([HEADS_TILE], tl.float32)
    mixed = tl.zeros([HEADS_TILE, DIM_TILE], tl.float32)
    base = parts + (token.to(tl.int64) * HEADS + heads) * parts_stride
    first_seen = tl.maximum(position - window + 1, 0)
    for segment in range(first_seen // SEGMENT_SIZE, position // SEGMENT_SIZE + 1):
        at = base + segment * (DIM + 2)
        next_top = tl.load(at, mask=exists, other=-float("inf"))
        next_total = tl.load(at + 1, mask=exists, other=0.0)
        next_mixed = tl.load(at[:, None] + 2 + dims[None, :], mask=mask, other=0.0)
        top, total, mixed = _fold(top, total, mixed, next_top, next_total, next_mixed)
    if SINKS:
        sink = tl.load(sinks + heads, mask=exists, other=0.0)
        top, total, mixed = _fold(top, total, mixed, sink, tl.full([HEADS_TILE], 1.0, tl.float32), mixed * 0.0)
    at = out + (token.to(tl.int64) * HEADS + heads[:, None]) * DIM + dims[None, :]
    tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)


def attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Any,
    layer: int,
    batch: AttentionBatch,
    spec: AttentionSpec,
    rope: RopeTables | None,
) -> Array:
    """See `Ops.attention`. `cache` is the tensor of the module's docstring. Launches without waiting for the device."""
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    keys, values = cache[layer, 0], cache[layer, 1]
    kv_heads, block_size = keys.shape[1], keys.shape[2]
    rows, width = batch.block_tables.shape
    group, dim_tile = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    strides = (keys.stride(0), keys.stride(1))
    tables, half = ((q, q), 0) if rope is None else ((rope.cos, rope.sin), rope.cos.shape[1])
    store_kernel[(tokens,)](
        k, v, keys, values, *tables, batch.query_starts, batch.starts, batch.block_tables, rows,
        k.stride(0), v.stride(0), batch.block_tables.stride(0), *strides,
        KV_HEADS=kv_heads, DIM=dim, DIM_TILE=dim_tile, HEADS_TILE=triton.next_power_of_2(kv_heads),
        BLOCK_SIZE=block_size, HALF=half,
    )  # fmt: skip
    group_tile = triton.next_power_of_2(group)
    single = tokens <= rows  # a query of each row: too few programs without splitting the context
    block_q = max(1, 16 // group_tile) if single else max(1, 64 // group_tile)
    segments = -(-width * block_size // SEGMENT) if single else 1
    parts = torch.empty(
        (tokens * heads, segments * (dim + 2)) if single else (1, 1), dtype=torch.float32, device=q.device
    )
    window = 2**30 if spec.window is None else spec.window
    sinks = q if spec.sinks is None else spec.sinks
    attention_kernel[(tokens // block_q + rows, kv_heads, segments)](
        q, keys, values, out, parts, *tables, batch.query_starts, batch.starts, batch.block_tables, sinks, rows,
        q.stride(0), batch.block_tables.stride(0), *strides, parts.stride(0), spec.scale, spec.softcap or 1.0, window,
        HEADS=heads, GROUP=group, GROUP_TILE=group_tile, DIM=dim, DIM_TILE=dim_tile, BLOCK_Q=block_q,
        TILE=64 if dim_tile <= 128 else 32, BLOCK_SIZE=block_size, SEGMENT_SIZE=SEGMENT, SPLIT=single,
        SOFTCAP=spec.softcap is not None, SINKS=spec.sinks is not None, HALF=half,
    )  # fmt: skip
    if single:
        merge_kernel[(tokens,)](
            parts, out, batch.query_starts, batch.starts, sinks, rows, parts.stride(0), window,
            HEADS=heads, HEADS_TILE=triton.next_power_of_2(heads), DIM=dim, DIM_TILE=dim_tile, SEGMENT_SIZE=SEGMENT,
            SINKS=spec.sinks is not None,
        )  # fmt: skip
    return out
