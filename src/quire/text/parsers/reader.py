"""Reads an answer's text while it arrives.

A format reads as if the whole text were there; where more is needed it yields. So what it finds cannot depend on how
the text was cut. White space around calls and reasoning belongs to neither: it is held back until it is known what
follows.
"""

import json
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

from quire.text.parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning

T = TypeVar("T")
Step = Generator[None, None, T]
"""A part of a reading: yields where it needs more text, and returns what it found."""
_PLAIN_IN_STRING = re.compile(r'[^"\\]+')
_PLAIN = re.compile(r'[^"\[\]{}]+')
_KEPT_CHARACTERS = 4096
"""Of what was read, before it is let go."""
_SCALAR_END = re.compile(r"[\s,\]}:]")


class Reader:
    """The text of one answer, and what was found in it so far.

    Args:
        names: of the tools that may be called.
        is_either: whether the answer is calls or content: what looks like a call inside of content is none.
    """

    def __init__(self, names: Iterable[str] = (), *, is_either: bool = False) -> None:
        self.names = frozenset(names)
        self._is_either = is_either
        self._is_content = False
        self.text = ""
        """What is not read yet, and what may be read again."""
        self.at = 0
        self.ended = False
        self.events: list[Event] = []
        self.num_calls = 0
        self._space = ""
        self._after_part = False

    # what is found

    def say(self, text: str, kind: Callable[[str], Content | Reasoning] = Content) -> None:
        """More content or reasoning. White space at its end waits for what follows."""
        text = self._space + text
        if self._after_part:
            text = text.lstrip()
        bare = text.rstrip()
        self._space = text[len(bare) :]
        if bare:
            self._after_part = False
            self._is_content |= self._is_either and kind is Content
            self.events.append(kind(bare))

    def part_ends(self) -> None:
        """Before and after calls and reasoning."""
        self._space, self._after_part = "", True

    def finish(self) -> None:
        """After the whole text: white space at its end belongs to the content."""
        if self._space and not self._after_part:
            self.events.append(Content(self._space))
        self._space = ""

    def start_call(self, name: str) -> None:
        """A call is there."""
        self.part_ends()
        self.events.append(CallStart(self.num_calls, name))
        self.num_calls += 1

    def more_arguments(self, text: str) -> None:
        """Of the call that was started last."""
        if text:
            self.events.append(CallArguments(self.num_calls - 1, text))

    def end_call(self) -> None:
        """Its arguments are whole."""
        self.events.append(CallEnd(self.num_calls - 1))

    # reading

    def forget(self) -> None:
        """What was read is not read again."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Step[bool]:
        """Wait for more text; False where none comes."""
        if self.ended:
            return False
        yield
        return True

    def until(self, markers: Sequence[str], kind: Callable[[str], Content | Reasoning] = Content) -> Step[str | None]:
        """Say the text before the next of `markers`, none of which lies in another, and read the marker.

        Returns:
            The marker, or None where the text ends without one.
        """
        find = re.compile("|".join(map(re.escape, markers)) if markers else r"(?!)")
        while True:
            self.forget()
            found = None if self._is_content else find.search(self.text)
            end = found.start() if found else len(self.text) - (0 if self.ended else partial(self.text, markers))
            if end:
                self.say(self.text[:end], kind)
            if found and not self._is_content:
                self.at = found.end()
                return found[0]
            self.at = end
            self.forget()
            if not (yield from self.more()):
                return None

    def peek(self) -> Step[str]:
        """The next character, or "" at the end."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def space(self) -> Step[str]:
        """Read white space; what follows it, as `peek`."""
        while (one := (yield from self.peek())).isspace():
            self.at += 1
        return one

    def take(self, literal: str) -> Step[bool]:
        """Read `literal` if it comes next."""
        while True:
            have = self.text[self.at : self.at + len(literal)]
            if have == literal:
                self.at += len(literal)
                return True
            if not literal.startswith(have) or not (yield from self.more()):
                return False

    def take_first(self, literals: Sequence[str]) -> Step[str | None]:
        """Read the first of `literals` that comes next."""
        for literal in literals:
            if (yield from self.take(literal)):
                return literal
        return None

    def before(self, marker: str, at_most: int = 4096) -> Step[str | None]:
        """Read up to `marker`, and it; None where it does not come soon."""
        begun = self.at
        while (end := self.text.find(marker, begun)) < 0:
            if len(self.text) - begun > at_most or not (yield from self.more()):
                return None
        if end - begun > at_most:
            return None
        self.at = end + len(marker)
        return self.text[begun:end]

    def json_value(self, give: Callable[[str], None] | None = None) -> Step[str | None]:
        """Read a value of JSON, as its brackets and quotes say.

        Args:
            give: gets its text in pieces. It is then not kept.

        Returns:
            The text (without `give`), or None where the text ends before it does.
        """
        pieces: list[str] = []
        take = give or pieces.append
        first = yield from self.peek()
        if first not in ("{", "[", '"'):
            return (yield from self._scalar(take, pieces))
        depth, in_string = 0, False
        while True:
            one = yield from self.peek()
            if not one:
                return None
            begun = self.at
            if in_string and one == "\\":
                while len(self.text) < begun + 2:
                    if not (yield from self.more()):
                        take(one)
                        self.at += 1
                        return None
                self.at += 2
            elif plain := (_PLAIN_IN_STRING if in_string else _PLAIN).match(self.text, begun):
                self.at = plain.end()
            else:
                self.at += 1
                if one == '"':
                    in_string = not in_string
                else:
                    depth += 1 if one in "{[" else -1
            take(self.text[begun : self.at])
            if give is not None and self.at > _KEPT_CHARACTERS:
                self.forget()
            if depth <= 0 and not in_string:
                return "".join(pieces)

    def _scalar(self, take: Callable[[str], None], pieces: list[str]) -> Step[str | None]:
        while (one := (yield from self.peek())) and not _SCALAR_END.match(one):
            self.at += 1
            take(one)
        return "".join(pieces) if one else None


def partial(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin a marker."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if marker.startswith(text[-size:]):
                longest = size
                break
    return longest


def call_object(reader: Reader, keys: Sequence[str]) -> Step[bool]:
    """Read `{"name": ..., "arguments": {...}}`, in any order, as a call.

    Args:
        keys: under which the arguments may stand.

    Returns:
        Whether a call was found. Where none was, nothing was said, and the reader may be set back.
    """
    name, kept, before = None, "{}", reader.num_calls
    has_arguments = False
    if not (yield from reader.take("{")):
        return False
    while True:
        one = yield from reader.space()
        if one == "}" or not one:
            reader.at += bool(one)
            break
        if one == ",":
            reader.at += 1
            continue
        key = yield from _key(reader)
        if key is None:
            break
        if key == "name" and name is None:
            name = _string((yield from reader.json_value()))
            if name not in reader.names:
                break
            reader.start_call(name)
            if has_arguments:
                reader.more_arguments(kept)
        elif key in keys and not has_arguments:
            has_arguments = True
            if name is None:
                kept = arguments_text((yield from reader.json_value()))
            else:
                yield from arguments(reader)
        elif (yield from reader.json_value()) is None:
            break
    if reader.num_calls == before:
        return False
    if one == "}":
        if not has_arguments:
            reader.more_arguments("{}")
        reader.end_call()
    reader.forget()
    return True


def arguments(reader: Reader) -> Step[bool]:
    """Read a value of JSON as the arguments of the call that was started; whether it is whole."""
    if (one := (yield from reader.space())) != "{":
        found = (yield from reader.json_value()) if one else None
        if found is not None:
            reader.more_arguments(arguments_text(found))
        return found is not None
    reader.forget()
    found = yield from reader.json_value(reader.more_arguments)
    reader.forget()
    return found is not None


def arguments_text(value: str | None) -> str:
    """Arguments that may have been written as a string of JSON."""
    inner = _string(value)
    if inner is not None:
        return inner
    return value if value and value != "null" else "{}"


def _key(reader: Reader) -> Step[str | None]:
    key = _string((yield from reader.json_value())) if (yield from reader.peek()) == '"' else None
    if key is None or (yield from reader.space()) != ":":
        return None
    reader.at += 1
    yield from reader.space()
    return key


def _string(value: str | None) -> str | None:
    if value is None or not value.startswith('"'):
        return None
    try:
        found = json.loads(value, strict=False)
        str(found).encode()
    except ValueError:  # no JSON, or half a character, which no answer can carry
        return None
    return found if isinstance(found, str) else None


class AnswerParser:
    """Finds content, reasoning and calls in an answer whose text arrives in pieces.

    The events, those of one kind joined, do not depend on how the text was cut. It raises nothing: what is no call is
    content, and of one that is cut off there is what came.
    """

    def __init__(self, reader: Reader, reading: Step[None], dropped: Sequence[str] = ()) -> None:
        self._reader = reader
        self._reading: Step[None] | None = reading
        self._dropped = tuple(dropped)
        self._find_dropped = re.compile("|".join(map(re.escape, self._dropped)))
        self._held = ""
        self._advance()

    def push(self, text: str) -> list[Event]:
        """More of the text; what is found."""
        self._reader.text += self._without_dropped(text)
        return self._advance()

    def end(self) -> list[Event]:
        """There is no more text; what was held back."""
        self._reader.text += self._held
        self._held, self._reader.ended = "", True
        return self._advance()

    def _without_dropped(self, text: str) -> str:
        """Without special tokens that mark nothing here."""
        if not self._dropped:
            return text
        text = self._held + text
        pieces, end = [], 0
        for found in self._find_dropped.finditer(text):
            pieces.append(text[end : found.start()])
            end = found.end()
        rest = text[end:]
        size = partial(rest, self._dropped)
        self._held = rest[len(rest) - size :]
        return "".join([*pieces, rest[: len(rest) - size]])

    def _advance(self) -> list[Event]:
        reader = self._reader
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None
                if not reader.ended:  # what follows a whole answer
                    self._reading = _rest(reader)
                    return self._advance()
                reader.finish()
        found, reader.events = reader.events, []
        return found


def _rest(reader: Reader) -> Step[None]:
    yield from reader.until(())


def whole(parser: AnswerParser, text: str) -> list[Event]:
    """What is found in a text that is there at once."""
    return [*parser.push(text), *parser.end()]
