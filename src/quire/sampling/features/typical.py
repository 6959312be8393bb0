"""Locally typical sampling: tokens whose surprise is near what is expected (Meister et al., arXiv 2202.00666).

With p the probabilities at the request's temperature and H their entropy, tokens are taken by |-log p - H|, the
smallest first, until their mass reaches `typical_p`; the others are masked. Tokens as near as the last one stay too, as
in transformers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow
from quire.core.request import SamplingSpec
from quire.ops.types import Array, Device


class Typical:
    """`typical_p`. It comes last of the features, on the host: before `min_p`, `top_k` and `top_p`."""

    def __init__(self, ops: Device) -> None:
        self._ops = ops
        self._rows: dict[int, tuple[float, float]] = {}
        """Temperature and mass."""

    def uses(self, spec: SamplingSpec) -> bool:
        """Whether the request asks for it; where the best token is taken there is nothing to choose from."""
        return spec.typical_p < 1.0 and spec.temperature > 0.0

    def add(self, new: NewRow) -> None:
        """Note the numbers of the request."""
        self._rows[new.row] = (new.sampling.temperature, new.sampling.typical_p)

    def remove(self, row: int) -> None:
        """Forget them."""
        self._rows.pop(row, None)

    def on_token(self, row: int, token_id: int) -> None:
        """What was sampled changes nothing here."""

    def apply(self, logits: Array, rows: Sequence[int], places: Sequence[int], positions: Sequence[int]) -> None:
        """Mask each row by itself; logits are `[sampled rows, vocabulary]`, as for every `SamplingFeature`."""
        index = self._ops.array(places, "int64")
        found = self._ops.to_numpy(logits[index])
        masks = np.stack([_mask(values, *self._rows[row]) for values, row in zip(found, rows, strict=True)])
        logits[index] += self._ops.array(masks, "float32")


def _mask(logits: NDArray[np.float32], temperature: float, mass: float) -> NDArray[np.float32]:
    """What is added to the logits of one row, `[vocabulary]`: 0, or -inf."""
    largest = logits.max()
    if not np.isfinite(largest):  # no token is left, which the sampler says
        return np.zeros_like(logits)
    scaled = (logits.astype(np.float64) - largest) / temperature
    log_p = scaled - np.log(np.exp(scaled).sum())
    p = np.exp(log_p)
    entropy = -np.sum(p * np.where(p > 0, log_p, 0.0))
    distance = np.abs(-log_p - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(p[order]) < mass).sum()), len(order) - 1)
    return np.where(distance <= distance[order[last]], 0.0, -np.inf).astype(np.float32)
