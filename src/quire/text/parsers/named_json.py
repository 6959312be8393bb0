"""Calls that name the function before its arguments, which are one JSON object."""

from dataclasses import dataclass
from typing import ClassVar

from quire.text.parsers.events import Asked, Tool
from quire.text.parsers.reader import Reader, Step, arguments
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


@dataclass(frozen=True, slots=True)
class NamedJson:
    """`begin kind after-kind NAME before ARGUMENTS after end`, once or several times, perhaps between two markers.

    Args:
        begin, end: of each call.
        after_name: the marker behind the name, or behind the kind where there is one.
        kind: of the call, which stands before the name.
        open, close: of all calls of an answer.
    """

    name: str
    begin: Marker
    after_name: Marker
    end: Marker = NOTHING
    kind: str = ""
    before: str = ""
    after: str = ""
    separator: str = ""
    open: Marker = NOTHING
    close: Marker = NOTHING
    is_whole: ClassVar[bool] = False

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What opens and closes calls."""
        found = (self.open, self.begin, self.after_name, self.end, self.close)
        return tuple(one for one in found if one.text)

    def held(self, asked: Asked) -> Format:
        """As for `MarkedJson`."""
        call = tag(self.begin, one_of([self._call(tool) for tool in asked.tools]), self.end)
        if not self.open.text:
            if asked.must_call:
                return tags([call], self.separator, several=asked.parallel)
            return text_with_tags([self.begin], [call], several=asked.parallel)
        section = tag(self.open, tags([call], self.separator, several=asked.parallel), self.close)
        return section if asked.must_call else text_with_tags([self.open], [section], several=False)

    def _call(self, tool: Tool) -> Format:
        if self.kind:
            head: tuple[Format, ...] = (const(self.kind), self.after_name.element, const(tool.name + self.before))
        else:
            head = (const(tool.name), self.after_name.element, *([const(self.before)] if self.before else []))
        return sequence(*head, arguments_of(tool), *([const(self.after)] if self.after else []))

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """As for `MarkedJson`."""
        marker = (self.open if self.open.text else self.begin).text
        while (yield from reader.until([marker])):
            begun, before = reader.at, reader.num_calls
            while True:
                yield from reader.space()
                if (self.open.text or reader.num_calls > before) and not (yield from reader.take(self.begin.text)):
                    break
                if not (yield from self._read_call(reader)):
                    break
            if reader.num_calls == before:  # it only looked like a marker
                reader.at = begun
                reader.say(marker)
            elif self.close.text and (yield from reader.take(self.close.text)):
                reader.part_ends()

    def _read_call(self, reader: Reader) -> Step[bool]:
        name = yield from self._read_name(reader)
        if name not in reader.names:
            return False
        assert name is not None
        reader.start_call(name)
        is_whole = yield from arguments(reader)
        if is_whole:
            reader.end_call()
        if self.after.strip():
            yield from reader.space()
            yield from reader.take(self.after.strip())
        if self.end.text:
            yield from reader.space()
            yield from reader.take(self.end.text)
        return is_whole

    def _read_name(self, reader: Reader) -> Step[str | None]:
        if not self.kind:
            name = yield from reader.before(self.after_name.text, 256)
            return None if name is None else name.strip()
        if (yield from reader.before(self.after_name.text, 64)) is None:
            return None
        name = yield from reader.before("\n", 256)
        if name is not None:
            yield from reader.space()
            yield from reader.take(self.before.strip())
        return None if name is None else name.strip()
