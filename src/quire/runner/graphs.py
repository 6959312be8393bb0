"""Decode steps as CUDA graphs: the launches of a whole forward pass, and of sampling, replayed in one call.

A graph is of fixed arrays and sizes. So a step in which every row has one token is written into arrays that stay,
padded to one of a few sizes: rows, and blocks of the widest table. Padded rows compute token 0 at position 0 and write
its keys and values into the *null block*, which no row holds. Rows that need only tokens have them sampled in the
graph; for others it ends with the hidden states.

::

    one array, one copy a step:   positions | token ids | pending? | rows      | tables
                                  [rows]      [rows]      [rows]     [rows]      [rows, width]

At a start the largest size alone is captured, whose memory the others share. After the first answers, each moment
without work is used to capture one more (`run_idle_work`), those that have come most often first. A size that comes
again and again before that is captured in its step, after it has been computed, but never in several steps close
together: that step takes as long again on the host. No other thread captures: it would share Python's lock and the
allocator with the steps that people wait for, so that it delayed them all, and not one.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quire.core.plan import ScheduledRow
from quire.models.model import Model
from quire.ops.types import Array, AttentionBatch, Device, Opaque
from quire.runner.rows import Rows
from quire.sampling.sampler import Sampler

logger = logging.getLogger("quire.runner")
Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""See `Device.capture`."""

CAPTURE_AT = 3
"""The use of a size at which it is captured in its step."""
STEPS_APART = 16
"""The fewest steps from one such capture to the next."""
FIRST_WIDTH_TOKENS = 2048
"""Context of the narrowest tables; each next width has four times as much."""
BYTES_PER_GRAPH = 2**20
"""Of the device's own bookkeeping, for each graph: a guess, held against the device by `scripts/gpu_check`."""


class GraphSize(NamedTuple):
    """What a graph is captured for."""

    num_rows: int
    width: int
    """Blocks of a row's table."""
    samples: bool
    """Whether tokens are sampled in it."""


@dataclass(frozen=True, slots=True)
class GraphBuckets:
    """The largest decode step."""

    max_rows: int
    max_blocks: int
    """Of one row."""
    block_size: int

    def size_for(self, num_rows: int, width: int, samples: bool) -> GraphSize:
        """The smallest size that holds `num_rows` rows with tables of `width` blocks. Two sizes of rows to a doubling,
        1 2 3 4 6 8 12 16 24 ...: tiles of the kernels are no finer."""
        step = max(1, 2 ** (num_rows.bit_length() - 2))
        wide = max(1, FIRST_WIDTH_TOKENS // self.block_size)
        while wide < width:
            wide *= 4
        return GraphSize(min(self.max_rows, -(-num_rows // step) * step), min(self.max_blocks, wide), samples)

    def sizes(self) -> set[GraphSize]:
        """All that may be captured."""
        rows = {self.size_for(count, 1, True).num_rows for count in range(1, self.max_rows + 1)}
        widths = {self.size_for(1, count, True).width for count in range(1, self.max_blocks + 1)}
        return {GraphSize(count, width, samples) for count in rows for width in widths for samples in (False, True)}


class CapturedGraph:
    """One size: `replay` computes `results` from the arrays that stay."""

    def __init__(self, compute: Callable[[], tuple[Array, ...]], capture: Capture) -> None:
        self._compute = compute
        self.results: tuple[Array, ...] = ()
        self.replay = capture(self._work)

    def _work(self) -> None:
        self.results = self._compute()


class DecodeGraphs:
    """The CUDA graphs of one model, its cache and its rows.

    Args:
        null_block: a block of the cache that no row holds.
    """

    def __init__(
        self,
        model: Model,
        ops: Device,
        cache: Opaque,
        rows: Rows,
        sampler: Sampler,
        buckets: GraphBuckets,
        null_block: int,
        capture: Capture,
    ) -> None:
        self._model = model
        self._ops = ops
        self._cache = cache
        self._rows = rows
        self._sampler = sampler
        self._buckets = buckets
        self._null_block = null_block
        self._capture = capture
        self._graphs: dict[GraphSize, CapturedGraph | None] = {}
        """None: the device could not."""
        self._num_uses: Counter[GraphSize] = Counter()
        self._num_steps_since = STEPS_APART
        """Steps since one was captured in its step."""
        self._input = ops.array(np.zeros(buckets.max_rows * (4 + buckets.max_blocks)), "int32")
        self._query_starts = ops.array(np.arange(buckets.max_rows + 1), "int32")
        self._ones = ops.array(np.ones(buckets.max_rows), "int64")
        self._last_sampled = rows.last_sampled(ops)

    def forward(self, scheduled: Sequence[ScheduledRow]) -> Array:
        """Hidden states `[rows, hidden]` of rows with one token each, good until the next call."""
        return self._run(scheduled, False)[0]

    def sample(self, scheduled: Sequence[ScheduledRow]) -> tuple[Array, Array]:
        """The same, and on to `Sampler.sample_tokens`: tokens and whether logits were finite, `[rows]`."""
        tokens, finite = self._run(scheduled, True)
        return tokens, finite

    def run_idle_work(self) -> bool:
        """Capture one size, if there is one left and a request was answered; False if not. Steps may be in flight."""
        left = self._buckets.sizes() - self._graphs.keys()
        if not left or not self._num_uses:
            return False
        uses = self._num_uses
        self._capture_at_rest(min(left, key=lambda one: (-uses[one], not one.samples, one.width, -one.num_rows)))
        return True

    def capture_largest(self) -> None:
        """Capture the largest size, at a start."""
        self._capture_at_rest(max(self._buckets.sizes()))

    def _capture_at_rest(self, size: GraphSize) -> None:
        values = np.zeros(size.num_rows * (4 + size.width), np.int32)
        values[4 * size.num_rows :] = self._null_block
        self._sampler.refresh()
        self._input[: len(values)] = self._ops.array(values, "int32")
        self._try_to_capture(size)

    def _run(self, scheduled: Sequence[ScheduledRow], samples: bool) -> list[Array]:
        width = -(-max(item.start + 1 for item in scheduled) // self._buckets.block_size)
        size = self._buckets.size_for(len(scheduled), width, samples)
        values = self._rows.gather_singles(scheduled, size.num_rows, size.width, self._null_block)
        self._sampler.refresh()
        self._input[: len(values)] = self._ops.array(values, "int32")
        graph = self._graphs.get(size)
        self._num_steps_since += 1
        if graph is not None:
            graph.replay()
            results = graph.results
        else:
            results = self._compute(size)
            self._num_uses[size] += 1
            is_time = self._num_steps_since >= STEPS_APART and self._num_uses[size] >= CAPTURE_AT
            if is_time and size not in self._graphs:
                self._num_steps_since = 0
                self._try_to_capture(size)
        return [result[: len(scheduled)] for result in results]

    def _try_to_capture(self, size: GraphSize) -> None:
        self._graphs[size] = None
        try:
            if not self._num_uses[size]:
                self._compute(size)  # its kernels are compiled and loaded, which a capture must not do
            self._graphs[size] = CapturedGraph(lambda: self._compute(size), self._capture)
        except Exception:
            logger.exception("a decode step of %d rows cannot be captured: it is launched each time", size.num_rows)

    def _compute(self, size: GraphSize) -> tuple[Array, ...]:
        count, width, samples = size
        positions, token_ids, pending, rows = self._input[: 4 * count].reshape((4, count))
        tables = self._input[4 * count : (4 + width) * count].reshape((count, width))
        batch = AttentionBatch(positions, self._query_starts[: count + 1], positions, tables)
        hidden = self._model.forward(token_ids + pending * self._last_sampled[rows], batch, self._cache)
        if not samples:
            return (hidden,)
        return self._sampler.sample_tokens(self._model.logits(hidden), rows, positions + self._ones[:count])
