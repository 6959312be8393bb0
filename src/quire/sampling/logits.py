"""Masks and biases: which tokens may come next at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.plan import NewRow
from quire.ops.types import Array, Ops


class AllowedTokens:
    """Only the tokens in `allowed_token_ids` keep their logits."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._allowed: dict[int, Array] = {}

    def add(self, new: NewRow) -> None:
        """Keep the list, if the request has one."""
        if new.sampling.allowed_token_ids:
            self._allowed[new.row] = self._ops.array(new.sampling.allowed_token_ids, "int64")

    def remove(self, row: int) -> None:
        """Forget the row."""
        self._allowed.pop(row, None)

    def observe(self, row: int, token_id: int) -> None:
        """The list does not depend on the tokens."""

    def apply(self, logits: Array, rows: Sequence[int]) -> None:
        """Everything else becomes -inf."""
        if not self._allowed:
            return
        for index, row in enumerate(rows):
            allowed = self._allowed.get(row)
            if allowed is not None:
                kept = logits[index, allowed]
                logits[index] = -math.inf
                logits[index, allowed] = kept


class LogitBias:
    """`logit_bias` is added to the logits of its tokens."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._bias: dict[int, tuple[Array, Array]] = {}

    def add(self, new: NewRow) -> None:
        """Keep the biases, if the request has any."""
        if new.sampling.logit_bias:
            token_ids, values = zip(*new.sampling.logit_bias, strict=True)
            self._bias[new.row] = self._ops.array(token_ids, "int64"), self._ops.array(values, "float32")

    def remove(self, row: int) -> None:
        """Forget the row."""
        self._bias.pop(row, None)

    def observe(self, row: int, token_id: int) -> None:
        """The bias does not depend on the tokens."""

    def apply(self, logits: Array, rows: Sequence[int]) -> None:
        """Add them."""
        if not self._bias:
            return
        for index, row in enumerate(rows):
            if row in self._bias:
                token_ids, values = self._bias[row]
                logits[index, token_ids] += values


@dataclass(slots=True)
class _MinimumLeft:
    stop_token_ids: Array
    tokens_left: int


class MinTokens:
    """Stop tokens are masked until `min_tokens` have been generated."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._rows: dict[int, _MinimumLeft] = {}

    def add(self, new: NewRow) -> None:
        """Count what is still to come, if there is a minimum."""
        spec = new.sampling
        left = spec.min_tokens - (len(new.token_ids) - new.num_prompt_tokens)
        if left > 0 and spec.stop_token_ids:
            self._rows[new.row] = _MinimumLeft(self._ops.array(spec.stop_token_ids, "int64"), left)

    def remove(self, row: int) -> None:
        """Forget the row."""
        self._rows.pop(row, None)

    def observe(self, row: int, token_id: int) -> None:
        """One fewer to go."""
        state = self._rows.get(row)
        if state is not None:
            state.tokens_left -= 1
            if state.tokens_left == 0:
                del self._rows[row]

    def apply(self, logits: Array, rows: Sequence[int]) -> None:
        """Mask the stop tokens of rows below their minimum."""
        if not self._rows:
            return
        for index, row in enumerate(rows):
            if row in self._rows:
                logits[index, self._rows[row].stop_token_ids] = -math.inf


@dataclass(slots=True)
class _Words:
    words: tuple[tuple[int, ...], ...]
    longest: int
    tail: list[int]
    """The last generated tokens, as many as the longest word needs."""


class BadWords:
    """The last token of a bad word is masked when the tokens before it are the rest of the word."""

    def __init__(self) -> None:
        self._rows: dict[int, _Words] = {}

    def add(self, new: NewRow) -> None:
        """Keep the words and the tail of what was generated, if there are any."""
        words = new.sampling.bad_words
        if words:
            longest = max(len(word) for word in words) - 1
            generated = new.token_ids[new.num_prompt_tokens :]
            self._rows[new.row] = _Words(words, longest, list(generated[-longest:]) if longest else [])

    def remove(self, row: int) -> None:
        """Forget the row."""
        self._rows.pop(row, None)

    def observe(self, row: int, token_id: int) -> None:
        """Move the tail on."""
        state = self._rows.get(row)
        if state is not None and state.longest:
            state.tail.append(token_id)
            del state.tail[: -state.longest]

    def apply(self, logits: Array, rows: Sequence[int]) -> None:
        """Mask."""
        if not self._rows:
            return
        for index, row in enumerate(rows):
            state = self._rows.get(row)
            if state is None:
                continue
            for word in state.words:
                start = word[:-1]
                if not start or tuple(state.tail[-len(start) :]) == start:
                    logits[index, word[-1]] = -math.inf
