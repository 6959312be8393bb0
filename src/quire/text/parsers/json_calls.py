"""Calls written as JSON: `{"name": ..., "arguments": {...}}`, alone or in a list, between markers or without."""

import json
from dataclasses import dataclass
from typing import ClassVar

from quire.text.parsers.events import Asked, Tool
from quire.text.parsers.reader import Reader, Step, arguments, call_object
from quire.text.parsers.tags import (
    NOTHING,
    Format,
    Marker,
    arguments_of,
    const,
    one_of,
    sequence,
    tag,
    tags,
    text_with_tags,
)

KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class MarkedJson:
    """Calls as JSON between markers.

    Args:
        name: of the format.
        before, after: what stands between a marker and the JSON.
        is_list: whether all calls stand in one list; otherwise each stands between markers of its own.
        has_ids: whether a call may end with an id, which is not read.
    """

    name: str
    open: Marker
    close: Marker = NOTHING
    before: str = ""
    after: str = ""
    is_list: bool = False
    has_ids: bool = False
    is_whole: ClassVar[bool] = False

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What opens and closes calls."""
        return (self.open, self.close) if self.close.text else (self.open,)

    def held(self, asked: Asked) -> Format:
        """Content and calls: at least one call and nothing else, or any text with calls in it."""
        calls = [self._call(tool) for tool in asked.tools]
        if self.is_list:
            listed = sequence(tags(calls, ", ", several=asked.parallel), const("]"))
            inner, several = listed if self.opens_list else sequence(const("["), listed), False
        else:
            bare = [tag(self.before, call, self.after) for call in calls] if self.before or self.after else calls
            inner, several = one_of(bare), asked.parallel
        marked = tag(self.open, inner, self.close)
        if asked.must_call:
            return tags([marked], "\n", several=several)
        return text_with_tags([self.open], [marked], several=several)

    @property
    def opens_list(self) -> bool:
        """Whether the marker itself ends with the bracket of the list."""
        return self.open.text.endswith("[") and self.is_list

    def _call(self, tool: Tool) -> Format:
        begin = f'{{"name": {json.dumps(tool.name)}, "arguments": '
        if not self.has_ids:
            return tag(begin, arguments_of(tool), "}")
        with_id = {"type": "regex", "pattern": ', "id": "[a-zA-Z0-9]{9}"\\}'}
        return tag(begin, sequence(arguments_of(tool), one_of([const("}"), with_id])), "")

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """Content and calls, to the end of the text."""
        while (yield from reader.until([self.open.text])):
            begun = reader.at
            found = False
            yield from reader.space()
            if self.opens_list or (yield from reader.take("[")):
                found = yield from self._list(reader)
            else:
                found = yield from call_object(reader, KEYS)
            if not found:  # it only looked like a marker
                reader.at = begun
                reader.say(self.open.text)
                continue
            yield from reader.space()
            if self.close.text and (yield from reader.take(self.close.text)):
                reader.part_ends()

    @staticmethod
    def _list(reader: Reader) -> Step[bool]:
        found = False
        while (yield from reader.space()) == "{" and (yield from call_object(reader, KEYS)):
            found = True
            if (yield from reader.space()) == ",":
                reader.at += 1
        if found and (yield from reader.peek()) == "]":
            reader.at += 1
        return found


@dataclass(frozen=True, slots=True)
class BareJson:
    """Calls as JSON without markers: a text becomes a call by the whole beginning of one.

    Args:
        openings: of a call, `NAME` for the tool's name; the first is the one that is forced.
        separator: between calls.
    """

    name: str
    openings: tuple[str, ...]
    separator: str
    is_whole: ClassVar[bool] = False

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What opens and closes calls."""
        return ()

    def held(self, asked: Asked) -> Format:
        """As for `MarkedJson`."""
        if asked.must_call:
            calls = [tag(self._opening(self.openings[0], tool), arguments_of(tool), "}") for tool in asked.tools]
            return tags(calls, self.separator, several=asked.parallel)
        held = {tool.name: arguments_of(tool) for tool in asked.tools}
        begun = [(self._opening(opening, tool), tool) for opening in self.openings for tool in asked.tools]
        calls = [tag(opening, held[tool.name], "}") for opening, tool in begun]
        return text_with_tags([Marker(opening) for opening, _ in begun], calls, several=asked.parallel)

    @staticmethod
    def _opening(opening: str, tool: Tool) -> str:
        return opening.replace("NAME", json.dumps(tool.name))

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """As for `MarkedJson`."""
        names = {opening.replace("NAME", json.dumps(name)): name for opening in self.openings for name in reader.names}
        while (opening := (yield from reader.until([*names]))) is not None:
            reader.start_call(names[opening])
            if (yield from arguments(reader)):
                reader.end_call()
            if (yield from reader.space()) == "}":
                reader.at += 1
            yield from reader.space()
            yield from reader.take(self.separator.strip())
