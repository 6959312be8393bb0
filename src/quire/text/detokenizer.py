"""From tokens to text while they arrive, and stop strings across token borders."""

import bisect
import codecs
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer

_MAX_CHARACTER_BYTES = 4


class IncrementalDetokenizer:
    """The text of a growing list of tokens, each character given out once and whole.

    The law: the results of all `push` calls and of one `flush`, joined, are
    `tokenizer.decode(all ids)` with the same two switches. Each token costs its own bytes, whatever
    went before.

    `prompt_token_ids` is what the tokens continue: the text is then no beginning, so a SentencePiece
    model keeps the space before its first word, and a character begun by the prompt is completed.
    `spaces_between_special_tokens=False` leaves out the space that a decoder writes before an added
    token which follows another one; it means something only when special tokens are shown.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._table = tokenizer.token_table
        self._skipped: frozenset[int] = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._joins_added = not (skip_special_tokens or spaces_between_special_tokens)
        self._follows_added = False
        self._has_begun = False
        self._strip_left = self._table.strip_count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._continue_from(prompt_token_ids)

    def _continue_from(self, prompt_token_ids: Sequence[int]) -> None:
        tail: list[bytes] = []
        for token_id in reversed(prompt_token_ids):
            if token_id in self._skipped:
                continue
            if not self._has_begun:
                self._has_begun = True
                self._follows_added = self._table.is_added(token_id)
                self._strip_left = 0
            tail.append(self._table.following(token_id))
            if sum(map(len, tail)) >= _MAX_CHARACTER_BYTES:
                break
        # Begin at a character, so that only a character which the prompt leaves open stays inside.
        whole = b"".join(reversed(tail))
        starts = [place for place, byte in enumerate(whole) if byte & 0xC0 != 0x80]
        if starts:
            self._decoder.decode(whole[starts[-1] :])

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        pieces: list[bytes] = []
        for token_id in token_ids:
            if token_id in self._skipped:
                continue
            if self._has_begun and not self._joins_added:
                pieces.append(self._table.following(token_id))
            else:
                pieces.append(self._first_or_joined(token_id))
        data = b"".join(pieces)
        return self._decoder.decode(self._stripped(data) if self._strip_left else data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, or nothing."""
        return self._decoder.decode(b"", final=True)

    def _first_or_joined(self, token_id: int) -> bytes:
        is_added = self._table.is_added(token_id)
        if not self._has_begun:
            piece = self._table.beginning(token_id)
        elif is_added and self._follows_added and self._joins_added:
            piece = (self._table.content(token_id) or "").encode()
        else:
            piece = self._table.following(token_id)
        self._has_begun = True
        self._follows_added = is_added
        return piece

    def _stripped(self, data: bytes) -> bytes:
        """`data` less what the decoder strips from the start of the whole text."""
        strip = self._table.strip
        while self._strip_left and data:
            if not data.startswith(strip):
                self._strip_left = 0
                break
            data = data[len(strip) :]
            self._strip_left -= 1
        return data


class TextOffsets:
    """Where in the text of an answer each token begins, in characters: the place of the next character when it came.

    Tokens of one character begin at one place, and a token that is left out of the text begins where the next one
    does. `start` is the length of what stands before the answer; the rest is `IncrementalDetokenizer`'s.
    """

    def __init__(self, tokenizer: "Tokenizer", start: int, **options: Any) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, **options)
        self.place = start
        """Where the next one begins."""

    def push(self, token_ids: Sequence[int]) -> list[int]:
        """Of these tokens, which come next."""
        found = []
        for token_id in token_ids:
            found.append(self.place)
            self.place += len(self._detokenizer.push((token_id,)))
        return found


def prompt_offsets(tokenizer: "Tokenizer", text: str, token_ids: Sequence[int]) -> list[int]:
    """Where in a prompt each of its tokens begins. Special tokens that the text does not spell, such as a BOS that the
    tokenizer adds, take no room there; nor does what a normaliser added behind its end."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    found, place = [], 0
    for token_id in token_ids:
        found.append(min(place, len(text)))
        content = tokenizer.token_table.content(token_id) or ""
        if token_id not in tokenizer.special_token_ids or text.startswith(content, place):
            place += len(detokenizer.push((token_id,)))
    return found


class StopStrings:
    """The stop strings of a request, prepared once for all its sequences.

    Raises `InvalidRequestError` for an empty stop string.
    """

    def __init__(self, stops: Iterable[str], include: bool) -> None:
        self._sorted = sorted(set(stops))
        if not all(self._sorted):
            raise InvalidRequestError("a stop string must not be empty", param="stop")
        self.include = include
        self._by_length = sorted(self._sorted, key=len)
        firsts = "".join(map(re.escape, sorted({stop[0] for stop in self._sorted})))
        self.first = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def find(self, text: str, start: int) -> tuple[int, str] | None:
        """The match that ends first behind `start`, and of several the longest: `(end, stop string)`."""
        found = []
        for stop in self._by_length:
            if len(stop) > len(text):
                break
            place = text.find(stop, max(0, start - len(stop) + 1))
            if place >= 0:
                found.append((place + len(stop), -len(stop), stop))
        if not found:
            return None
        end, _, stop = min(found)
        return end, stop

    def beginning_in(self, text: str) -> str:
        """The longest end of `text` with which a stop string begins that is longer."""
        for match in self.first.finditer(text, max(0, len(text) - len(self._by_length[-1]) + 1)):
            end = text[match.start() :]
            place = bisect.bisect_right(self._sorted, end)  # in this order, what begins with it comes next
            if place < len(self._sorted) and self._sorted[place].startswith(end):
                return end
        return ""


class StopSearch:
    """Finds the first stop string in the text of one sequence, which arrives in pieces.

    The match that is complete first wins; of several complete with the same character, the one that
    began first (the longest) does. So the result does not depend on how the text was cut in pieces.
    (vLLM looks for each stop string in the order of the list after each token, so that there the
    tokens may decide.) Text is held back only while it may be the beginning of a stop string, and with
    `include` never, because then it is part of the result either way. A piece is searched together
    with that beginning, which is seldom longer than a character or two.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._begun = ""  # the longest end of the text so far with which a stop string begins
        self.matched: str | None = None

    def push(self, text: str, *, may_match: bool = True) -> tuple[str, str | None]:
        """Take the next piece; give `(text to emit now, the stop string found or None)`.

        Without `may_match`, stop strings that end in this piece are ignored; one that ends later may begin in it.
        After a match there is nothing more to emit: every later call gives `("", matched)`.
        """
        if self.matched is not None:
            return "", self.matched
        if not self._begun and self._stops.first.search(text) is None:
            return text, None
        start = len(self._begun)
        whole = self._begun + text
        found = self._stops.find(whole, start) if may_match else None
        if found is not None:
            end, self.matched = found
            self._begun = ""
            return whole[start:end] if self._stops.include else whole[: end - len(self.matched)], self.matched
        self._begun = self._stops.beginning_in(whole)
        if self._stops.include:
            return text, None
        return whole[: len(whole) - len(self._begun)], None

    def flush(self) -> str:
        """The text held back, once it is known that no more follows."""
        begun, self._begun = self._begun, ""
        return "" if self._stops.include else begun
