"""Masks and biases: which tokens may come next at all.

The masks of each row become entries `(row, token, value)`: what is added to a logit, -inf for what must not come.
Entries of all rows are put together on the host and applied in a few operations. Which of them hold depends on the
position of the token to sample, so that no row waits for the tokens before it; bad words of several tokens alone must
see those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow
from quire.core.request import SamplingSpec
from quire.ops.types import Array, Device


@dataclass(frozen=True, slots=True)
class _Bias:
    """Values to add to the logits of distinct tokens."""

    token_ids: NDArray[np.int64]
    values: NDArray[np.float32]


def _bias(values: dict[int, float]) -> _Bias:
    return _Bias(np.array(list(values), np.int64), np.array(list(values.values()), np.float32))


@dataclass(slots=True)
class _RowMasks:
    allowed: NDArray[np.int64]
    bias: _Bias
    """Biases, and bad words of one token."""
    bias_until_min_tokens: _Bias
    """The same, and tokens that stop."""
    min_length: int
    """Position from which `bias` holds in place of `bias_until_min_tokens`."""
    words: tuple[tuple[int, ...], ...]
    """Bad words of several tokens."""
    tail: list[int] = field(default_factory=list)
    """The last generated tokens, as many as the longest word needs."""


class LogitMasks:
    """`allowed_token_ids` alone keep their logits; `logit_bias` is added; stop tokens are masked until `min_tokens` are
    generated; the last token of each of `bad_words` is masked where the tokens before it are the rest of it."""

    def __init__(self, ops: Device) -> None:
        self._ops = ops
        self._rows: dict[int, _RowMasks] = {}

    def uses(self, spec: SamplingSpec) -> bool:
        """Whether any token is masked or biased."""
        stops = spec.min_tokens and spec.stop_token_ids
        return bool(spec.allowed_token_ids or spec.logit_bias or stops or spec.bad_words)

    def add(self, new: NewRow) -> None:
        """Keep the masks of the request."""
        spec = new.sampling
        stops = spec.stop_token_ids if spec.min_tokens else ()
        bias = dict(spec.logit_bias) | {word[0]: -math.inf for word in spec.bad_words if len(word) == 1}
        self._rows[new.row] = _RowMasks(
            np.array(spec.allowed_token_ids, np.int64),
            _bias(bias),
            _bias(bias | dict.fromkeys(stops, -math.inf)),
            new.num_prompt_tokens + spec.min_tokens,
            tuple(word for word in spec.bad_words if len(word) > 1),
        )
        for token_id in new.token_ids[new.num_prompt_tokens :]:
            self.on_token(new.row, token_id)

    def remove(self, row: int) -> None:
        """Forget the masks of the row."""
        self._rows.pop(row, None)

    def on_token(self, row: int, token_id: int) -> None:
        """Move the tail on, where the row has bad words of several tokens."""
        masks = self._rows[row]
        if masks.words:
            masks.tail.append(token_id)
            del masks.tail[: 1 - max(len(word) for word in masks.words)]

    def apply(self, logits: Array, rows: Sequence[int], places: Sequence[int], positions: Sequence[int]) -> None:
        """All rows at once, without waiting for the device; logits are `[sampled rows, vocabulary]`, as for every
        `SamplingFeature`."""
        held = [(place, self._rows[row], at) for row, place, at in zip(rows, places, positions, strict=True)]
        allowed = [(place, masks.allowed) for place, masks, _ in held if len(masks.allowed)]
        if allowed:
            entries = self._entries(allowed)
            kept = logits[entries]
            logits[self._ops.array([place for place, _ in allowed], "int64")] = -math.inf
            logits[entries] = kept
        added = [
            (place, masks.bias_until_min_tokens if position < masks.min_length else masks.bias)
            for place, masks, position in held
        ]
        if any(len(bias.token_ids) for _, bias in added):
            values = self._ops.array(np.concatenate([bias.values for _, bias in added]), "float32")
            logits[self._entries([(place, bias.token_ids) for place, bias in added])] += values
        ended = [(place, np.array(_ends(masks), np.int64)) for place, masks, _ in held if masks.words]
        if any(len(token_ids) for _, token_ids in ended):
            logits[self._entries(ended)] = -math.inf

    def _entries(self, tokens: Sequence[tuple[int, NDArray[np.int64]]]) -> tuple[Array, Array]:
        """Indices of logits, places before tokens, by one copy."""
        places = np.repeat([place for place, _ in tokens], [len(token_ids) for _, token_ids in tokens])
        pairs = self._ops.array(np.stack([places, np.concatenate([token_ids for _, token_ids in tokens])]), "int64")
        return pairs[0], pairs[1]


def _ends(masks: _RowMasks) -> list[int]:
    """Last tokens of the words that would be complete with them."""
    return [word[-1] for word in masks.words if tuple(masks.tail[1 - len(word) :]) == word[:-1]]
