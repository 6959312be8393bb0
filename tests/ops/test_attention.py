import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionSpec
from tests.ops.cases import Heads, Rows, relative_error

REFERENCE = ReferenceOps(np)
HEADS = [Heads(4, 2, 8), Heads(9, 3, 64), Heads(8, 1, 80), Heads(5, 5, 16), Heads(4, 1, 256)]
SINKS = np.linspace(-1.0, 3.0, 9).astype(np.float32)


def spec_of(heads: Heads, plain: bool) -> AttentionSpec:
    scale = heads.head_dim**-0.5
    return AttentionSpec(scale) if plain else AttentionSpec(scale, 100, 5.0, SINKS[: heads.heads])


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "window-softcap-sinks"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_equals_the_reference(cpu: CpuOps, heads: Heads, plain: bool) -> None:
    spec = spec_of(heads, plain)
    for block_size, storage in ((16, "bfloat16"), (24, "float16"), (64, "float32")):
        both = [Rows(ops, [70, 515, 1, 64, 0, 65], heads, block_size, storage) for ops in (cpu, REFERENCE)]
        pieces = [[(0, 0, 69), (1, 0, 512), (3, 0, 63), (5, 0, 30)]]
        pieces.append([(2, 0, 1), (1, 512, 515), (4, 0, 0), (0, 69, 70), (3, 63, 64), (5, 30, 65)])
        for piece in pieces:
            actual, expected = (np.concatenate(rows.step(piece, spec)) for rows in both)
            assert relative_error(actual, expected) < 1e-5, (block_size, storage)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "window-softcap-sinks"])
def test_chunks_companions_and_block_sizes_do_not_change_bits(cpu: CpuOps, plain: bool) -> None:
    heads = Heads(6, 2, 24)
    spec = spec_of(heads, plain)
    lengths = [1060, 17, 200]
    expected = Rows(cpu, lengths, heads, 16, "bfloat16").prefill(spec)
    for block_size in (16, 32, 64, 24):
        rows = Rows(cpu, lengths, heads, block_size, "bfloat16")
        assert all(map(np.array_equal, rows.prefill(spec), expected))
        for size in (1, 50, 513):
            assert np.array_equal(rows.by_chunks(0, size, spec), expected[0]), (block_size, size)
        mixed = rows.step([(2, 199, 200), (0, 1000, 1060), (1, 16, 17)], spec)
        assert np.array_equal(mixed[0], expected[2][199:])
        assert np.array_equal(mixed[1], expected[0][1000:])
        assert np.array_equal(mixed[2], expected[1][16:])


@pytest.mark.parametrize("isa", instruction_sets())
def test_threads_do_not_change_bits(isa: str) -> None:
    heads = Heads(4, 2, 16)
    results = []
    for threads in (1, 2, 3, 8):
        rows = Rows(CpuOps(threads, isa), [1200, 3], heads, 16, "float16")
        rows.prefill(AttentionSpec(0.25))
        results.append(rows.step([(1, 2, 3), (0, 1199, 1200)], AttentionSpec(0.25))[1])
    assert all(np.array_equal(result, results[0]) for result in results)


def test_what_another_sequence_left_in_a_block_is_not_seen(cpu: CpuOps) -> None:
    heads, spec = Heads(2, 1, 16), AttentionSpec(0.25)
    clean, used = (Rows(cpu, [40], heads, 16, "float32") for _ in range(2))
    kept = used.v[0].copy(), used.k[0].copy()
    used.v[0][...] = np.nan
    used.k[0][...] = np.inf
    used.prefill(spec)
    used.v[0][...], used.k[0][...] = kept
    for first, last in ((0, 5), (5, 6), (6, 40)):
        assert np.array_equal(used.step([(0, first, last)], spec)[0], clean.step([(0, first, last)], spec)[0])


def test_layers_and_copied_blocks(cpu: CpuOps) -> None:
    heads, spec = Heads(2, 2, 8), AttentionSpec(0.3)
    rows = Rows(cpu, [33], heads, 16, "bfloat16")
    first, second = rows.step([(0, 0, 33)], spec, 0)[0], rows.step([(0, 0, 32)], spec, 1)[0]
    assert np.array_equal(first[:32], second)
    spare = set(range(4)) - set(rows.tables[0].tolist())
    target = np.array([spare.pop()], np.int32)
    cpu.copy_blocks(rows.cache, rows.tables[0, :1].copy(), target)
    rows.tables[0, 0] = target[0]
    assert np.array_equal(rows.step([(0, 32, 33)], spec, 0)[0], first[32:])


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
