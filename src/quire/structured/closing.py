"""How an answer can end from where it is: a completion that the grammar allows, as tokens.

The walk takes at each place the first of a fixed list of short texts that the grammar lets through: what closes first
(quotes, braces, brackets), then what a missing part needs at least, samples of the grammar's regular expressions among
it. Its result was tried, so it is a bound from above on the shortest completion. A walk that goes round in a circle is
taken again with the texts of the circle last; where that finds no end either, a search over few bytes does what it can.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quire.structured.keys import COLON, START, Place
from quire.structured.unique import UniqueKeys

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
_FREE = ("~", "Q")
"""Fits, as a whole, where any text does."""
_WALK_STEPS = 2048
_OFTEN = 4
_BREADTH = 12
EFFORT, EFFORT_AT_START = 4_000, 60_000
"""Tokens tried for one completion, some 3 us each: in an answer, and once for a grammar."""
_MASK_EFFORT = 20
_MOST_SAMPLES = 128
_MOST_ENCODED = 1024
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
        self.letters, self.line, self.space = map(self._all, (_LETTERS, "\n", " "))
        self.free = self._all(_FREE)
        self.closing, self.between, self.others = map(self._all, (_IN_TEXT, _BETWEEN, _OTHERS))
        singles = {token for byte in range(256) if (token := token_of(bytes((byte,)))) is not None}
        first = [*dict.fromkeys([*(one for one in (*self.between, *self.others) if one in singles), *sorted(singles)])]
        self._singles: NDArray[np.int64] = np.array(first, np.int64)
        self._num_tokens = num_tokens

    def _all(self, texts: Sequence[str]) -> tuple[int, ...]:
        found = (self._token_of(text.encode()) for text in texts)
        return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))

    def allowed(self, matcher: "LLMatcher | UniqueKeys") -> list[int]:
        """Tokens of one byte that may come next, those of the walk first; without any of them, a few others."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        found = self._singles[mask[self._singles // 8] >> (self._singles % 8) & 1 == 1]
        if not len(found):
            found = np.flatnonzero(np.unpackbits(mask, bitorder="little", count=self._num_tokens))[:_BREADTH]
        return [int(token_id) for token_id in found]


class _Spent(Exception):
    """A look for a completion has cost what it may."""


class _Probe:
    """A matcher that is tried, and afterwards is where it was.

    Args:
        effort: what the tries may cost, in tokens looked at: not in time, so that a loaded machine finds the same.
    """

    def __init__(self, matcher: "LLMatcher | UniqueKeys", tokens: TextTokens, effort: int) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._effort = effort
        self.depth = 0
        """Tokens taken."""

    def _spend(self, count: int) -> None:
        self._effort -= count
        if self._effort < 0:
            raise _Spent

    @property
    def is_whole(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def place(self) -> Place:
        """In YAML."""
        assert isinstance(self._matcher, UniqueKeys)
        return self._matcher.place

    def fits(self, token_ids: Sequence[int]) -> bool:
        num_fitting = int(self._matcher.validate_tokens(list(token_ids)))
        self._spend(1 + num_fitting)
        return num_fitting == len(token_ids)

    def take(self, token_ids: Sequence[int]) -> bool:
        self._spend(2 * len(token_ids))
        taken = self._matcher.try_consume_tokens(list(token_ids)) if token_ids else 0
        self.depth += taken
        return taken == len(token_ids)

    def back_to(self, depth: int) -> None:
        if self.depth > depth:
            self._matcher.rollback(self.depth - depth)
            self.depth = depth

    def forced(self) -> list[int]:
        self._spend(2)
        return list(self._matcher.compute_ff_tokens())

    def allowed(self) -> list[int]:
        self._spend(_MASK_EFFORT)
        return self._tokens.allowed(self._matcher)


class Closer:
    """Finds completions under one grammar.

    Args:
        samples: texts that its regular expressions match, as tokens.
        ends: what ends free text in it, as tokens.
        lines: of YAML, what its lines may begin with, by their indentation: what is best first.
        encode: how a text is written in tokens.
    """

    def __init__(
        self,
        tokens: TextTokens,
        samples: Sequence[Sequence[int]] = (),
        ends: Sequence[Sequence[int]] = (),
        lines: Sequence[tuple[int, str]] = (),
        encode: Callable[[str], Sequence[int]] = lambda text: (),
    ) -> None:
        self._tokens = tokens
        self._ends: list[list[int]] = [list(end) for end in ends]
        self._lines = lines
        self._encode = lru_cache(_MOST_ENCODED)(lambda text: list(encode(text)))
        tails = [list(sample[start:]) for sample in samples for start in range(len(sample))]
        self._samples = sorted(tails, key=len)[:_MOST_SAMPLES]

    def completion(
        self, matcher: "LLMatcher | UniqueKeys", at_most: int, expected: int = _WALK_STEPS, effort: int = EFFORT
    ) -> list[int] | None:
        """Tokens with which the answer is complete, its end of sequence not among them. The matcher is left as it was.

        Args:
            at_most: the longest that is of use.
            expected: how long about it may be: a walk far beyond has gone in a circle.
            effort: what looking for it may cost, in tokens tried.

        Returns:
            None if none was found.
        """
        probe = _Probe(matcher, self._tokens, effort)
        limit = min(at_most, 4 * expected + 32, _WALK_STEPS)
        try:
            found = self._walk(probe, limit)
            if found is None:
                found = self._walk(probe, limit, Counter())
            return self._search(probe, at_most) if found is None else found
        except _Spent:
            return None
        finally:
            probe.back_to(0)

    def shortest(self, matcher: "LLMatcher | UniqueKeys", at_most: int) -> list[int] | None:
        """The same from the beginning of an answer, with more care."""
        best = self.completion(matcher, at_most, effort=EFFORT_AT_START)
        if best is None:
            return None
        probe = _Probe(matcher, self._tokens, EFFORT_AT_START)
        try:
            for path in self._shorter(probe, best):
                best = path
        except _Spent:
            pass
        finally:
            probe.back_to(0)
        return best

    def _shorter(self, probe: _Probe, best: list[int]) -> Iterator[list[int]]:
        """Completions that turn off at one of the first places where there is a choice, each shorter than the last."""
        num_places, num_others = _IMPROVED
        place = 0
        while place < len(best) and num_places:
            probe.back_to(0)
            probe.take(best[:place])
            others = [] if probe.forced() else [one for one in probe.allowed() if one != best[place]]
            num_places -= bool(others)
            for token_id in others[:num_others]:
                if len(best) - place > 1 and probe.take([token_id]):
                    rest = self._walk(probe, len(best) - place - 2)
                    if rest is not None:
                        best = [*best[:place], token_id, *rest]
                        yield best
                probe.back_to(place)
            place += 1

    def _walk(self, probe: _Probe, at_most: int, taken: Counter[int] | None = None) -> list[int] | None:
        path: list[int] = []
        begun = probe.depth
        while len(path) <= at_most and not probe.is_whole:
            step = probe.forced() or self._step(probe, taken)
            if not step or not probe.take(step):
                break
            path += step
            if taken is not None:
                taken.update(step)
        is_whole = probe.is_whole and len(path) <= at_most
        probe.back_to(begun)
        return path if is_whole else None

    def _step(self, probe: _Probe, taken: Counter[int] | None) -> list[int]:
        tokens = self._tokens
        end = self._fitting_end(probe) if self._ends else []
        if end:
            return end
        in_text = any(probe.fits([letter]) for letter in tokens.letters)
        closing = self._first(probe, tokens.closing if in_text else tokens.between, taken) or self._line(probe, taken)
        if closing:
            return closing
        other = self._fitting_sample(probe) or self._first(probe, tokens.others, taken)
        if other:
            return other
        allowed = probe.allowed()
        if taken is not None:
            fresh = [token_id for token_id in allowed if taken[token_id] < _OFTEN]
            if not fresh:
                taken.clear()
            allowed = fresh or allowed
        return allowed[:1]

    def _line(self, probe: _Probe, taken: Counter[int] | None) -> list[int]:
        """The first beginning of a line that fits, or what is left of it; behind a key what goes on in its line."""
        if not self._lines:
            return []
        place = probe.place
        is_begun = place.mode == START
        if not is_begun and not self._first(probe, self._tokens.line, None):
            return []
        if place.mode == COLON and (space := self._first(probe, self._tokens.space, None)):
            return space
        for indentation, text in self._lines:
            if not is_begun or indentation >= place.column:
                before = " " * (indentation - place.column) if is_begun else "\n" + " " * indentation
                line = self._encode(before + text)
                if line and (taken is None or taken[line[-1]] < _OFTEN) and probe.fits(line):
                    return line
        return []

    @staticmethod
    def _first(probe: _Probe, token_ids: Sequence[int], taken: Counter[int] | None) -> list[int]:
        for token_id in token_ids:
            if (taken is None or taken[token_id] < _OFTEN) and probe.fits([token_id]):
                return [token_id]
        return []

    def _fitting_end(self, probe: _Probe) -> list[int]:
        """What ends free text here: behind it the text is free no more, or may end."""
        begun = probe.depth
        for end in self._ends:
            if probe.fits(end) and probe.take(end):
                ends = probe.is_whole or not probe.fits(self._tokens.free)
                probe.back_to(begun)
                if ends:
                    return end
            probe.back_to(begun)
        return []

    def _fitting_sample(self, probe: _Probe) -> list[int]:
        """The shortest end of a sample after which the text is closed, or may be."""
        begun = probe.depth
        for sample in self._samples:
            if probe.fits(sample):
                probe.take(sample)
                closes = probe.is_whole or any(probe.fits([one]) for one in self._tokens.closing)
                probe.back_to(begun)
                if closes:
                    return sample
        return []

    def _search(self, probe: _Probe, at_most: int) -> list[int] | None:
        """The shortest first, over a few bytes at each place."""
        heap: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        begun, number = probe.depth, 0
        while heap:
            _, _, path = heappop(heap)
            if probe.take(path):
                if probe.is_whole:
                    probe.back_to(begun)
                    return path
                if len(path) < at_most:
                    step = probe.forced()
                    following: Sequence[list[int]] = [step] if step else [[one] for one in probe.allowed()[:_BREADTH]]
                    for tokens in following:
                        number += 1
                        heappush(heap, (len(path) + len(tokens), number, [*path, *tokens]))
            probe.back_to(begun)
        return None
