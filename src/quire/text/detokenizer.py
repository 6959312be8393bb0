"""From tokens to text while they arrive, and stop strings across token borders."""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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


@dataclass(slots=True, eq=False)
class _State:
    """A node of the automaton: the longest end of the text that begins a stop string."""

    depth: int  # characters
    stop: str | None = None  # the longest stop string that ends here
    following: dict[str, "_State"] = field(default_factory=dict)
    shorter: "_State | None" = None  # the next longest such end; None at the root


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces (Aho and Corasick, 1975).

    The match that is complete first wins; of several complete with the same character, the one that
    began first (the longest) does. So the result does not depend on how the text was cut in pieces.
    (vLLM looks for each stop string in the order of the list after each token, so that there the
    tokens may decide.) Text is held back only while it may be the beginning of a stop string, and with
    `include` never, because then it is part of the result either way. Time is linear in the text.

    Raises `InvalidRequestError` for an empty stop string.
    """

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        if not all(stops):
            raise InvalidRequestError("a stop string must not be empty", param="stop")
        self._include = include
        self._root = _build_automaton(stops)
        firsts = "".join(re.escape(character) for character in sorted(self._root.following))
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")
        self._state = self._root
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_match: bool = True) -> tuple[str, str | None]:
        """Take the next piece; give `(text to emit now, the stop string found or None)`.

        Without `may_match`, stop strings that end in this piece are ignored; one that ends later may begin in it.
        After a match there is nothing more to emit: every later call gives `("", matched)`.
        """
        if self.matched is not None:
            return "", self.matched
        start = 0
        if self._state is self._root:
            found = self._first.search(text)
            if found is None:
                return text, None
            start = found.start()
        state = self._state
        for place in range(start, len(text)):
            state = self._next(state, text[place])
            if state.stop is not None and may_match:
                return self._finish(text[: place + 1], state.stop)
        self._state = state
        if self._include:
            return text, None
        text = self._held + text
        border = len(text) - state.depth
        self._held = text[border:]
        return text[:border], None

    def flush(self) -> str:
        """The text held back, once it is known that no more follows."""
        held, self._held = self._held, ""
        self._state = self._root
        return held

    def _finish(self, text: str, stop: str) -> tuple[str, str]:
        self.matched = stop
        if self._include:
            return text, stop
        text, self._held = self._held + text, ""
        return text[: len(text) - len(stop)], stop

    def _next(self, state: _State, character: str) -> _State:
        while (following := state.following.get(character)) is None:
            if state.shorter is None:
                return state
            state = state.shorter
        return following


def _build_automaton(stops: tuple[str, ...]) -> _State:
    root = _State(0)
    for stop in stops:
        state = root
        for character in stop:
            if character not in state.following:
                state.following[character] = _State(state.depth + 1)
            state = state.following[character]
        state.stop = stop
    level = list(root.following.values())
    for state in level:
        state.shorter = root
    while level:
        below: list[_State] = []
        for state in level:
            for character, child in state.following.items():
                shorter = state.shorter
                while shorter is not None and character not in shorter.following:
                    shorter = shorter.shorter
                child.shorter = root if shorter is None else shorter.following[character]
                if child.stop is None:
                    child.stop = child.shorter.stop
                below.append(child)
        level = below
    return root
