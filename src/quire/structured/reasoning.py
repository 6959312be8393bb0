"""A bound on the reasoning at the beginning of an answer: once that many tokens have come, its end is forced."""

from collections.abc import Sequence


class ReasoningBound:
    """Counts the tokens between two markers. What it says depends on the tokens alone.

    Args:
        begin: what the answer begins with if it begins with reasoning: the bytes of a text, or the id of a special
            token; b"" where the prompt ends inside reasoning.
        end: what ends it, as tokens, and `end_text` as bytes; b"" for a special token.
        max_tokens: between the two.
        tokens: the bytes of every token; those of special tokens are not looked at.
    """

    def __init__(
        self, begin: bytes | int, end: Sequence[int], end_text: bytes, max_tokens: int, tokens: Sequence[bytes]
    ) -> None:
        self.end = tuple(end)
        self._begin = begin
        self._end_text = end_text
        self._left = max_tokens
        self._tokens = tokens
        self._seen = b""
        self._has_begun = begin == b""
        self._is_over = False

    @property
    def is_spent(self) -> bool:
        """Whether the reasoning goes on, and has had what it may."""
        return self._has_begun and not self._is_over and self._left <= 0

    def consume(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if self._is_over:
            return
        if not self._has_begun and isinstance(self._begin, int):
            self._has_begun, self._is_over = token_id == self._begin, token_id != self._begin
            return
        self._seen += self._tokens[token_id]
        if not self._has_begun:
            assert isinstance(self._begin, bytes)
            self._has_begun = self._seen.startswith(self._begin)
            self._is_over = not self._has_begun and not self._begin.startswith(self._seen)
            if self._has_begun:
                self._seen = self._seen[len(self._begin) :]
            return
        self._left -= 1
        self._is_over = self._end_text in self._seen if self._end_text else token_id == self.end[0]
        self._seen = self._seen[-len(self._end_text) :] if self._end_text else b""
