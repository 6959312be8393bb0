"""A cache of 8 bits: a number for each item of a key or value, a scale for each token and head."""

import itertools
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionSpec, CacheDtype, CacheShape, Ops, RopeTables
from tests.ops.cases import Heads, Rows, assert_bytes_tell_blocks_apart, normal, relative_error, rotate
from tests.ops.test_shared_blocks import count_differences

FORMATS: tuple[CacheDtype, ...] = ("int8", "fp8")
REFERENCE = ReferenceOps(np)
HEADS = [Heads(9, 3, 64), Heads(12, 1, 40), Heads(2, 1, 250)]
LENGTHS = [70, 515, 1, 0, 65]
PIECES = [
    [(0, 0, 69), (1, 0, 512), (4, 0, 30)],
    [(2, 0, 1), (1, 512, 515), (3, 0, 0), (0, 69, 70), (4, 30, 65)],
]
SINKS = np.linspace(-1.0, 3.0, 12).astype(np.float32)


KERNELS = [isa for isa in instruction_sets() if isa not in ("avx512_vnni", "avx512_bf16")]
"""Those two attend with the kernel of avx512."""


@pytest.fixture(params=KERNELS)
def cpu(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(2, request.param)


def spec_of(heads: Heads, plain: bool) -> AttentionSpec:
    scale = heads.head_dim**-0.5
    return AttentionSpec(scale) if plain else AttentionSpec(scale, 100, 5.0, SINKS[: heads.heads])


def as_cached(x: Any, storage: str) -> Any:
    """`x [..., head_dim]` as it is read again, by the formats' own types: numpy's integers, ml_dtypes' e4m3."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    qmax = np.float32(127 if storage == "int8" else 448)
    inverse = np.where(largest > 0, qmax / np.where(largest > 0, largest, 1), 0).astype(np.float32)
    numbers = (
        np.rint(x * inverse).astype(np.int8) if storage == "int8" else (x * inverse).astype(ml_dtypes.float8_e4m3fn)
    )
    return numbers.astype(np.float64) * (largest / qmax)


def by_hand(q: Any, k: Any, v: Any, scale: float) -> Any:
    """In float64, of `q [tokens, heads, dim]`, the last positions, over all of `k, v [length, kv_heads, dim]`."""
    tokens, heads, dim = q.shape
    group, length, out = heads // k.shape[1], len(k), np.empty(q.shape)
    for head in range(heads):
        scores = scale * q[:, head].astype(np.float64) @ k[:, head // group].T
        scores[np.arange(length) > np.arange(length - tokens, length)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights @ v[:, head // group] / weights.sum(axis=1, keepdims=True)
    return out.reshape(tokens, heads * dim)


@cache
def expected_pieces(heads: Heads, plain: bool, storage: str) -> list[Any]:
    rows = Rows(REFERENCE, LENGTHS, heads, 16, storage)
    return [np.concatenate(rows.step(piece, spec_of(heads, plain))) for piece in PIECES]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "window-softcap-sinks"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_equals_the_reference(cpu: CpuOps, heads: Heads, plain: bool) -> None:
    for block_size, storage in ((16, "int8"), (24, "fp8"), (8, "int8"), (64, "fp8")):
        rows = Rows(cpu, LENGTHS, heads, block_size, storage)
        for piece, expected in zip(PIECES, expected_pieces(heads, plain, storage), strict=True):
            actual = np.concatenate(rows.step(piece, spec_of(heads, plain)))
            assert relative_error(actual, expected) < 1e-5, (block_size, storage)


@pytest.mark.parametrize("storage", FORMATS)
def test_attention_is_that_of_float64_over_the_cached_numbers(cpu: CpuOps, storage: str) -> None:
    """All loss is the format's own: 2e-6 of the largest result beside float64 over what the cache holds, with
    magnitudes that differ thirtyfold from token to token and eightfold within a head. And the cached numbers are as
    near as their bits say: half a step of 127 or 2^-4 of each number's own magnitude."""
    heads, spec = Heads(6, 2, 64), AttentionSpec(0.125)
    for ops in (cpu, REFERENCE):
        rows = Rows(ops, [600], heads, 16, storage)
        rng = np.random.default_rng(4)
        for part in (rows.k[0], rows.v[0]):
            part *= np.exp(rng.uniform(-3.5, 0, (600, 2, 1))) * np.where(rng.random((1, 2, 64)) < 0.05, 8, 1)
            part[...] = part.astype(np.float32)
        k, v = (as_cached(part[0], storage) for part in (rows.k, rows.v))
        actual = rows.step([(0, 0, 590)], spec)[0]
        assert relative_error(actual, by_hand(rows.q[0][:590], k[:590], v[:590], 0.125)) < 2e-6
        actual = rows.step([(0, 590, 600)], spec)[0]
        assert relative_error(actual, by_hand(rows.q[0][590:], k, v, 0.125)) < 2e-6
        for part, cached in ((rows.k[0], k), (rows.v[0], v)):
            largest = np.abs(part).max(axis=-1, keepdims=True)
            step = largest / 254 if storage == "int8" else np.maximum(np.abs(part) / 16, largest / 448 / 2**10)
            assert (np.abs(cached - part) <= step * (1 + 1e-6)).all()


@pytest.mark.parametrize("storage", FORMATS)
def test_every_number_is_read_as_it_is(storage: str) -> None:
    """Of one key alone the result is its value: all 255 integers, all 253 finite numbers of e4m3, at extreme scales."""
    numbers = np.arange(256, dtype=np.uint8)
    if storage == "int8":
        values = np.delete(numbers.view(np.int8).astype(np.float32), 128)
    else:
        values = numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        values = values[np.isfinite(values)]
    values = np.append(values, np.zeros(256 - len(values), np.float32))
    for isa in KERNELS:
        for size in (1.0, 2.0**-90, 2.0**100, 3.0**20):
            rows = Rows(CpuOps(1, isa), [1], Heads(1, 1, 256), 16, storage)
            rows.v[0][0, 0] = values * np.float32(size)
            (found,) = rows.step([(0, 0, 1)], AttentionSpec(1.0))
            np.testing.assert_allclose(found[0], rows.v[0][0, 0], rtol=2e-7, atol=0)


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("heads", [Heads(6, 2, 24), Heads(12, 1, 40)], ids=str)
def test_chunks_companions_and_block_sizes_do_not_change_bits(cpu: CpuOps, heads: Heads, storage: str) -> None:
    spec, lengths = AttentionSpec(0.2, 300, 5.0), [700, 17, 200]
    expected = Rows(cpu, lengths, heads, 16, storage).prefill(spec)
    for block_size in (16, 8, 24, 128):
        rows = Rows(cpu, lengths, heads, block_size, storage)
        assert all(map(np.array_equal, rows.prefill(spec), expected))
        for size in (1, 17, 64) if block_size == 16 else (513,):
            assert np.array_equal(rows.by_chunks(0, size, spec), expected[0]), (block_size, size)
        mixed = rows.step([(2, 199, 200), (0, 640, 700), (1, 16, 17)], spec)
        assert all(map(np.array_equal, mixed, (expected[2][199:], expected[0][640:], expected[1][16:])))


@pytest.mark.parametrize("storage", FORMATS)
def test_rows_of_a_step_that_share_blocks_and_threads(storage: CacheDtype) -> None:
    """Writes first: in any order of the rows and with any number of threads the bits of separate steps."""
    for isa in KERNELS:
        alone = CpuOps(1, isa)
        for threads in (2, 5):
            compared, different = count_differences(CpuOps(threads, isa), storage, Heads(4, 2, 16), range(6), alone)
            assert compared > 20 and different == 0


@pytest.mark.parametrize("storage", FORMATS)
def test_a_key_is_rounded_after_it_is_rotated(cpu: CpuOps, storage: str) -> None:
    heads, spec = Heads(9, 3, 64), AttentionSpec(0.125)
    tables = RopeTables(*normal(np.random.default_rng(5), 2, 80, 32))
    inside, before = (
        Rows(cpu, [70], heads, 16, storage).step([(0, 0, 70)], spec, 1, tables, place)[0] for place in (False, True)
    )
    assert np.array_equal(inside, before)
    rows = Rows(cpu, [70], heads, 16, storage)
    for part in (rows.q[0], rows.k[0]):
        rotate(part, np.arange(70), tables)
    k, v = (as_cached(part[0], storage) for part in (rows.k, rows.v))
    assert relative_error(inside, by_hand(rows.q[0], k, v, 0.125)) < 5e-6


@pytest.mark.parametrize("storage", FORMATS)
def test_a_broken_token_is_heard_only_where_it_is_seen(cpu: CpuOps, storage: str) -> None:
    heads, broken = Heads(3, 1, 16), 75
    for window in (None, 20):
        spec = AttentionSpec(0.25, window)
        for bad, part in itertools.product((np.nan, np.inf, -np.inf), ("k", "v")):
            rows = Rows(cpu, [140], heads, 24, storage)
            expected = rows.prefill(spec)[0]
            getattr(rows, part)[0][broken, 0, 5] = bad
            actual = rows.prefill(spec)[0]
            hears = slice(broken, 140 if window is None else broken + window)
            assert np.isnan(actual[hears]).all()
            assert np.array_equal(np.delete(actual, hears, 0), np.delete(expected, hears, 0))


@pytest.mark.parametrize("storage", FORMATS)
def test_what_another_sequence_left_in_a_block_is_not_seen(cpu: CpuOps, storage: str) -> None:
    for spec in (AttentionSpec(0.25), AttentionSpec(0.25, window=20)):
        clean, used = (Rows(cpu, [140], Heads(2, 1, 16), 16, storage) for _ in range(2))
        kept = used.v[0].copy(), used.k[0].copy()
        used.v[0][...], used.k[0][...] = np.nan, np.inf
        used.prefill(spec)
        used.v[0][...], used.k[0][...] = kept
        for first, last in ((0, 5), (5, 6), (6, 40), (40, 140)):
            assert np.array_equal(used.step([(0, first, last)], spec)[0], clean.step([(0, first, last)], spec)[0])


@pytest.mark.parametrize("storage", FORMATS)
def test_zeros_and_the_smallest_and_largest_numbers(cpu: CpuOps, storage: str) -> None:
    heads, spec = Heads(2, 1, 16), AttentionSpec(0.25)
    for size in (0.0, 1e-38, 2.0**-101, 2.0**-100, 1e37):
        found = []
        for ops in (cpu, REFERENCE):
            rows = Rows(ops, [20], heads, 16, storage)
            rows.v[0] *= np.float32(size)
            rows.k[0] *= np.float32(min(size, 1.0))
            found.append(rows.prefill(spec)[0])
        assert np.isfinite(found[0]).all()
        np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-6 * np.abs(found[1]).max())


def test_blocks_have_the_same_bytes_where_keys_and_values_are_the_same(cpu: CpuOps) -> None:
    for ops in (cpu, REFERENCE, ReferenceOps(torch)):
        assert_bytes_tell_blocks_apart(ops, ((16, "int8"), (8, "fp8"), (24, "int8")))


def test_a_block_takes_about_half_of_16_bits(cpu: CpuOps) -> None:
    def size(storage: CacheDtype) -> CacheShape:
        return CacheShape(30, 1, 16, 3, 64, storage)

    for storage in FORMATS:
        assert size(storage).bytes_per_block == 2 * 30 * 16 * 3 * (64 + 4)
        assert size(storage).bytes_per_block / size("bfloat16").bytes_per_block == 17 / 32
        ops: Ops = cpu
        read = ops.block_bytes(ops.make_cache(size(storage)), 0, 0)
        assert len(read) * 30 == size(storage).bytes_per_block


@pytest.mark.parametrize("storage", FORMATS)
def test_released_blocks_are_empty_and_serve_again(cpu: CpuOps, storage: str) -> None:
    spec = AttentionSpec(0.125)
    rows = Rows(cpu, [3000], Heads(2, 2, 64), 16, storage)  # 8.7 KB a block and two layers: pages of several blocks
    expected = rows.prefill(spec)[0]
    first, number = 20, 60
    cpu.release_blocks(rows.cache, first, number)
    assert not any(cpu.block_bytes(rows.cache, first + number // 2, 1))
    assert any(cpu.block_bytes(rows.cache, first - 1, 1)) and any(cpu.block_bytes(rows.cache, first + number, 1))
    assert np.array_equal(rows.prefill(spec)[0], expected)


def test_a_cache_of_another_type_is_refused(cpu: CpuOps) -> None:
    with pytest.raises(ValueError, match="storage is not one of bfloat16, float16, float32, int8, fp8"):
        cpu.make_cache(CacheShape(1, 1, 16, 1, 8, "fp8_e5m2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="storage is not one of bfloat16, float16, float32"):
        cpu._native.pack(np.zeros((8, 8), np.float32), None, "int8", False, None)
