"""How an answer can end from where it is: a completion that the grammar allows, as tokens.

The walk takes at each place the first of a fixed list of short texts that the grammar lets through: what closes first
(quotes, braces, brackets), then what a missing part needs at least, samples of the grammar's regular expressions among
it. Its result was tried, so it is a bound from above on the shortest completion. A walk that goes round in a circle is
taken again with the texts of the circle last; where that finds no end either, a search over few bytes does what it can.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

_BRACKETS = sorted(
    ("".join(text) for size in (1, 2, 3) for text in product("}]", repeat=size)), key=lambda text: (-len(text), text)
)
_IN_TEXT = (*('"' + text for text in _BRACKETS), '"')
"""First where letters may come: what closes a text."""
_BETWEEN = (*_BRACKETS, '""', '"')
"""First where none may: what closes an object or a list."""
_OTHERS = (
    *('""', "{}", "[]", '":', ":", ',"', ",", ")", ";", ">", "@", "null", "true", "false", "0", "1", "5", "-", "."),
    *("'/_=!?#$%&|~^`\\"),
    *("n", "t", "{", "[", *" \n(<+*"),
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ2346789",
)
_LETTERS = ("Q", "z")
_WALK_STEPS = 2048
_OFTEN = 4
_BREADTH = 12
SEARCHED, SEARCHED_AT_START = 24, 600
"""Beginnings that the search looks at: in an answer, and once for a grammar."""
_IMPROVED = (12, 4)
"""Places at which the first completion is tried otherwise, and how often each."""


class TextTokens:
    """The tokens that completions are made of.

    Args:
        token_of: the token that is exactly these bytes, or None.
        num_tokens: of the vocabulary.
    """

    def __init__(self, token_of: Callable[[bytes], int | None], num_tokens: int) -> None:
        self._token_of = token_of
        self.letters = self._all(_LETTERS)
        self.closing, self.between, self.others = map(self._all, (_IN_TEXT, _BETWEEN, _OTHERS))
        singles = {token for byte in range(256) if (token := token_of(bytes((byte,)))) is not None}
        first = [*dict.fromkeys([*(one for one in (*self.between, *self.others) if one in singles), *sorted(singles)])]
        self._singles: NDArray[np.int64] = np.array(first, np.int64)
        self._num_tokens = num_tokens

    def _all(self, texts: Sequence[str]) -> tuple[int, ...]:
        found = (self._token_of(text.encode()) for text in texts)
        return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))

    def allowed(self, matcher: "LLMatcher") -> list[int]:
        """Tokens of one byte that may come next, those of the walk first; without any of them, a few others."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        found = self._singles[mask[self._singles // 8] >> (self._singles % 8) & 1 == 1]
        if not len(found):
            found = np.flatnonzero(np.unpackbits(mask, bitorder="little", count=self._num_tokens))[:_BREADTH]
        return [int(token_id) for token_id in found]


class Closer:
    """Finds completions under one grammar.

    Args:
        samples: texts that its regular expressions match, as tokens.
    """

    def __init__(self, tokens: TextTokens, samples: Sequence[Sequence[int]] = ()) -> None:
        self._tokens = tokens
        ends = [list(sample[start:]) for sample in samples for start in range(len(sample))]
        self._samples = sorted(ends, key=len)[:256]

    def completion(
        self, matcher: "LLMatcher", at_most: int, expected: int = _WALK_STEPS, searched: int = SEARCHED
    ) -> list[int] | None:
        """Tokens with which the answer is complete, its end of sequence not among them. The matcher is left as it was.

        Args:
            at_most: the longest that is of use.
            expected: how long about it may be: a walk far beyond has gone in a circle.
            searched: how many beginnings are looked at where no walk comes to an end.

        Returns:
            None if none was found.
        """
        limit = min(at_most, 4 * expected + 32, _WALK_STEPS)
        found = self._walk(matcher, limit)
        if found is None:
            found = self._walk(matcher, limit, Counter())
        return self._search(matcher, at_most, searched) if found is None else found

    def shortest(self, matcher: "LLMatcher", at_most: int) -> list[int] | None:
        """The same from the beginning of an answer, with more care."""
        best = self.completion(matcher, at_most, searched=SEARCHED_AT_START)
        num_places, num_others = _IMPROVED
        place = 0
        while best is not None and place < len(best) and num_places:
            if place:
                matcher.try_consume_tokens(best[:place])
            others = [] if matcher.compute_ff_tokens() else self._tokens.allowed(matcher)
            others = [one for one in others if one != best[place]]
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
        tokens = self._tokens
        in_text = any(matcher.validate_tokens([letter]) for letter in tokens.letters)
        closing = self._first(matcher, tokens.closing if in_text else tokens.between, taken)
        if closing:
            return closing
        other = self._fitting_sample(matcher) or self._first(matcher, tokens.others, taken)
        if other:
            return other
        allowed = tokens.allowed(matcher)
        if taken is not None:
            fresh = [token_id for token_id in allowed if taken[token_id] < _OFTEN]
            if not fresh:
                taken.clear()
            allowed = fresh or allowed
        return allowed[:1]

    @staticmethod
    def _first(matcher: "LLMatcher", token_ids: Sequence[int], taken: Counter[int] | None) -> list[int]:
        for token_id in token_ids:
            if (taken is None or taken[token_id] < _OFTEN) and matcher.validate_tokens([token_id]):
                return [token_id]
        return []

    def _fitting_sample(self, matcher: "LLMatcher") -> list[int]:
        """The shortest end of a sample after which the text is closed, or may be."""
        for sample in self._samples:
            if matcher.validate_tokens(sample) == len(sample):
                matcher.try_consume_tokens(sample)
                closing = self._tokens.closing
                closes = matcher.is_accepting() or any(matcher.validate_tokens([one]) for one in closing)
                matcher.rollback(len(sample))
                if closes:
                    return sample
        return []

    def _search(self, matcher: "LLMatcher", at_most: int, searched: int) -> list[int] | None:
        """The shortest first, over a few bytes at each place."""
        heap: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        for number in range(1, searched):
            if not heap:
                return None
            _, _, path = heappop(heap)
            taken = matcher.try_consume_tokens(path) if path else 0
            if taken == len(path) and matcher.is_accepting():
                _back(matcher, taken)
                return path
            if taken == len(path) < at_most:
                step = matcher.compute_ff_tokens()
                few = self._tokens.allowed(matcher)[:_BREADTH]
                following: Sequence[list[int]] = [step] if step else [[one] for one in few]
                for place, tokens in enumerate(following):
                    heappush(heap, (len(path) + len(tokens), number * _BREADTH + place, [*path, *tokens]))
            _back(matcher, taken)
        return None


def _back(matcher: "LLMatcher", num_tokens: int) -> None:
    if num_tokens:
        matcher.rollback(num_tokens)
