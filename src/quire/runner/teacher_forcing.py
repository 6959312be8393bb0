"""What a model says after each token of a text that it reads: computed as a prompt is, a chunk a step."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.models.model import Model
from quire.ops.types import AttentionBatch, Provider
from quire.runner.memory import PROMPT_LOGPROB_ROWS

STEP_TOKENS = 256


class TeacherForcing:
    """Reads texts beside an engine, with a paged cache of its own that is like the runner's.

    Args:
        block_size: of that cache.
    """

    def __init__(self, model: Model, ops: Provider, block_size: int) -> None:
        self.model = model
        self._ops = ops
        self._block_size = block_size

    def logits(self, token_ids: Sequence[int], first: int = 0) -> Iterator[NDArray[np.float32]]:
        """The logits after each token of a text from index `first` on, but after its last, `[up to 64, vocabulary]` at
        a time. Only the numbers of one step, and the cache of this text, exist at a time."""
        ops, last, num_blocks = self._ops, len(token_ids) - 1, -(-len(token_ids) // self._block_size)
        cache = ops.make_cache(self.model.cache_shape(num_blocks, self._block_size))
        tables = ops.array(np.arange(num_blocks)[None], "int32")
        for start in range(0, last, STEP_TOKENS):
            end = min(start + STEP_TOKENS, last)
            batch = AttentionBatch(
                positions=ops.array(np.arange(start, end), "int32"),
                query_starts=ops.array(np.array([0, end - start]), "int32"),
                starts=ops.array(np.array([start]), "int32"),
                block_tables=tables,
                outputs=np.arange(max(first, start) - start, end - start, dtype=np.int32),
            )
            hidden = self.model.forward(ops.array(np.array(token_ids[start:end]), "int32"), batch, cache)
            for row in range(0, len(hidden), PROMPT_LOGPROB_ROWS):
                yield ops.to_numpy(self.model.logits(hidden[row : row + PROMPT_LOGPROB_ROWS]))
