"""gpt-oss's harmony: an answer of several messages, each with a channel.

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``; a call is a message to a
function: ``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from quire.text.parsers.events import Asked, Content, Reasoning, Tool
from quire.text.parsers.reader import Reader, Step, arguments
from quire.text.parsers.tags import ANY_TEXT, Format, Marker, arguments_of, const, one_of, sequence, tag, tags

NAMES = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


@dataclass(frozen=True, slots=True)
class Harmony:
    """All of an answer: content, reasoning and calls.

    Args:
        marks: its special tokens.
    """

    marks: Mapping[str, Marker]
    name: str = "openai"
    is_whole: ClassVar[bool] = True

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What divides messages."""
        return tuple(self.marks[name] for name in NAMES)

    def held(self, asked: Asked) -> Format:
        """Messages of analysis and preambles, then a call or what is said at last."""
        found = [self._call(tool) for tool in asked.tools]
        if not asked.must_call:
            last = asked.then if asked.then is not None else self._text
            found.append(self._message("final", last, ""))
            if asked.then is None:
                found += [self._message(name, self._text, "") for name in ("analysis", "commentary")]
        return self._messages(one_of(found))

    @property
    def _text(self) -> Format:
        return {**ANY_TEXT, "excludes": list(NAMES[:5])}

    def _message(self, channel: str, content: Format, end: str | Marker) -> Format:
        head = sequence(const(channel), self.marks["<|message|>"].element)
        return tag(self.marks["<|channel|>"], sequence(head, tag("", content, end)), "")

    def _messages(self, last: Format) -> Format:
        """Any messages to no function, and this one."""
        end = self.marks["<|end|>"]
        parts = [self._message(channel, self._text, end) for channel in ("analysis", "commentary")]
        again = sequence(self.marks["<|start|>"].element, const("assistant"))
        before = [tag("", sequence(part, again), "") for part in parts]
        return sequence({**tags(before, "", several=True), "at_least_one": False}, last)

    def _call(self, tool: Tool) -> Format:
        channel, message = self.marks["<|channel|>"].element, self.marks["<|message|>"].element
        to = f"to=functions.{tool.name}"
        typed = sequence(self.marks["<|constrain|>"].element, const("json"))
        heads = [
            sequence(channel, const(f"commentary {to} "), one_of([typed, const("json")])),
            sequence(const(f" {to}"), channel, const("commentary "), one_of([typed, const("json")])),
        ]
        return sequence(one_of(heads), message, arguments_of(tool))

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """All of the answer."""
        ends = [*NAMES[2:4], *NAMES[5:]]
        while (yield from reader.peek()):
            head = yield from self._read_head(reader)
            if head is None:
                return
            to = _RECIPIENT.search(head)
            if to is not None and to[1] in reader.names:
                reader.start_call(to[1])
                if (yield from arguments(reader)):
                    reader.end_call()
                yield from reader.space()
                yield from reader.take_first(ends)
            else:
                kind: Callable[[str], Content | Reasoning] = Reasoning if "analysis" in head else Content
                yield from reader.until(ends, kind)
            reader.part_ends()

    @staticmethod
    def _read_head(reader: Reader) -> Step[str | None]:
        """What stands before the text of a message: "" where no message begins, None where the head is cut off."""
        begun = reader.at
        yield from reader.space()
        first = yield from reader.take_first(("<|channel|>", "<|start|>", "to=", "assistant"))
        if first is None:
            reader.at = begun
            return ""
        rest = yield from reader.before("<|message|>")
        return None if rest is None else first + rest
