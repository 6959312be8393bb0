"""Reasoning that stands between markers before the answer."""

from dataclasses import dataclass
from typing import Any

from quire.text.parsers.events import Asked, Reasoning
from quire.text.parsers.reader import Reader, Step
from quire.text.parsers.tags import ANY_TEXT, Format, Marker, const, one_of, sequence, tag

_SPACE: Format = {"type": "regex", "pattern": "\\n{0,2}"}


@dataclass(frozen=True, slots=True)
class Thinking:
    """Reasoning between two markers.

    Args:
        name: of the format.
        dropped: texts that stand around the answer and are no part of it.
    """

    name: str
    begin: Marker
    end: Marker
    dropped: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What opens and closes reasoning."""
        return (self.begin, self.end)

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends inside reasoning."""
        return prompt.rstrip().endswith(self.begin.text)

    def is_closed(self, prompt: str) -> bool:
        """Whether a prompt ends behind reasoning, as where a template leaves it out."""
        return prompt.rstrip().endswith(self.end.text)

    def held(self, asked: Asked, answer: Format) -> Format:
        """`answer` behind the reasoning. Where the answer may be any text, the reasoning need not end."""
        is_free = answer["type"] in ("any_text", "triggered_tags")
        if is_free:
            answer = _excluding(answer, self.begin)
        begin = "" if asked.in_reasoning else self.begin
        before = tag(begin, _excluding(ANY_TEXT, self.end, is_ended=True), self.end)
        if not is_free:
            before = sequence(before, _SPACE)
        if not asked.in_reasoning:
            before = one_of([before, const("")])
        found = [sequence(before, answer)]
        if is_free:
            found.append(tag(begin, _excluding(ANY_TEXT, self.end), ""))
        return one_of(found)

    def budget(self, asked: Asked) -> dict[str, Any] | None:
        """How long it may be."""
        if asked.reasoning_budget is None:
            return None
        begin = "" if asked.in_reasoning else self.begin.text
        return {"begin": begin, "end": self.end.format, "max_tokens": asked.reasoning_budget}

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """The reasoning at the beginning of the text, if there is any."""
        if not asked.in_reasoning:
            yield from reader.space()
            if not (yield from reader.take(self.begin.text)):
                reader.at = 0
                return
        reader.part_ends()
        yield from reader.until([self.end.text], Reasoning)
        reader.part_ends()


def _excluding(answer: Format, marker: Marker, *, is_ended: bool = False) -> Format:
    """Without the marker as text. Where a text marker ends it, there is none in it anyhow."""
    if is_ended and marker.token_id is None:
        return answer
    return {**answer, "excludes": [*answer.get("excludes", ()), marker.text]}
