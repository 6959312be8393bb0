"""Operations written over other operations: right on every provider, fast where the parts are."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from quire.ops.types import (
    Activation,
    Array,
    AttentionBatch,
    DeviceMemory,
    Forward,
    Opaque,
    Ops,
    PenaltyBatch,
    Step,
    StorageType,
)
from quire.outputs import Decision


class ComposedOps:
    """A base for providers, which supply `xp`, `pack_linear`, `linear`, `activation_multiply`, `logits` and
    `rows_finite`."""

    xp: Any

    def memory(self) -> DeviceMemory | None:
        """The host's memory, unless a provider says otherwise."""
        return None

    def decisions(self) -> list[Decision]:
        """None."""
        return []

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Not known of the host's."""
        work()
        return 0

    def to_numpy(self, x: Array) -> Any:
        raise NotImplementedError

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Itself."""
        return work

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Any]]:
        """At once."""
        found = [self.to_numpy(x) for x in arrays]
        return lambda: found

    def pack_linear(self, weight: Any, bias: Any | None, storage: StorageType) -> Opaque:
        raise NotImplementedError

    def linear(self, x: Array, packed: Opaque) -> Array:
        raise NotImplementedError

    def activation_multiply(self, gate_up: Array, kind: Activation) -> Array:
        raise NotImplementedError

    def logits(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> Array:
        raise NotImplementedError

    def rows_finite(self, logits: Array) -> Array:
        raise NotImplementedError

    def pack_gated(self, weight: Any, bias: Any | None, storage: StorageType) -> Opaque:
        """As `pack_linear`, here; a provider whose `gated_linear` is one pass puts gate beside up."""
        return self.pack_linear(weight, bias, storage)

    def gated_linear(self, x: Array, packed: Opaque, kind: Activation) -> Array:
        """`activation_multiply(linear(x), kind)` (arXiv 2002.05202). Tolerance: as `linear`, for each factor; exactly
        those two operations of the same provider."""
        return self.activation_multiply(self.linear(x, packed), kind)

    def compile(self, forward: Forward) -> Step:
        """Operation by operation."""

        def step(token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
            hidden = forward(cast(Ops, self), token_ids, batch, cache)
            return hidden if batch.outputs is None else hidden[cast(Ops, self).array(batch.outputs, "int64")]

        return step

    def clear_broken(self, logits: Array) -> Array:
        """Exact."""
        finite = self.rows_finite(logits)
        if not finite.all():
            logits[~finite] = 0.0
        return finite

    def greedy(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> tuple[Array, Array]:
        """`argmax(logits)`, the lowest id among equals. Exactly that of the same provider's logits."""
        xp = self.xp
        logits = self.logits(x, packed, scale, softcap)
        finite = self.rows_finite(logits)
        tokens = xp.astype(xp.argmax(logits, axis=-1), xp.int32)
        return tokens * xp.astype(finite, xp.int32), finite

    def moe(
        self,
        x: Array,
        router: Opaque,
        experts: Sequence[tuple[Opaque, Opaque]],
        num_active: int,
        normalize: bool,
    ) -> Array:
        """`p = softmax(linear(x, router))`; y is the sum, over the num_active largest p_e (ties: the lower
        expert), of `p_e down_e(silu(gate_e x) * up_e x)`, added in the order of expert ids; `normalize`
        divides by the sum of the chosen p. `experts` are pairs of packed `(gate_up, down)`. arXiv 2401.04088.
        Tolerance: rel 5e-5."""
        xp = self.xp
        scores = self.linear(x, router)
        weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        weights = weights / xp.sum(weights, axis=-1, keepdims=True)
        best = xp.argsort(weights, axis=-1, descending=True, stable=True)[:, :num_active]
        chosen = xp.take_along_axis(weights, best, axis=-1)
        if normalize:
            chosen = chosen / xp.sum(chosen, axis=-1, keepdims=True)
        out = xp.zeros_like(x)
        for expert, (gate_up, down) in enumerate(experts):
            share = xp.sum(xp.where(best == expert, chosen, 0.0), axis=-1)
            tokens = xp.nonzero(xp.any(best == expert, axis=-1))[0]
            if tokens.shape[0]:
                y = self.linear(self.activation_multiply(self.linear(x[tokens, ...], gate_up), "silu"), down)
                out[tokens, ...] = out[tokens, ...] + share[tokens][:, None] * y
        return out

    def lora(
        self, x: Array, y: Array, adapters: Sequence[tuple[Opaque, Opaque, float] | None], adapter_ids: Array
    ) -> None:
        """`y += scale B (A x)` in place (arXiv 2106.09685). `adapters[id]` is `(A, B, scale)` with packed
        `A [rank, in]` and `B [out, rank]`; entry 0 is None. Tolerance: rel 2e-5."""
        for adapter_id, adapter in enumerate(adapters):
            if adapter is None:
                continue
            a, b, scale = adapter
            tokens = self.xp.nonzero(adapter_ids == adapter_id)[0]
            if tokens.shape[0]:
                y[tokens, ...] = y[tokens, ...] + self.linear(self.linear(x[tokens, ...], a), b) * scale

    def penalize(self, logits: Array, batch: PenaltyBatch) -> None:
        """`l = l / repetition if l > 0 else l * repetition`, then `l - frequency c - presence (c > 0)`, in place, for
        each entry of `batch` and its count c. Exact."""
        at, counts = (batch.rows, batch.token_ids), batch.counts
        values = logits[at]
        values = self.xp.where(values > 0, values / batch.repetition, values * batch.repetition)
        logits[at] = values - batch.frequency * counts - batch.presence * (counts > 0)

    def pool(self, x: Array, query_starts: Array, kind: Literal["last", "mean", "first"]) -> Array:
        """The last, the first or the mean of each row's tokens; no row is empty. Tolerance: rel 2e-6."""
        xp = self.xp
        bounds = [int(start) for start in query_starts]
        rows = []
        for first, last in itertools.pairwise(bounds):
            if kind == "mean":
                rows.append(xp.mean(x[first:last, ...], axis=0))
            else:
                rows.append(x[last - 1 if kind == "last" else first, ...])
        return xp.stack(rows, axis=0) if rows else x[:0, ...]
