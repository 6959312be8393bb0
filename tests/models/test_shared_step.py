"""Rows of one step share blocks that one of them fills, through whole models: with many tokens (each thread takes tiles
of them through all operations between two attentions) and with few, where the last layer computes only the tokens that
are asked for. Each row has the bits of separate steps, in every order of the rows and with any number of threads."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.weights.load import load_model
from tests.models.paged import PagedModel, Row
from tests.tiny.checkpoints import VOCAB_SIZE

BLOCK = 16
FAMILIES = ["llama", "gemma2"]  # gemma2: windows and full attention in turns
SHAPES = [
    # (start, end) of the writer; then, for each reader, the blocks of the writer that it shares and its own tokens
    ((0, 37), [(2, 5), (1, 40)]),
    ((15, 16), [(1, 1)]),
    ((14, 17), [(1, 1), (1, 3)]),
    ((10, 33), [(2, 1), (1, 16), (2, 9)]),
    ((0, 400), [(25, 7), (20, 190), (3, 1)]),
]


def sharing_rows(paged: PagedModel, shape: Any) -> list[Row]:
    """The writer, whose tokens before its start are in the cache, and the readers."""
    rng = np.random.default_rng(3)
    (start, end), readers = shape
    writer = Row(rng.integers(0, VOCAB_SIZE, end).tolist())
    if start:
        paged.step([writer], [start])
    while len(writer.blocks) * BLOCK < end:
        writer.blocks.append(paged.free.pop())
    rows = [writer]
    for blocks, own in readers:
        text = writer.token_ids[: blocks * BLOCK] + rng.integers(0, VOCAB_SIZE, own).tolist()
        rows.append(Row(text, blocks * BLOCK, writer.blocks[:blocks]))
    return rows


def logits(model: Any, ops: CpuOps, shape: Any, order: tuple[int, ...] | None) -> list[Any]:
    """Of the last token of each row: one step for each, or one for all with the rows in `order`."""
    paged = PagedModel(model, ops, num_blocks=96, block_size=BLOCK)
    rows = sharing_rows(paged, shape)
    counts = [len(row.token_ids) - row.num_computed for row in rows]
    if order is None:
        return [paged.step([row], [count], [1])[0] for row, count in zip(rows, counts, strict=True)]
    found = paged.step([rows[i] for i in order], [counts[i] for i in order], [1] * len(rows))
    return [found[order.index(i)] for i in range(len(rows))]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_step_share_what_one_of_them_writes(family: str, isa: str, tiny: Callable[..., Path]) -> None:
    for threads in (1, 2, 5):
        ops = CpuOps(threads, isa)
        model = load_model(tiny(family), ops, "bfloat16", 512)
        for shape in SHAPES:
            expected = logits(model, ops, shape, None)
            for order in itertools.islice(itertools.permutations(range(len(expected))), 1, None, 2):
                for ours, theirs in zip(logits(model, ops, shape, order), expected, strict=True):
                    assert np.array_equal(ours, theirs), (threads, shape, order)
