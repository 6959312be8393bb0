"""Grammars: only tokens with which the answer can still become one of its grammar's keep their logits.

A grammar often leaves no choice, as in the keys of an object. Such text is *forced*: as soon as it is known, all its
tokens follow, cut as the tokenizer cuts that text, whether they are sampled one by one or appended at once (`forced`).
Hence the tokens of an answer do not depend on which of the two is done. Near the end of what the answer may have, a
token that leaves no way to an end is replaced (`decide`).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quire.core.plan import NewRow
from quire.core.request import GrammarSpec, SamplingSpec
from quire.ops.types import Array, Device


class Matcher(Protocol):
    """Follows one answer; see `quire.structured.matcher`."""

    @property
    def forced(self) -> Sequence[int]:
        """Tokens of which there is no choice."""

    def check(self) -> None:
        """Raises where its mask could not be computed."""

    def decide(self, token_id: int) -> int:
        """What to take where this was sampled."""

    def consume(self, token_id: int) -> None:
        """The answer goes on with this token."""


class Grammars(Protocol):
    """Compiled grammars; see `quire.structured.compiler.GrammarCompiler`."""

    def matcher(self, request_id: str, grammar: GrammarSpec) -> Any:
        """A `Matcher` at the beginning of the answer of a request."""

    def fill_masks(self, matchers: Sequence[Any], masks: NDArray[np.uint32]) -> None:
        """Which tokens may come next, by row of `masks`, a bit a token."""


class GrammarMasks:
    """Holds answers to `structured_outputs`."""

    def __init__(self, ops: Device, grammars: Grammars) -> None:
        self._ops = ops
        self._grammars = grammars
        self._rows: dict[int, Matcher] = {}
        self._masks: NDArray[np.uint32] = np.zeros((0, 0), np.uint32)
        self._added: Array | None = None

    def uses(self, spec: SamplingSpec) -> bool:
        """Whether the answer is held to a grammar."""
        return spec.grammar is not None

    def add(self, new: NewRow) -> None:
        """Follow the answer as far as it is there."""
        assert new.sampling.grammar is not None
        matcher = self._rows[new.row] = self._grammars.matcher(new.request_id, new.sampling.grammar)
        for token_id in new.token_ids[new.num_prompt_tokens :]:
            matcher.consume(token_id)

    def remove(self, row: int) -> None:
        """Forget the answer of the row."""
        self._rows.pop(row, None)

    def on_token(self, row: int, token_id: int) -> None:
        """Follow the token."""
        self._rows[row].consume(token_id)

    def decide(self, row: int, token_id: int) -> int:
        """The token, or the way to an end where it leaves none."""
        return self._rows[row].decide(token_id)

    def forced(self, row: int) -> Sequence[int]:
        """Tokens that must come next, whatever the model says."""
        return tuple(self._rows[row].forced)

    def apply(self, logits: Array, rows: Sequence[int], places: Sequence[int], positions: Sequence[int]) -> None:
        """All rows at once; logits are `[sampled rows, vocabulary]`, as for every `SamplingFeature`."""
        found = [(place, self._rows[row]) for place, row in zip(places, rows, strict=True)]
        free = [(place, matcher) for place, matcher in found if not matcher.forced]
        if free:
            self._mask(logits, [place for place, _ in free], [matcher for _, matcher in free])
        held = [(place, matcher.forced[0]) for place, matcher in found if matcher.forced]
        if held:
            index, tokens = (self._ops.array(column, "int64") for column in zip(*held, strict=True))
            kept = logits[index, tokens]
            logits[index] = -np.inf
            logits[index, tokens] = kept

    def _mask(self, logits: Array, places: Sequence[int], matchers: Sequence[Matcher]) -> None:
        """A byte of a mask becomes eight numbers by a table, and these are added. A bool for each token would cost a
        branch each: ten times as much where masks have no order."""
        num_tokens = logits.shape[1]
        width = -(-num_tokens // 32)
        if len(self._masks) < len(matchers) or self._masks.shape[1] != width:
            self._masks = np.zeros((len(matchers), width), np.uint32)
        self._grammars.fill_masks(matchers, self._masks)
        for matcher in matchers:
            matcher.check()
        bits = self._masks[: len(matchers)].view(np.uint8)
        on_host = type(logits) is np.ndarray  # else a device's own kind
        buffer: NDArray[np.float32] | None = np.empty((bits.shape[1], 8), np.float32) if on_host else None
        for place, mask in zip(places, bits if buffer is not None else self._ops.array(bits, "int64"), strict=True):
            if buffer is None:
                added = self._table()[mask]
            else:  # the same, five times as fast
                added = np.take(self._table(), mask, axis=0, out=buffer, mode="clip")
            row = logits[place]  # a view: a row is edited where it is, one after the other, in a processor's cache
            row += added.reshape(-1)[:num_tokens]

    def _table(self) -> Array:
        """`[256, 8]`: by eight bits of a mask, what is added to their logits: 0, or -inf."""
        if self._added is None:
            bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            self._added = self._ops.array(np.where(bits, 0.0, -np.inf), "float32")
        return self._added
