"""The smallest engine: one model, one paged cache, rows that are advanced together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quire.models.model import Model
from quire.ops.types import AttentionBatch, Ops


@dataclass
class Row:
    """A sequence; the first `num_computed` of its tokens are in the cache."""

    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedModel:
    """Advances rows over a cache whose blocks are handed out in a scrambled order."""

    def __init__(self, model: Model, ops: Ops, *, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.model = model
        self.ops = ops
        self.block_size = block_size
        self.cache = ops.make_cache(model.cache_shape(num_blocks, block_size))
        self.free = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def step(self, rows: Sequence[Row], counts: Sequence[int], outputs: Sequence[int] | None = None) -> list[Any]:
        """Compute the next `counts[r]` tokens of each row; logits `[outputs[r], vocabulary]` of the last of each."""
        token_ids, positions = [], []
        for row, count in zip(rows, counts, strict=True):
            stop = row.num_computed + count
            token_ids += row.token_ids[row.num_computed : stop]
            positions += range(row.num_computed, stop)
            while len(row.blocks) * self.block_size < stop:
                row.blocks.append(self.free.pop())
        query_starts = np.cumsum([0, *counts])
        tables = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int32)
        for table, row in zip(tables, rows, strict=True):
            table[: len(row.blocks)] = row.blocks
        batch = AttentionBatch(
            positions=self.ops.array(positions, "int32"),
            query_starts=self.ops.array(query_starts, "int32"),
            starts=self.ops.array([row.num_computed for row in rows], "int32"),
            block_tables=self.ops.array(tables, "int32"),
            outputs=None
            if outputs is None
            else np.array(
                [at for end, n in zip(query_starts[1:], outputs, strict=True) for at in range(end - n, end)], np.int32
            ),
        )
        hidden = self.model.forward(self.ops.array(token_ids, "int32"), batch, self.cache)
        logits = self.ops.to_numpy(self.model.logits(hidden))
        for row, count in zip(rows, counts, strict=True):
            row.num_computed += count
        return np.split(logits, np.cumsum(counts if outputs is None else outputs)[:-1])

    def all_logits(self, token_ids: Sequence[int], chunks: Sequence[int]) -> Any:
        """`[tokens, vocabulary]` of one sequence, computed in chunks."""
        row = Row(list(token_ids))
        return np.concatenate([self.step([row], [count])[0] for count in chunks])

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Each prompt with `num_tokens` greedy tokens, all rows in one batch."""
        rows = [Row(list(prompt)) for prompt in prompts]
        for _ in range(num_tokens):
            logits = self.step(rows, [len(row.token_ids) - row.num_computed for row in rows])
            for row, row_logits in zip(rows, logits, strict=True):
                row.token_ids.append(int(row_logits[-1].argmax()))
        return [row.token_ids for row in rows]
