"""One walk of the decoder over whole contexts, in which weights are names: a function says what each is when the walk
meets it. So one layer's weights are in memory at a time, and the decoder is the one that serves.

The walk is the decoder's own `forward` with `WalkOps` for operations; a cache of one layer is all that it needs,
since each context is computed in one step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.models.decoder import Decoder
from quire.ops.composed import ComposedOps
from quire.ops.types import (
    Activation,
    Array,
    AttentionBatch,
    AttentionSpec,
    Forward,
    Opaque,
    Provider,
    RopeTables,
    Step,
)
from quire.weights.load import WeightPlan

BLOCK_SIZE = 16
LINEAR = ("linear", "gated_linear")
"""Kinds of parameters that are names in a walk."""
Meet = Callable[[str, Array], Array]
"""`meet(name, x [tokens, in])`: what the linear layer `name` makes of its inputs."""
GatedMeet = Callable[[str, Array, Activation], Array]


class WalkOps(ComposedOps):
    """A provider's operations, where a linear layer's packed weight is its name."""

    def __init__(self, provider: Provider, meet: Meet, gated: GatedMeet) -> None:
        self._provider, self._meet, self._gated = provider, meet, gated
        self.name = f"walk over {provider.name}"
        self.formats = provider.formats
        self.embed = provider.embed
        self.rms_norm, self.add_rms_norm, self.layer_norm = (
            provider.rms_norm,
            provider.add_rms_norm,
            provider.layer_norm,
        )
        self.activation = provider.activation

    def compile(self, forward: Forward) -> Step:
        """Operation by operation."""

        def step(token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
            # `WalkOps` has the operations of a forward pass, and none of sampling.
            return forward(self, token_ids, batch, cache)  # type: ignore[arg-type]

        return step

    def array(self, values: Any, dtype: str) -> Array:
        return self._provider.array(values, dtype)

    def to_numpy(self, x: Array) -> Any:
        return self._provider.to_numpy(x)

    def linear(self, x: Array, packed: Opaque) -> Array:
        return self._meet(packed, x)

    def gated_linear(self, x: Array, packed: Opaque, kind: Activation) -> Array:
        return self._gated(packed, x, kind)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Opaque,
        layer: int,
        batch: AttentionBatch,
        spec: AttentionSpec,
        rope: RopeTables | None = None,
    ) -> Array:
        """In the cache's one layer, whichever it is of the model."""
        return self._provider.attention(q, k, v, cache, 0, batch, spec, rope)


def walk(plan: WeightPlan, weights: dict[str, Any], ops: WalkOps, contexts: Sequence[Sequence[int]]) -> NDArray[Any]:
    """Hidden states after the last norm, `[tokens, hidden]`.

    Args:
        weights: packed by the provider, or names, as `WalkOps` takes them.
    """
    lengths = [len(context) for context in contexts]
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    first = np.cumsum([0, *counts])
    tables = np.zeros((len(lengths), max(counts)), np.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = np.arange(first[row], first[row] + count)
    batch = AttentionBatch(
        positions=ops.array(np.concatenate([np.arange(length) for length in lengths]), "int32"),
        query_starts=ops.array(np.cumsum([0, *lengths]), "int32"),
        starts=ops.array(np.zeros(len(lengths)), "int32"),
        block_tables=ops.array(tables, "int32"),
    )
    # Names stand for weights, and `ops` has what a forward pass asks for.
    decoder = Decoder(plan.spec, weights, ops, plan.packer.dtype, max(lengths), 0)  # type: ignore[arg-type]
    shape = replace(decoder.cache_shape(int(first[-1]), BLOCK_SIZE), num_layers=1, dtype="float32")
    cache = ops._provider.make_cache(shape)
    hidden: NDArray[Any] = ops.to_numpy(decoder.forward(ops.array(np.concatenate(contexts), "int32"), batch, cache))
    return hidden
