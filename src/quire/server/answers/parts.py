"""What one sequence of a chat says, thinks and calls, as its text comes."""

from collections.abc import Sequence

from quire.engine.tools import AnswerParser, CallEnd, CallStart, Content, Event, joined


class Parts:
    """The parts of one sequence.

    Args:
        parser: of this sequence's text; None: all of it is content.
    """

    def __init__(self, parser: AnswerParser | None) -> None:
        self._parser = parser
        self._num_begun = self._num_ended = 0
        """Calls."""

    def finish_reason(self, stated: str | None) -> str | None:
        """That of the sequence; one whose calls are whole ended for their sake."""
        is_whole = 0 < self._num_begun == self._num_ended
        return "tool_calls" if stated == "stop" and is_whole else stated

    def push(self, text: str, *, ended: bool) -> Sequence[Event]:
        """What more of the text says: of a call its name first, then its arguments in pieces."""
        if self._parser is None:
            return [Content(text)] if text else []
        found = self._parser.push(text)
        if ended:
            found += self._parser.end()
        self._num_begun += sum(isinstance(event, CallStart) for event in found)
        self._num_ended += sum(isinstance(event, CallEnd) for event in found)
        return joined(found)
