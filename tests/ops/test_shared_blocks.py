"""All writes of a step come before the reads of other rows.

The prefix cache finds a block as soon as the step that fills it is scheduled, so rows of one step share blocks that one
of them is filling. Whatever the order of the rows, the threads and the instruction set, each row gets the bits that the
same tokens give in separate steps. The cache holds NaN of earlier requests wherever nothing was written: what is read
too early, or lies behind a row's last token, is heard.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionBatch, AttentionSpec, CacheDtype, CacheShape, Ops, RopeTables
from tests.ops.cases import Heads, normal


@dataclass
class Row:
    """New tokens `[start, stop)` of a text; the blocks before `start` were filled by others or in an earlier step."""

    text: int
    start: int
    stop: int
    table: list[int]


class SharedStep:
    """A random step. Row 0 fills blocks; each later row shares the whole blocks of a row before it, up to a random one,
    and goes on with tokens of its own, which the next row may share in turn. Queries, keys and values of a position
    are those of its text, and a shared block has the same text in all of its rows."""

    def __init__(self, rng: np.random.Generator, heads: Heads, block_size: int, max_length: int, longest_piece: int):
        self.heads, self.block_size, self.max_length = heads, block_size, max_length
        self.rows: list[Row] = []
        self.texts: list[Any] = []
        self.num_blocks = 0
        last_split = max(0, max_length // 512 * 512 - int(rng.integers(1, 20)))  # a writer at the end of a KV split
        start = int(rng.choice([0, int(rng.integers(0, max_length - 20)), last_split]))
        self._add(rng, None, start, longest_piece)
        for _ in range(int(rng.integers(1, 4))):
            parent = int(rng.integers(len(self.rows)))
            whole = self.rows[parent].stop // block_size
            most = self.rows[parent].start // block_size + 1  # at least one that the parent fills, where it fills one
            shared = int(rng.integers(min(most, whole), whole + 1))
            self._add(rng, parent, shared * block_size, longest_piece)

    def _add(self, rng: np.random.Generator, parent: int | None, start: int, longest_piece: int) -> None:
        stop = min(self.max_length, start + int(rng.integers(1, longest_piece + 1)))
        heads = self.heads
        text = [normal(rng, stop, count, heads.head_dim) for count in (heads.heads, heads.kv_heads, heads.kv_heads)]
        table: list[int] = []
        if parent is not None:
            table = self.rows[parent].table[: start // self.block_size]
            for own, shared in zip(text, self.texts[parent], strict=True):
                own[:start] = shared[:start]
        num_new = -(-stop // self.block_size) - len(table)
        table += range(self.num_blocks, self.num_blocks + num_new)
        self.num_blocks += num_new
        self.texts.append(text)
        self.rows.append(Row(len(self.texts) - 1, start, stop, table))

    def cache(self, ops: Ops, storage: CacheDtype) -> Any:
        """Blocks full of NaN, but for those of row 0 before its start."""
        heads = self.heads
        shape = CacheShape(1, self.num_blocks, self.block_size, heads.kv_heads, heads.head_dim, storage)
        cache = ops.make_cache(shape)
        num_slots = self.num_blocks * self.block_size
        nan = [np.full((num_slots, n, heads.head_dim), np.nan, np.float32) for n in (heads.heads, heads.kv_heads)]
        self._attend(ops, cache, [(0, num_slots, list(range(self.num_blocks)), [nan[0], nan[1], nan[1]])], 1, None)
        first = self.rows[0]
        if first.start:
            self._attend(ops, cache, [(0, first.start, first.table, self.texts[0])], 1, None)
        return cache

    def _attend(
        self, ops: Ops, cache: Any, pieces: list[Any], window: int | None, rope: RopeTables | None
    ) -> list[Any]:
        bounds = np.cumsum([0, *(stop - start for start, stop, _, _ in pieces)])
        tables = np.zeros((len(pieces), max(len(table) for _, _, table, _ in pieces)), np.int32)
        for row, (_, _, table, _) in zip(tables, pieces, strict=True):
            row[: len(table)] = table
        positions = np.concatenate([np.arange(start, stop) for start, stop, _, _ in pieces])
        starts = [start for start, _, _, _ in pieces]
        batch = AttentionBatch(*(ops.array(x, "int32") for x in (positions, bounds, starts, tables)))
        q, k, v = (
            ops.array(np.concatenate([text[part][start:stop] for start, stop, _, text in pieces]), "float32")
            for part in range(3)
        )
        spec = AttentionSpec(self.heads.head_dim**-0.5, window)
        out = ops.to_numpy(ops.attention(q, k, v, cache, 0, batch, spec, rope))
        return [out[a:b] for a, b in itertools.pairwise(bounds)]

    def run(
        self, ops: Ops, storage: CacheDtype, order: list[int], *, window: int | None, rope: bool, apart: bool
    ) -> Any:
        """The results of the rows, in their own order: of one step with the rows in `order`, or one step for each."""
        cache = self.cache(ops, storage)
        angles = np.arange(self.num_blocks * self.block_size, dtype=np.float32)[:, None] / 7.0
        angles = angles * np.linspace(1.0, 0.1, self.heads.head_dim // 2, dtype=np.float32)
        tables = RopeTables(*(ops.array(f(angles), "float32") for f in (np.cos, np.sin))) if rope else None
        pieces = [(row.start, row.stop, row.table, self.texts[row.text]) for row in self.rows]
        if apart:
            return [self._attend(ops, cache, [piece], window, tables)[0] for piece in pieces]
        found = self._attend(ops, cache, [pieces[row] for row in order], window, tables)
        return [found[order.index(row)] for row in range(len(pieces))]


def count_differences(
    ops: Ops, storage: CacheDtype, heads: Heads, seeds: range, apart: Ops | None = None, max_length: int = 600
) -> tuple[int, int]:
    """Rows compared, and rows with other bits than in separate steps (computed by `apart`, or by the same provider)."""
    compared = different = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        block_size = int(rng.choice([8, 16, 16, 24, 32]))
        longest_piece = min(max_length // 4, int(rng.choice([1, 4, 16, 16, 40, 150])))
        step = SharedStep(rng, heads, block_size, max_length, longest_piece)
        options: dict[str, Any] = {"window": [None, None, 40][seed % 3], "rope": seed % 2 == 0}
        expected = step.run(apart or ops, storage, [], apart=True, **options)
        assert not any(np.isnan(x).any() for x in expected)
        orders = list(itertools.permutations(range(len(step.rows))))
        for place in rng.permutation(len(orders))[:4]:
            found = step.run(ops, storage, list(orders[place]), apart=False, **options)
            compared += len(found)
            different += sum(not np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    return compared, different


@pytest.mark.parametrize(
    ("storage", "threads"), [("bfloat16", (1, 2, 8)), ("float16", (2, 3, 5)), ("float32", (4, 6, 7))], ids=str
)
@pytest.mark.parametrize("isa", instruction_sets())
def test_native(isa: str, storage: CacheDtype, threads: tuple[int, ...]) -> None:
    alone = CpuOps(1, isa)
    for number, count in enumerate(threads):
        heads = [Heads(6, 2, 16), Heads(9, 3, 64), Heads(4, 1, 40)][number]
        seeds = range(number * 8, number * 8 + 8)
        compared, different = count_differences(CpuOps(count, isa), storage, heads, seeds, alone)
        assert compared > 50 and different == 0, (count, different, compared)


@pytest.mark.parametrize("namespace", [np, torch], ids=["numpy", "torch"])
def test_the_reference(namespace: Any) -> None:
    ops = ReferenceOps(namespace)
    for storage in ("bfloat16", "float32") if namespace is torch else ("bfloat16", "float16"):
        compared, different = count_differences(ops, storage, Heads(4, 2, 16), range(25))
        assert compared > 100 and different == 0, (storage, different, compared)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of masked lanes
def test_cuda() -> None:
    pytest.importorskip("triton")
    from quire.ops.cuda.provider import CudaOps

    on_device = torch.cuda.is_available()
    ops = CudaOps("cuda" if on_device else "cpu")
    for storage in ("bfloat16", "float16") if on_device else ("float16",):
        seeds, max_length = (range(60), 600) if on_device else (range(2), 40)
        compared, different = count_differences(ops, storage, Heads(2, 1, 16), seeds, max_length=max_length)
        assert compared > 0 and different == 0, (storage, different, compared)
