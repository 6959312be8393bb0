"""Operations written over other operations: right on every provider, fast where the parts are."""

from collections.abc import Callable, Sequence
from typing import Any, cast

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
    WeightDtype,
)
from quire.outputs import Decision


class ComposedOps:
    """A base for providers, which supply `xp`, `array`, `to_numpy`, `pack_linear`, `linear`, `activation_multiply`,
    `logits` and `rows_finite`."""

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

    def array(self, values: Any, dtype: str) -> Array:
        raise NotImplementedError

    def to_numpy(self, x: Array) -> Any:
        raise NotImplementedError

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Itself."""
        return work

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Any]]:
        """At once."""
        found = [self.to_numpy(x) for x in arrays]
        return lambda: found

    def pack_linear(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> Opaque:
        raise NotImplementedError

    def linear(self, x: Array, packed: Opaque) -> Array:
        raise NotImplementedError

    def activation_multiply(self, gate_up: Array, kind: Activation) -> Array:
        """`kind(gate_up[:, :n]) * gate_up[:, n:] -> [tokens, n]`: what `gated_linear` ends with."""
        raise NotImplementedError

    def logits(self, x: Array, packed: Opaque, scale: float = 1.0, softcap: float | None = None) -> Array:
        raise NotImplementedError

    def rows_finite(self, logits: Array) -> Array:
        raise NotImplementedError

    def pack_gated(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> Opaque:
        """As `pack_linear`, here; a provider whose `gated_linear` is one pass puts gate beside up."""
        return self.pack_linear(weight, bias, dtype)

    def gated_linear(self, x: Array, packed: Opaque, kind: Activation) -> Array:
        """`activation_multiply(linear(x), kind)` (arXiv 2002.05202). Tolerance: as `linear`, for each factor; exactly
        those two operations of the same provider."""
        return self.activation_multiply(self.linear(x, packed), kind)

    def compile(self, forward: Forward) -> Step:
        """Operation by operation."""

        def step(token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Array:
            hidden = forward(cast(Ops, self), token_ids, batch, cache)
            return hidden if batch.outputs is None else hidden[self.array(batch.outputs, "int64")]

        return step

    def zero_nonfinite_rows(self, logits: Array) -> Array:
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

    def penalize(self, logits: Array, batch: PenaltyBatch) -> None:
        """`l = l / repetition if l > 0 else l * repetition`, then `l - frequency c - presence (c > 0)`, in place, for
        each entry of `batch` and its count c. Exact."""
        at, counts = (batch.rows, batch.token_ids), batch.counts
        values = logits[at]
        values = self.xp.where(values > 0, values / batch.repetition, values * batch.repetition)
        logits[at] = values - batch.frequency * counts - batch.presence * (counts > 0)
