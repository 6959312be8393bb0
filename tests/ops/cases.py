"""Inputs for the tests of the operations, and how results are compared."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, Ops


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference over the largest magnitude: `rel` in the docstrings of the reference."""
    if expected.size == 0:
        return 0.0
    difference = np.abs(actual.astype(np.float64) - expected).max()
    return float(difference / max(np.abs(expected).max(), 1e-30))


def normal(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    head_dim: int


def rotate(x: Any, positions: Any, rope: Any) -> None:
    """Turn the heads of `x [tokens, heads, head_dim]` (numpy) in place, by halves (RoFormer, arXiv 2104.09864)."""
    half = rope.cos.shape[1]
    cos, sin = (table[positions][:, None, :] for table in (rope.cos, rope.sin))
    a, b = x[:, :, :half].copy(), x[:, :, half : 2 * half].copy()
    x[:, :, :half], x[:, :, half : 2 * half] = a * cos - b * sin, b * cos + a * sin


class Rows:
    """Several sequences with keys, values and queries for all their positions, over a cache in random block order."""

    def __init__(self, ops: Ops, lengths: list[int], heads: Heads, block_size: int, storage: str, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.ops = ops
        self.q = [normal(rng, n, heads.heads, heads.head_dim) for n in lengths]
        self.k = [normal(rng, n, heads.kv_heads, heads.head_dim) for n in lengths]
        self.v = [normal(rng, n, heads.kv_heads, heads.head_dim) for n in lengths]
        counts = [-(-n // block_size) for n in lengths]
        blocks = rng.permutation(sum(counts) + 1).astype(np.int32)
        self.tables = np.full((len(lengths), max([1, *counts])), -1, np.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = blocks[sum(counts[:row]) : sum(counts[:row]) + count]
        self.cache = ops.make_cache(
            CacheShape(2, sum(counts) + 1, block_size, heads.kv_heads, heads.head_dim, storage)  # type: ignore[arg-type]
        )

    def step(
        self, pieces: list[tuple[int, int, int]], spec: Any, layer: int = 1, rope: Any = None, before: bool = False
    ) -> list[Any]:
        """One call of attention with, for each (row, first, last), those positions of it; a result for each. `rope`
        is left to attention, or done `before`."""
        ops = self.ops
        rows = [row for row, _, _ in pieces]
        starts = np.cumsum([0, *(last - first for _, first, last in pieces)])
        batch = AttentionBatch(
            positions=ops.array(np.concatenate([np.arange(a, b) for _, a, b in pieces]), "int32"),
            query_starts=ops.array(starts, "int32"),
            starts=ops.array([first for _, first, _ in pieces], "int32"),
            block_tables=ops.array(self.tables[rows], "int32"),
        )
        q, k, v = (
            ops.array(np.concatenate([part[row][a:b] for row, a, b in pieces]), "float32")
            for part in (self.q, self.k, self.v)
        )
        if before:
            for x in (q, k):
                rotate(x, batch.positions, rope)
        out = ops.to_numpy(ops.attention(q, k, v, self.cache, layer, batch, spec, None if before else rope))
        return [out[a:b] for a, b in itertools.pairwise(starts)]

    def prefill(self, spec: Any) -> list[Any]:
        """Every row from its first position to its last in one call."""
        return self.step([(row, 0, len(q)) for row, q in enumerate(self.q)], spec)

    def by_chunks(self, row: int, size: int, spec: Any) -> Any:
        """One row alone, `size` positions a call."""
        length = len(self.q[row])
        parts = [self.step([(row, a, min(a + size, length))], spec)[0] for a in range(0, length, size)]
        return np.concatenate(parts)


PLAIN_STORAGES = ((16, "float32"), (8, "float16"), (24, "bfloat16"))


def assert_bytes_tell_blocks_apart(ops: Ops, storages: Any = PLAIN_STORAGES) -> None:
    """`block_bytes` of two sequences that are equal, written in different pieces, and then differ in one number."""
    for block_size, storage in storages:
        rows = Rows(ops, [2 * block_size] * 2, Heads(4, 2, 24), block_size, storage)
        rows.k[1][...], rows.v[1][...] = rows.k[0], rows.v[0]
        spec = AttentionSpec(0.25)
        rows.step([(0, 0, 2 * block_size)], spec)
        for first, last in ((0, 5), (5, block_size + 1), (block_size + 1, 2 * block_size)):
            rows.step([(1, first, last)], spec)
        assert _blocks_that_differ(rows) == []
        last = 2 * block_size - 1
        for changed in (rows.k[1], rows.v[1]):
            kept = changed[last, 1, 23]
            for value, differ in ((kept + 1, [(1, 1)]), (kept, [])):
                changed[last, 1, 23] = value
                rows.step([(1, last, last + 1)], spec)
                assert _blocks_that_differ(rows) == differ


def _blocks_that_differ(rows: Rows) -> list[tuple[int, int]]:
    """(Layer, block) in which the sequences 0 and 1 do not have the same bytes."""
    read = rows.ops.block_bytes
    return [
        (layer, index)
        for layer in (0, 1)
        for index, (one, other) in enumerate(zip(*rows.tables.tolist(), strict=True))
        if read(rows.cache, one, layer) != read(rows.cache, other, layer)
    ]
