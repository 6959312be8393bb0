"""What one sequence of a chat says, thinks and calls: as deltas of a stream, or as a message."""

import secrets
from collections.abc import Sequence
from typing import Any

from quire.engine.tools import AnswerParser, CallArguments, CallEnd, CallStart, Content, Event, Reasoning, joined

Delta = dict[str, Any]


class AnswerParts:
    """The parts of one sequence, in which its text is read as it comes.

    Args:
        parser: of this sequence's text.
        shows_reasoning: whether reasoning is part of the answer, or left out.
    """

    def __init__(self, parser: AnswerParser, *, shows_reasoning: bool) -> None:
        self._parser = parser
        self._shows_reasoning = shows_reasoning
        self._num_begun = self._num_ended = 0
        """Calls."""

    def finish_reason(self, stated: str | None) -> str | None:
        """That of the sequence; one whose calls are whole ended for their sake."""
        is_whole = 0 < self._num_begun == self._num_ended
        return "tool_calls" if stated == "stop" and is_whole else stated

    def deltas(self, text: str, *, ended: bool) -> list[Delta]:
        """What more of the text says: of a call its name first, then its arguments in pieces."""
        return [delta for event in self._events(text, ended=ended) if (delta := self._delta(event))]

    def message(self, text: str, echoed: str) -> Delta:
        """The assistant's message, from the whole text.

        Args:
            echoed: stands before the content.
        """
        found = self._events(text, ended=True)
        content = echoed + "".join(event.text for event in found if isinstance(event, Content))
        message: Delta = {"role": "assistant", "content": content or None, "refusal": None}
        reasoning = "".join(event.text for event in found if isinstance(event, Reasoning))
        if reasoning and self._shows_reasoning:
            message |= _reasoning(reasoning)
        calls = [_call(event.name) for event in found if isinstance(event, CallStart)]
        for event in found:
            if isinstance(event, CallArguments):
                calls[event.index]["function"]["arguments"] += event.text
        return message | ({"tool_calls": calls} if calls else {})

    def _events(self, text: str, *, ended: bool) -> Sequence[Event]:
        found = self._parser.push(text)
        if ended:
            found += self._parser.end()
        self._num_begun += sum(isinstance(event, CallStart) for event in found)
        self._num_ended += sum(isinstance(event, CallEnd) for event in found)
        return joined(found)

    def _delta(self, event: Event) -> Delta | None:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text) if self._shows_reasoning:
                return _reasoning(text)
            case CallStart(index, name):
                return {"tool_calls": [{"index": index, **_call(name)}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return None


def _reasoning(text: str) -> Delta:
    """Under vLLM's name, and under the one that DeepSeek's clients read."""
    return {"reasoning": text, "reasoning_content": text}


def _call(name: str) -> Delta:
    function = {"name": name, "arguments": ""}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
