"""What a sampling feature is: an injected part of the sampler that edits the logits of the rows that use it.

`quire.compose` makes the list of features and hands it to the sampler, which names none of them. A feature keeps its
own state by row and never adds an attribute to a request. Rows come and go by `add` and `remove`; a preempted request
leaves and comes back with everything that it had generated.

A feature is called only for rows that use it: where no row does, it costs one branch a step.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from quire.core.plan import NewRow
from quire.core.request import SamplingSpec
from quire.ops.types import Array


class SamplingFeature(Protocol):
    """Edits logits. The sampler calls its features in the order in which they were handed to it."""

    def uses(self, spec: SamplingSpec) -> bool:
        """Whether a request with this `spec` uses the feature: the other methods are called for its rows alone."""

    def add(self, new: NewRow) -> None:
        """A request takes `new.row`. What raises here fails that request alone."""

    def remove(self, row: int) -> None:
        """Forget all of `row`. A row that was never added is fine; after a fault the call is repeated."""

    def on_token(self, row: int, token_id: int) -> None:
        """`token_id` was appended to the sequence of `row`. With overlap this comes after the next step of the row was
        launched, unless the request has `needs_output_tokens`: then before."""

    def apply(self, logits: Array, rows: Sequence[int], places: Sequence[int], positions: Sequence[int]) -> None:
        """Edit the logits of some rows in place, without changing any state.

        Args:
            logits: float32 `[sampled rows, vocabulary]`, of all rows of the step.
            rows: the permanent rows that use this feature.
            places: the index of each of them in `logits`.
            positions: the index in its sequence of the token to sample, of each of them.
        """


@runtime_checkable
class HoldingFeature(SamplingFeature, Protocol):
    """A feature that may decide a token: what comes after a place where there is no choice, and what must come instead
    of a token from which there is no way to an end."""

    def decide(self, row: int, token_id: int) -> int:
        """The token to take where `token_id` was sampled. No state changes: `on_token` follows."""

    def forced(self, row: int) -> Sequence[int]:
        """Tokens that must come next, whatever the model says."""
