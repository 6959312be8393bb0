"""How an answer can end from where it is: a completion that the grammar allows, as tokens.

The walk takes at each place the first of a fixed list of short texts that the grammar lets through: what closes first
(quotes, braces, brackets), then what a missing part needs at least. Its result was tried, so it is a bound from above
on the shortest completion. A walk that goes round in a circle is taken again with the texts of the circle last; where
that finds no end either, a search over few bytes does what it can.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from heapq import heappop, heappush
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

_CLOSERS = sorted(
    ("".join(text) for size in (2, 3, 4) for text in product('"}]', repeat=size)), key=lambda text: (-len(text), text)
)
_IN_TEXT = (*_CLOSERS, '"', "'")
"""First where letters may come: what closes a text."""
_BETWEEN = (*_CLOSERS, "}", "]", '"')
"""First where none may."""
_OTHERS = (
    *('""', "{}", "[]", '":', ":", ',"', ",", ")", ";", ">", "@", "null", "true", "false", "0", "1", "5", "-", "."),
    *("n", "t", "{", "[", *"/'_= \n(<+*!?#$%&|~^`\\"),
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ2346789",
)
_LETTERS = ("Q", "z")
_WALK_STEPS = 2048
_OFTEN = 4
_SEARCHED = 600
_BREADTH = 12
_IMPROVED = (12, 4)
"""Places at which the first completion is tried otherwise, and how often each."""


class Closer:
    """Finds completions.

    Args:
        token_of: the token that is exactly these bytes, or None.
        num_tokens: of the vocabulary.
    """

    def __init__(self, token_of: Callable[[bytes], int | None], num_tokens: int) -> None:
        self._token_of = token_of
        self._num_tokens = num_tokens

    def completion(self, matcher: "LLMatcher", at_most: int, expected: int = _WALK_STEPS) -> list[int] | None:
        """Tokens with which the answer is complete, its end of sequence not among them. The matcher is left as it was.

        Args:
            at_most: the longest that is of use.
            expected: how long about it may be: a walk far beyond has gone in a circle.

        Returns:
            None if none was found.
        """
        limit = min(at_most, 4 * expected + 32, _WALK_STEPS)
        found = self._walk(matcher, limit)
        if found is None:
            found = self._walk(matcher, limit, Counter())
        return self._search(matcher, at_most) if found is None else found

    def shortest(self, matcher: "LLMatcher", at_most: int) -> list[int] | None:
        """The same from the beginning of an answer, with more care."""
        best = self.completion(matcher, at_most)
        num_places, num_others = _IMPROVED
        place = 0
        while best is not None and place < len(best) and num_places:
            if place:
                matcher.try_consume_tokens(best[:place])
            others = (
                [] if matcher.compute_ff_tokens() else [one for one in self._allowed(matcher) if one != best[place]]
            )
            num_places -= bool(others)
            for token_id in others[:num_others]:
                if len(best) - place > 1 and matcher.try_consume_tokens([token_id]):
                    rest = self._walk(matcher, len(best) - place - 2)
                    matcher.rollback(1)
                    best = best if rest is None else [*best[:place], token_id, *rest]
            _back(matcher, place)
            place += 1
        return best

    def _walk(self, matcher: "LLMatcher", at_most: int, taken: Counter[int] | None = None) -> list[int] | None:
        path: list[int] = []
        while len(path) <= at_most and not matcher.is_accepting():
            step = matcher.compute_ff_tokens() or self._step(matcher, taken)
            if not step or matcher.try_consume_tokens(step) < len(step):
                break
            path += step
            if taken is not None:
                taken.update(step)
        is_whole = matcher.is_accepting() and len(path) <= at_most
        _back(matcher, len(path))
        return path if is_whole else None

    def _step(self, matcher: "LLMatcher", taken: Counter[int] | None) -> list[int]:
        in_text = any(matcher.validate_tokens([letter]) for letter in self._letters)
        late = None
        for token_id in self._in_text if in_text else self._between:
            if matcher.validate_tokens([token_id]):
                if taken is None or taken[token_id] < _OFTEN:
                    return [token_id]
                late = token_id if late is None else late
        others = self._allowed(matcher)
        if taken is not None and late is not None:
            fresh = [token_id for token_id in others if taken[token_id] < _OFTEN]
            if not fresh:
                taken.clear()
            return [fresh[0] if fresh else late]
        return others[:1]

    def _allowed(self, matcher: "LLMatcher") -> list[int]:
        """Tokens of one byte that may come next, those of the walk first; without any of them, all others."""
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        found = [token_id for token_id in self._bytes if mask >> token_id & 1]
        return found or [token_id for token_id in range(self._num_tokens) if mask >> token_id & 1][:_BREADTH]

    def _search(self, matcher: "LLMatcher", at_most: int) -> list[int] | None:
        """The shortest first, over a few bytes at each place."""
        heap: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        for number in range(1, _SEARCHED):
            if not heap:
                return None
            _, _, path = heappop(heap)
            taken = matcher.try_consume_tokens(path) if path else 0
            if taken == len(path) and matcher.is_accepting():
                _back(matcher, taken)
                return path
            if taken == len(path) < at_most:
                step = matcher.compute_ff_tokens()
                following: Sequence[list[int]] = (
                    [step] if step else [[one] for one in self._allowed(matcher)[:_BREADTH]]
                )
                for place, tokens in enumerate(following):
                    heappush(heap, (len(path) + len(tokens), number * _BREADTH + place, [*path, *tokens]))
            _back(matcher, taken)
        return None

    def _tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        found = (self._token_of(text.encode()) for text in texts)
        return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))

    @cached_property
    def _letters(self) -> tuple[int, ...]:
        return self._tokens(_LETTERS)

    @cached_property
    def _in_text(self) -> tuple[int, ...]:
        return self._tokens((*_IN_TEXT, *_OTHERS))

    @cached_property
    def _between(self) -> tuple[int, ...]:
        return self._tokens((*_BETWEEN, *_OTHERS))

    @cached_property
    def _bytes(self) -> tuple[int, ...]:
        """Tokens of one byte, those that the walk likes first."""
        singles = [token for byte in range(256) if (token := self._token_of(bytes((byte,)))) is not None]
        known = set(singles)
        return tuple(dict.fromkeys([*(one for one in self._between if one in known), *singles]))


def _back(matcher: "LLMatcher", num_tokens: int) -> None:
    if num_tokens:
        matcher.rollback(num_tokens)
