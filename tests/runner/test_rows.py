"""Permanent rows against lists: what each step gathers, whatever came and went before."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from quire.core.plan import NewRow, ScheduledRow
from quire.core.request import SamplingSpec
from quire.ops.reference import ReferenceOps
from quire.runner.rows import Rows

MAX_ROWS, MAX_MODEL_LEN, BLOCK_SIZE, NULL_BLOCK = 4, 11, 4, 99
OPS = ReferenceOps(np)


@dataclass
class Row:
    """What one row holds, in lists."""

    known: list[int]
    blocks: list[int]
    pending: list[int] = field(default_factory=list)
    """Tokens that only the device knows, the oldest first."""

    @property
    def tokens(self) -> list[int]:
        return [*self.known, *self.pending]

    def table(self, length: int) -> list[int]:
        return self.blocks[: -(-length // BLOCK_SIZE)]


class Watched:
    """`Rows` under random changes, and the lists that it should hold."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.rows = Rows(MAX_ROWS, MAX_MODEL_LEN, BLOCK_SIZE)
        self.held: dict[int, Row] = {}
        self.num_gathered = self.num_pending = self.num_full = 0

    def change(self) -> None:
        row = self.dice.randrange(MAX_ROWS)
        if row not in self.held:
            self.enter(row)
        elif self.dice.random() < 0.15:
            self.rows.remove(row)
            del self.held[row]
            assert not self.rows.has_pending_token(row)
        elif len(self.held[row].tokens) < MAX_MODEL_LEN and self.dice.random() < 0.6:
            self.sample(row)
        elif self.held[row].pending:
            self.resolve(row)

    def enter(self, row: int) -> None:
        known = [self.dice.randrange(1, 1000) for _ in range(self.dice.randint(1, 6))]
        blocks = [self.dice.randrange(90) for _ in range(-(-len(known) // BLOCK_SIZE))]
        self.rows.enter(NewRow(row, f"r{row}", tuple(known), len(known), SamplingSpec(), tuple(blocks)))
        self.held[row] = Row(known, blocks)

    def sample(self, row: int) -> None:
        """A step in flight samples a token; the block for it is taken where the last one is full."""
        held, token_id = self.held[row], self.dice.randrange(1, 1000)
        if len(held.tokens) == len(held.blocks) * BLOCK_SIZE:
            held.blocks.append(self.dice.randrange(90))
            self.rows.extend(row, held.blocks[-1:])
        self.rows.add_pending([row], OPS.array(np.array([token_id]), "int32"), OPS)
        held.pending.append(token_id)

    def resolve(self, row: int) -> None:
        held = self.held[row]
        token_id = held.pending.pop(0)
        self.rows.resolve_pending([row])
        self.rows.append([row], [token_id])
        held.known.append(token_id)
        assert self.rows.token_ids(row, 0, len(held.known)) == held.known
        assert self.rows.has_pending_token(row) == bool(held.pending)

    def span(self, row: int) -> ScheduledRow:
        """Known tokens, the pending one after them, or the last of several that are pending."""
        held = self.held[row]
        if len(held.pending) > 1:
            return ScheduledRow(row, len(held.tokens) - 1, 1, (), True)
        start = self.dice.randrange(len(held.tokens))
        return ScheduledRow(row, start, self.dice.randint(1, len(held.tokens) - start), (), True)

    def gather(self) -> None:
        chosen = self.dice.sample(sorted(self.held), self.dice.randint(1, len(self.held)))
        scheduled = [self.span(row) for row in chosen]
        num_outputs = [self.dice.randint(0, item.num_tokens) for item in scheduled]
        num_outputs[-1] = max(1, num_outputs[-1])
        batch = self.rows.gather(scheduled, num_outputs, OPS)
        spans = [range(item.start, item.start + item.num_tokens) for item in scheduled]
        texts = [self.held[row].tokens for row in chosen]
        assert batch.token_ids.tolist() == [text[at] for text, span in zip(texts, spans, strict=True) for at in span]
        assert batch.attention.positions.tolist() == [position for span in spans for position in span]
        ends = np.cumsum([len(span) for span in spans]).tolist()
        assert batch.attention.query_starts.tolist() == [0, *ends]
        assert batch.attention.starts.tolist() == [span.start for span in spans]
        for row, span, table in zip(chosen, spans, batch.attention.block_tables.tolist(), strict=True):
            needed = self.held[row].table(span.stop)
            assert table[: len(needed)] == needed
        outputs = [place for end, count in zip(ends, num_outputs, strict=True) for place in range(end - count, end)]
        assert batch.output_ends.tolist() == np.cumsum(num_outputs).tolist()
        found = batch.attention.outputs
        assert (list(range(ends[-1])) if found is None else found.tolist()) == outputs
        self.num_gathered += 1
        self.num_full += any(span.stop > MAX_MODEL_LEN // BLOCK_SIZE * BLOCK_SIZE for span in spans)

    def gather_singles(self) -> None:
        chosen = self.dice.sample(sorted(self.held), self.dice.randint(1, len(self.held)))
        lengths = [len(self.held[row].tokens) for row in chosen]
        width = -(-max(lengths) // BLOCK_SIZE)
        scheduled = [ScheduledRow(row, length - 1, 1, (), True) for row, length in zip(chosen, lengths, strict=True)]
        num_rows = self.dice.randint(len(chosen), MAX_ROWS + 1)
        values = self.rows.gather_singles(scheduled, num_rows, width, NULL_BLOCK)
        columns, tables = values[: 4 * num_rows].reshape(4, num_rows), values[4 * num_rows :].reshape(num_rows, width)
        for place, row in enumerate(chosen):
            held = self.held[row]
            token_id = 0 if held.pending else held.known[-1]
            assert columns[:, place].tolist() == [lengths[place] - 1, token_id, bool(held.pending), row]
            if held.pending:
                assert int(self.rows.last_sampled(OPS)[row]) == held.pending[-1]
            needed = held.table(lengths[place])
            assert tables[place, : len(needed)].tolist() == needed
            self.num_pending += bool(held.pending)
        assert not columns[:, len(chosen) :].any() and (tables[len(chosen) :] == NULL_BLOCK).all()


@pytest.mark.parametrize("seed", range(4))
def test_what_is_gathered_is_what_the_rows_hold(seed: int) -> None:
    watched = Watched(seed)
    for _ in range(1500):
        watched.change()
        if watched.held and watched.dice.random() < 0.5:
            watched.gather()
            watched.gather_singles()
    assert min(watched.num_gathered, watched.num_pending, watched.num_full) > 50


def test_a_plan_past_the_known_tokens_is_refused() -> None:
    watched = Watched(0)
    watched.enter(0)
    watched.sample(0)
    past = ScheduledRow(0, len(watched.held[0].tokens), 1, (), True)
    with pytest.raises(AssertionError, match="past known tokens"):
        watched.rows.gather([past], [1], OPS)
    with pytest.raises(AssertionError, match="past known tokens"):
        watched.rows.gather_singles([past], 1, 3, NULL_BLOCK)


def test_a_row_is_taken_once() -> None:
    watched = Watched(0)
    watched.enter(0)
    with pytest.raises(AssertionError, match="row 0 is taken"):
        watched.enter(0)
