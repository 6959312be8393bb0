"""What the runner needs of a model, whatever its family."""

from typing import Protocol

from quire.models.spec import DecoderSpec
from quire.ops.types import Array, AttentionBatch, CacheShape, Opaque, WeightDtype


class Model(Protocol):
    """A model with its weights. It keeps no state between calls: what it remembers is in the cache."""

    @property
    def spec(self) -> DecoderSpec:
        """The architecture, as data."""

    @property
    def max_model_len(self) -> int:
        """Positions that this instance can compute: all positions are below it."""

    @property
    def dtype(self) -> WeightDtype:
        """Of weights that are not quantised."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as stored."""

    def cache_shape(self, num_blocks: int, block_size: int) -> CacheShape:
        """The key-value cache that `forward` fills: `num_blocks` blocks of `block_size` tokens."""

    def forward(self, token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
        """`token_ids [tokens]` int32 -> hidden states after the last norm `[outputs, hidden]`. Fills the cache."""

    def greedy(self, hidden: Array) -> tuple[Array, Array]:
        """`Ops.greedy` of `hidden [rows, hidden]`: the token with the largest logit, int32 `[rows]`, and whether the
        logits are finite, bool `[rows]`."""

    def logits(self, hidden: Array) -> Array:
        """`hidden [rows, hidden]` -> float32 `[rows, vocab_size]`."""
