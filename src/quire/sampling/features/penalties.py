"""Penalties on tokens that have occurred.

With c the number of times a token was generated, and s whether it stands in the prompt or was generated:

    logit = logit / repetition if logit > 0 else logit * repetition      where s    (CTRL, arXiv 1909.05858)
    logit = logit - frequency * c - presence * (c > 0)                               (OpenAI's definition)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow
from quire.core.request import NO_PENALTIES, PenaltySpec, SamplingSpec
from quire.ops.types import Array, PenaltyBatch, Provider


@dataclass(slots=True)
class _Seen:
    penalties: PenaltySpec
    token_ids: NDArray[np.int64]  # [capacity], of which `size` are used
    """Distinct tokens of prompt and output, in order of appearance; `counts` belongs to them."""
    counts: NDArray[np.float32]  # [capacity]
    slots: dict[int, int]
    size: int


class Penalties:
    """`presence_penalty`, `frequency_penalty` and `repetition_penalty`; work is in proportion to the number of
    distinct tokens seen, not to the vocabulary."""

    def __init__(self, ops: Provider) -> None:
        self._ops = ops
        self._rows: dict[int, _Seen] = {}

    def uses(self, spec: SamplingSpec) -> bool:
        """Whether the request has a penalty."""
        return spec.penalties != NO_PENALTIES

    def add(self, new: NewRow) -> None:
        """Count the tokens that are there."""
        seen = _Seen(new.sampling.penalties, np.zeros(64, np.int64), np.zeros(64, np.float32), {}, 0)
        for index, token_id in enumerate(new.token_ids):
            _count(seen, token_id, 1 if index >= new.num_prompt_tokens else 0)
        self._rows[new.row] = seen

    def remove(self, row: int) -> None:
        """Forget the counts of the row."""
        self._rows.pop(row, None)

    def on_token(self, row: int, token_id: int) -> None:
        """Count the token once more."""
        _count(self._rows[row], token_id, 1)

    def apply(self, logits: Array, rows: Sequence[int], places: Sequence[int], positions: Sequence[int]) -> None:
        """Penalise all rows at once; logits are `[sampled rows, vocabulary]`, as for every `SamplingFeature`."""
        found = [self._rows[row] for row in rows]
        sizes = [seen.size for seen in found]

        def entries(values: Sequence[float]) -> Array:
            return self._ops.array(np.repeat(values, sizes), "float32")

        self._ops.penalize(
            logits,
            PenaltyBatch(
                self._ops.array(np.repeat(places, sizes), "int64"),
                self._ops.array(np.concatenate([seen.token_ids[: seen.size] for seen in found]), "int64"),
                self._ops.array(np.concatenate([seen.counts[: seen.size] for seen in found]), "float32"),
                entries([seen.penalties.repetition for seen in found]),
                entries([seen.penalties.frequency for seen in found]),
                entries([seen.penalties.presence for seen in found]),
            ),
        )


def _count(seen: _Seen, token_id: int, times: int) -> None:
    slot = seen.slots.get(token_id)
    if slot is None:
        slot = seen.size
        if slot == len(seen.token_ids):
            seen.token_ids = np.concatenate([seen.token_ids, np.zeros_like(seen.token_ids)])
            seen.counts = np.concatenate([seen.counts, np.zeros_like(seen.counts)])
        seen.slots[token_id] = slot
        seen.token_ids[slot] = token_id
        seen.size += 1
    seen.counts[slot] += times
