"""A matcher under which no mapping of YAML has a key twice: no grammar can say that of keys that it does not know."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quire.structured.keys import IN_KEY, LONGEST_PLAIN, START, Place, after

if TYPE_CHECKING:
    from llguidance import LLMatcher


class KeyTokens:
    """The tokens of a vocabulary that may end a key.

    Args:
        tokens: by id; b"" for those that are no text.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        ends = [number for number, text in enumerate(tokens) if b":" in text or b'"' in text]
        self.ends = _ids(ends)
        self.wholes = _ids([number for number in ends if b"\n" in tokens[number] or tokens[number].count(b'"') > 1])
        """Those that may begin one as well, behind the end of a value."""
        self.all = _ids([number for number, text in enumerate(tokens) if text])


class UniqueKeys:
    """llguidance's matcher, with its methods, without the tokens after which a key would come twice.

    Every key that a schema does not name can become another, longer one, so no place is left without a token.
    """

    def __init__(self, raw: "LLMatcher", tokens: KeyTokens) -> None:
        self.raw = raw
        self._tokens = tokens
        self._places = [Place()]

    @property
    def place(self) -> Place:
        """Where the answer is."""
        return self._places[-1]

    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return bool(self.raw.is_accepting())

    def is_error(self) -> bool:
        """Whether following the answer has failed."""
        return bool(self.raw.is_error())

    def get_error(self) -> str:
        """Why."""
        return str(self.raw.get_error())

    def compute_ff_tokens(self) -> list[int]:
        """Tokens that must come next."""
        return list(self.raw.compute_ff_tokens())

    def compute_bitmask(self) -> bytes:
        """Which tokens may come next, a bit a token."""
        mask = np.frombuffer(self.raw.compute_bitmask(), np.uint8).copy()
        self.exclude(mask)
        return mask.tobytes()

    def exclude(self, mask: NDArray[np.uint8]) -> None:
        """Take the bits of tokens away after which a key would come twice."""
        for token_id in self._twice(mask):
            mask[token_id // 8] &= ~np.uint8(1 << token_id % 8)

    def validate_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of them may come next, one after the other."""
        return int(self.raw.validate_tokens([*token_ids[: len(self._following(token_ids))]]))

    def try_consume_tokens(self, token_ids: Sequence[int]) -> int:
        """Go on with as many of them as may come next; their number."""
        places = self._following(token_ids)
        taken = int(self.raw.try_consume_tokens([*token_ids[: len(places)]])) if places else 0
        self._places += places[:taken]
        return taken

    def consume_token(self, token_id: int) -> bool:
        """Go on with this token, if it may come next."""
        places = self._following([token_id])
        if not places or not self.raw.consume_token(token_id):
            return False
        self._places += places
        return True

    def rollback(self, count: int) -> None:
        """Go back by so many tokens."""
        self.raw.rollback(count)
        del self._places[len(self._places) - count :]

    def deep_copy(self) -> "UniqueKeys":
        """Another one at the same place."""
        other = UniqueKeys(self.raw.deep_copy(), self._tokens)
        other._places = [*self._places]
        return other

    def _following(self, token_ids: Sequence[int]) -> list[Place]:
        found, place = [], self._places[-1]
        for token_id in token_ids:
            following = after(place, self._tokens.tokens[token_id])
            if following is None:
                break
            place = following
            found.append(place)
        return found

    def _twice(self, mask: NDArray[np.uint8]) -> list[int]:
        place = self._places[-1]
        known = place.all_keys
        if not known:
            return []
        tokens = self._tokens.tokens
        found = set[int]()
        if place.mode in IN_KEY:
            found.update(self._completing(place, mask))
        whole = re.compile(b"(?:" + b"|".join(map(re.escape, known)) + b')[:"]')
        among = self._tokens.ends if place.mode == START else self._tokens.wholes
        found.update(token_id for token_id in _allowed(mask, among) if whole.search(tokens[token_id]))
        return [token_id for token_id in found if after(place, tokens[token_id]) is None]

    def _completing(self, place: Place, mask: NDArray[np.uint8]) -> Iterator[int]:
        """Tokens with which the text becomes a key that is there, among others."""
        rests = [key[len(place.text) :] for key in place.keys if key.startswith(place.text)]
        if not rests:
            return
        tokens = self._tokens.tokens
        ends = tuple(rest + end for rest in rests for end in (b":", b'"'))
        yield from (one for one in _allowed(mask, self._tokens.ends) if tokens[one].startswith(ends))
        if any(len(place.text) + len(rest) >= LONGEST_PLAIN for rest in rests):
            starts = tuple(rest for rest in rests if rest)
            yield from (one for one in _allowed(mask, self._tokens.all) if tokens[one].startswith(starts))


def _ids(found: list[int]) -> NDArray[np.int64]:
    return np.array(found, np.int64)


def _allowed(mask: NDArray[np.uint8], among: NDArray[np.int64]) -> Any:
    held = mask[among // 8] >> (among % 8).astype(np.uint8) & 1 == 1
    return among[held].tolist()
