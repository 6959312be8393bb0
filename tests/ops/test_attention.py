from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, Ops, RopeTables
from tests.ops.cases import Heads, Rows, assert_bytes_tell_blocks_apart, normal, relative_error

REFERENCE = ReferenceOps(np)
HEADS = [Heads(4, 2, 8), Heads(9, 3, 64), Heads(8, 1, 80), Heads(5, 5, 16), Heads(4, 1, 256), Heads(20, 1, 40)]
SINKS = np.linspace(-1.0, 3.0, 20).astype(np.float32)
BLOCK_SIZES = [16, 8, 24, 32, 64, 128]


def spec_of(heads: Heads, plain: bool) -> AttentionSpec:
    scale = heads.head_dim**-0.5
    return AttentionSpec(scale) if plain else AttentionSpec(scale, 100, 5.0, SINKS[: heads.heads])


def rounds(cpu: CpuOps, storage: str) -> bool:
    """Whether queries and softmax weights are rounded to bfloat16, as the definition allows."""
    return "amx" in cpu.name and storage == "bfloat16"


LENGTHS = [70, 515, 1, 64, 0, 65]
PIECES = [
    [(0, 0, 69), (1, 0, 512), (3, 0, 63), (5, 0, 30)],
    [(2, 0, 1), (1, 512, 515), (4, 0, 0), (0, 69, 70), (3, 63, 64), (5, 30, 65)],
]


@cache
def expected_pieces(heads: Heads, plain: bool, storage: str, rounded: bool) -> list[Any]:
    rows = Rows(REFERENCE, LENGTHS, heads, 16, storage)
    if rounded:
        rows.q = [q.astype(ml_dtypes.bfloat16).astype(np.float32) for q in rows.q]
    return [np.concatenate(rows.step(piece, spec_of(heads, plain))) for piece in PIECES]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "window-softcap-sinks"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_equals_the_reference(cpu: CpuOps, heads: Heads, plain: bool) -> None:
    for block_size, storage in ((16, "bfloat16"), (24, "float16"), (64, "float32"), (32, "bfloat16"), (8, "bfloat16")):
        rows = Rows(cpu, LENGTHS, heads, block_size, storage)
        tolerance = 2.0**-9 if rounds(cpu, storage) else 1e-5
        for piece, expected in zip(PIECES, expected_pieces(heads, plain, storage, rounds(cpu, storage)), strict=True):
            actual = np.concatenate(rows.step(piece, spec_of(heads, plain)))
            assert relative_error(actual, expected) < tolerance, (block_size, storage)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_scores_of_any_sign_and_size(cpu: CpuOps, scale: float) -> None:
    heads = Heads(4, 2, 32)
    for softcap in (None, 2.0):
        spec = AttentionSpec(scale, softcap=softcap)
        both = [Rows(ops, [90], heads, 16, "bfloat16") for ops in (cpu, REFERENCE)]
        for rows in both:
            rows.q = [q.astype(ml_dtypes.bfloat16).astype(np.float32) for q in rows.q]
        actual, expected = (rows.prefill(spec)[0] for rows in both)
        assert relative_error(actual, expected) < (2.0**-8 if rounds(cpu, "bfloat16") else 1e-5)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "window-softcap-sinks"])
@pytest.mark.parametrize("heads", [Heads(6, 2, 24), Heads(9, 3, 64)], ids=str)
def test_chunks_companions_and_block_sizes_do_not_change_bits(cpu: CpuOps, heads: Heads, plain: bool) -> None:
    spec = spec_of(heads, plain)
    lengths = [700, 17, 200]
    expected = Rows(cpu, lengths, heads, 16, "bfloat16").prefill(spec)
    for block_size in BLOCK_SIZES:
        rows = Rows(cpu, lengths, heads, block_size, "bfloat16")
        assert all(map(np.array_equal, rows.prefill(spec), expected))
        for size in (1, 3, 16, 17, 64, 500) if block_size == 16 else (513,):
            assert np.array_equal(rows.by_chunks(0, size, spec), expected[0]), (block_size, size)
        mixed = rows.step([(2, 199, 200), (0, 640, 700), (1, 16, 17)], spec)
        assert np.array_equal(mixed[0], expected[2][199:])
        assert np.array_equal(mixed[1], expected[0][640:])
        assert np.array_equal(mixed[2], expected[1][16:])


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_rows_that_share_a_prefix_have_the_bits_of_each_alone(cpu: CpuOps, storage: str) -> None:
    heads, spec, shared = Heads(6, 2, 32), AttentionSpec(0.2), 1040
    rows = Rows(cpu, [1050, 1060, 1045, 1700, 600], heads, 16, storage)
    for row in (1, 2, 3):
        for part in (rows.k, rows.v):
            part[row][:shared] = part[0][:shared]
        rows.tables[row, : shared // 16] = rows.tables[0, : shared // 16]
    rows.step([(0, 0, 1050), (4, 0, 600)], spec)
    rows.step([(row, shared, len(rows.q[row])) for row in (1, 2, 3)], spec)  # no two rows of a step write one slot
    last = [(row, len(rows.q[row]) - 1, len(rows.q[row])) for row in range(5)]
    alone = [rows.step([piece], spec)[0] for piece in last]
    assert not np.array_equal(alone[0], alone[1])
    for order in ([0, 1, 2, 3, 4], [3, 4, 2, 0, 1]):
        together = rows.step([last[row] for row in order], spec)
        assert all(np.array_equal(together[i], alone[row]) for i, row in enumerate(order))


def test_a_long_context_is_the_same_in_pieces(cpu: CpuOps) -> None:
    heads, spec, length = Heads(3, 1, 32), AttentionSpec(0.3), 5000
    rows = Rows(cpu, [length], heads, 32, "bfloat16")
    expected = rows.prefill(spec)[0]
    for first, last in ((length - 1, length), (length - 7, length), (length - 16, length - 3), (length - 300, length)):
        assert np.array_equal(rows.step([(0, first, last)], spec)[0], expected[first:last])
    reference = Rows(REFERENCE, [length], heads, 32, "bfloat16")
    reference.step([(0, 0, length - 1)], AttentionSpec(0.3, window=1))
    last = reference.step([(0, length - 1, length)], spec)[0]
    assert relative_error(expected[-1:], last) < (2.0**-7 if rounds(cpu, "bfloat16") else 1e-5)


def test_a_context_of_128k(cpu: CpuOps) -> None:
    """Its last queries are those of float64, and memory does not grow with the square of the length."""
    heads, spec, length = Heads(2, 1, 16), AttentionSpec(0.5), 131_072
    rows = Rows(cpu, [length], heads, 64, "bfloat16")
    rows.step([(0, 0, length - 4)], AttentionSpec(0.5, window=1))
    before = psutil.Process().memory_info().rss
    actual = rows.step([(0, length - 4, length)], spec)[0]
    assert psutil.Process().memory_info().rss - before < 32 << 20
    q, k, v = (part[0].astype(ml_dtypes.bfloat16).astype(np.float64) for part in (rows.q, rows.k, rows.v))
    q = q[-4:] if rounds(cpu, "bfloat16") else rows.q[0][-4:].astype(np.float64)
    for token in range(4):
        seen = length - 3 + token
        scores = 0.5 * q[token] @ k[:seen, 0].T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = (weights @ v[:seen, 0] / weights.sum(axis=1, keepdims=True)).reshape(-1)
        assert np.abs(actual[token] - expected).max() < (2e-3 if rounds(cpu, "bfloat16") else 1e-5)


@pytest.mark.parametrize("isa", instruction_sets())
def test_threads_do_not_change_bits(isa: str) -> None:
    heads, spec = Heads(4, 2, 16), AttentionSpec(0.25)
    for storage in ("float16", "bfloat16"):
        results = []
        for threads in (1, 2, 3, 8):
            rows = Rows(CpuOps(threads, isa), [1200, 3], heads, 16, storage)
            whole = rows.prefill(spec)[0]
            results.append([whole, rows.step([(1, 2, 3), (0, 1199, 1200)], spec)[1]])
            assert np.array_equal(results[-1][1], whole[1199:])
        assert all(np.array_equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("window", [None, 90])
def test_a_late_key_that_outweighs_all_before(cpu: CpuOps, window: int | None) -> None:
    """Scores grow by 50 to 400 logits within a split: no choice of what they are compared with may overflow."""
    heads, spec = Heads(6, 2, 32), AttentionSpec(1.0, window)
    both = [Rows(ops, [700], heads, 32, "bfloat16") for ops in (cpu, REFERENCE)]
    for rows in both:
        rows.q[0] = np.abs(rows.q[0]).astype(ml_dtypes.bfloat16).astype(np.float32)
        for position, height in ((75, 2.0), (150, 5.0), (151, 5.0), (400, 16.0), (690, 3.0)):
            rows.k[0][position, 1] = height
    actual, expected = (rows.prefill(spec)[0] for rows in both)
    assert relative_error(actual, expected) < (2.0**-8 if rounds(cpu, "bfloat16") else 1e-5)
    for size in (1, 100):
        assert np.array_equal(both[0].by_chunks(0, size, spec), actual)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_what_another_sequence_left_in_a_block_is_not_seen(cpu: CpuOps, storage: str) -> None:
    heads = Heads(2, 1, 16)
    for spec in (AttentionSpec(0.25), AttentionSpec(0.25, window=20)):
        clean, used = (Rows(cpu, [140], heads, 16, storage) for _ in range(2))
        kept = used.v[0].copy(), used.k[0].copy()
        used.v[0][...] = np.nan
        used.k[0][...] = np.inf
        used.prefill(spec)
        used.v[0][...], used.k[0][...] = kept
        for first, last in ((0, 5), (5, 6), (6, 40), (40, 140)):
            assert np.array_equal(used.step([(0, first, last)], spec)[0], clean.step([(0, first, last)], spec)[0])


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_a_broken_token_is_heard_only_where_it_is_seen(cpu: CpuOps, storage: str) -> None:
    heads, broken = Heads(3, 1, 16), 75
    for window in (None, 20):
        spec = AttentionSpec(0.25, window)
        rows = Rows(cpu, [140], heads, 16, storage)
        expected = rows.prefill(spec)[0]
        rows.v[0][broken] = np.nan
        rows.k[0][broken] = np.inf
        actual = rows.prefill(spec)[0]
        hears = slice(broken, 140 if window is None else broken + window)
        assert np.isnan(actual[hears]).all()
        assert np.array_equal(np.delete(actual, hears, 0), np.delete(expected, hears, 0))
        assert np.array_equal(rows.by_chunks(0, 11, spec), actual, equal_nan=True)


@pytest.mark.parametrize(("provider", "tolerance"), [("native", 0), ("reference", 1e-6)])
def test_layers_have_keys_and_values_of_their_own(provider: str, tolerance: float, cpu: CpuOps) -> None:
    heads, spec = Heads(2, 2, 8), AttentionSpec(0.3)
    ops: Ops = cpu if provider == "native" else REFERENCE
    rows = Rows(ops, [33], heads, 16, "bfloat16")
    first, second = rows.step([(0, 0, 33)], spec, 0)[0], rows.step([(0, 0, 32)], spec, 1)[0]
    assert relative_error(second, first[:32]) <= tolerance
    assert relative_error(rows.step([(0, 32, 33)], spec, 0)[0], first[32:]) <= tolerance


def test_blocks_have_the_same_bytes_where_keys_and_values_are_the_same(cpu: CpuOps) -> None:
    for ops in (cpu, REFERENCE, ReferenceOps(torch)):
        assert_bytes_tell_blocks_apart(ops)


@pytest.mark.parametrize(("heads", "rotary"), [(Heads(6, 2, 24), 24), (Heads(4, 1, 80), 20), (Heads(9, 3, 64), 64)])
def test_rope_inside_is_rope_before(cpu: CpuOps, heads: Heads, rotary: int) -> None:
    tables = RopeTables(*normal(np.random.default_rng(5), 2, 1040, rotary // 2))
    spec = AttentionSpec(heads.head_dim**-0.5)
    pieces: list[list[tuple[int, int, int]]] = [
        [(0, 0, 1030), (1, 0, 40), (3, 0, 1035)],
        [(1, 40, 41), (0, 1030, 1031), (2, 0, 19), (3, 1035, 1036)],
    ]
    for storage in ("bfloat16", "float32"):
        sides = []
        for before in (False, True):
            rows = Rows(cpu, [1031, 41, 19, 1036], heads, 16, storage)
            for part in (rows.k, rows.v):  # a prefix that two rows of one token share
                part[3][:1024] = part[0][:1024]
            rows.tables[3, :64] = rows.tables[0, :64]
            sides.append([np.concatenate(rows.step(piece, spec, 1, tables, before)) for piece in pieces])
        assert all(map(np.array_equal, *sides)), storage
    short = RopeTables(tables.cos[:1030], tables.sin[:1030])
    with pytest.raises(ValueError, match="outside the rope tables"):
        rows.step(pieces[1], spec, 1, short)


def test_the_reference_turns_pairs_as_complex_numbers() -> None:
    """`(a, b)` at angle t is `(a + bi) e^(it)` (arXiv 2104.09864, section 3.2)."""
    rng = np.random.default_rng(7)
    angles, x = normal(rng, 9, 4), normal(rng, 5, 2, 8)
    positions, turned = np.array([8, 0, 3, 3, 1]), x.copy()
    REFERENCE._rotate(turned, positions, np.cos(angles), np.sin(angles))
    expected = (x[:, :, :4] + 1j * x[:, :, 4:]) * np.exp(1j * angles[positions])[:, None, :]
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_rope_inside_leaves_the_arrays_as_they_are(provider: str, cpu: CpuOps) -> None:
    rng, ops = np.random.default_rng(6), cpu if provider == "native" else REFERENCE
    tables = RopeTables(*normal(rng, 2, 8, 4))
    q, k, v = normal(rng, 5, 2, 8), normal(rng, 5, 1, 8), normal(rng, 5, 1, 8)
    kept = [one.copy() for one in (q, k, v)]
    batch = AttentionBatch(*(np.array(one, np.int32) for one in ([0, 1, 2, 3, 4], [0, 5], [0], [[0]])))
    cache = ops.make_cache(CacheShape(1, 1, 16, 1, 8, "float32"))
    result = ops.attention(q, k, v, cache, 0, batch, AttentionSpec(0.3), tables)
    assert all(map(np.array_equal, (q, k, v), kept))
    again = ops.attention(q, k, v, cache, 0, batch, AttentionSpec(0.3))
    assert not np.array_equal(result, again)  # so there was something to rotate


@pytest.mark.parametrize("window", [None, 7])
def test_the_reference_is_torch_attention(window: int | None) -> None:
    heads, length = Heads(4, 2, 16), 30
    spec = AttentionSpec(0.25, window)
    results = [Rows(ReferenceOps(xp), [length], heads, 8, "float32").prefill(spec)[0] for xp in (np, torch)]
    rows = Rows(REFERENCE, [length], heads, 8, "float32")
    q, k, v = (torch.tensor(part[0]).transpose(0, 1) for part in (rows.q, rows.k, rows.v))
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    mask = (distance >= 0) & (distance < (window or length))
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True).transpose(0, 1).reshape(length, -1)
    for result in results:
        assert relative_error(result, expected.numpy()) < 1e-5
