"""Masks and biases: which tokens may come next at all.

Each row's rules become entries `(row, token, value)`: what is added to a logit, -inf for what must not come. Entries of
all rows are put together on the host and applied in a few operations. Which hold depends on the position of the token
to draw, so that nobody waits for the tokens before it; bad words of several tokens alone must see those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow
from quire.ops.types import Array, Ops


@dataclass(frozen=True, slots=True)
class _Added:
    """Values to add to the logits of distinct tokens."""

    token_ids: NDArray[np.int64]
    values: NDArray[np.float32]


def _added(values: dict[int, float]) -> _Added:
    return _Added(np.array(list(values), np.int64), np.array(list(values.values()), np.float32))


@dataclass(slots=True)
class _Rules:
    allowed: NDArray[np.int64]
    always: _Added
    """Biases, and bad words of one token."""
    early: _Added
    """The same, and tokens that stop."""
    first_late: int
    """Position from which `always` holds in place of `early`."""
    words: tuple[tuple[int, ...], ...]
    """Bad words of several tokens."""
    tail: list[int] = field(default_factory=list)
    """The last generated tokens, as many as the longest word needs."""


class TokenRules:
    """`allowed_token_ids` alone keep their logits; `logit_bias` is added; stop tokens are masked until `min_tokens` are
    generated; the last token of each of `bad_words` is masked where the tokens before it are the rest of it."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._rows: dict[int, _Rules] = {}

    def add(self, new: NewRow) -> None:
        """Keep the rules, if the request has any."""
        spec = new.sampling
        stops = spec.stop_token_ids if spec.min_tokens else ()
        if not (spec.allowed_token_ids or spec.logit_bias or stops or spec.bad_words):
            return
        always = dict(spec.logit_bias) | {word[0]: -math.inf for word in spec.bad_words if len(word) == 1}
        rules = _Rules(
            np.array(spec.allowed_token_ids, np.int64),
            _added(always),
            _added(always | dict.fromkeys(stops, -math.inf)),
            new.num_prompt_tokens + spec.min_tokens,
            tuple(word for word in spec.bad_words if len(word) > 1),
        )
        self._rows[new.row] = rules
        for token_id in new.token_ids[new.num_prompt_tokens :]:
            self.observe(new.row, token_id)

    def remove(self, row: int) -> None:
        """Forget the row."""
        self._rows.pop(row, None)

    def follows(self, row: int) -> bool:
        """Whether it has bad words of several tokens."""
        return row in self._rows and bool(self._rows[row].words)

    def observe(self, row: int, token_id: int) -> None:
        """Move the tail on."""
        if self.follows(row):
            rules = self._rows[row]
            rules.tail.append(token_id)
            del rules.tail[: 1 - max(len(word) for word in rules.words)]

    def apply(self, logits: Array, rows: Sequence[int], positions: Sequence[int]) -> None:
        """All rows at once; nobody waits for the device."""
        held = [(index, self._rows[row], position) for index, (row, position) in
                enumerate(zip(rows, positions, strict=True)) if row in self._rows]  # fmt: skip
        if not held:
            return
        allowed = [(index, rules.allowed) for index, rules, _ in held if len(rules.allowed)]
        if allowed:
            at = self._pairs(allowed)
            kept = logits[at]
            logits[self._ops.array([index for index, _ in allowed], "int64")] = -math.inf
            logits[at] = kept
        added = [
            (index, rules.early if position < rules.first_late else rules.always) for index, rules, position in held
        ]
        if any(len(one.token_ids) for _, one in added):
            values = self._ops.array(np.concatenate([one.values for _, one in added]), "float32")
            logits[self._pairs([(index, one.token_ids) for index, one in added])] += values
        ended = [(index, np.array(_ends(rules), np.int64)) for index, rules, _ in held if rules.words]
        if any(len(token_ids) for _, token_ids in ended):
            logits[self._pairs(ended)] = -math.inf

    def _pairs(self, entries: Sequence[tuple[int, NDArray[np.int64]]]) -> tuple[Array, Array]:
        """Places in the logits, rows before tokens, by one copy."""
        indices = np.repeat([index for index, _ in entries], [len(token_ids) for _, token_ids in entries])
        pairs = self._ops.array(np.stack([indices, np.concatenate([token_ids for _, token_ids in entries])]), "int64")
        return pairs[0], pairs[1]


def _ends(rules: _Rules) -> list[int]:
    """Last tokens of the words that would be complete with them."""
    return [word[-1] for word in rules.words if tuple(rules.tail[1 - len(word) :]) == word[:-1]]
