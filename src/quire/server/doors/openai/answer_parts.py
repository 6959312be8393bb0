"""What one sequence of a chat says, thinks and calls: as deltas of a stream, or as a message."""

import secrets
from typing import Any

from quire.engine.tools import AnswerParser, CallArguments, CallStart, Content, Event, Reasoning
from quire.server.answers.parts import Parts

Delta = dict[str, Any]


class AnswerParts(Parts):
    """The parts of one sequence, in which its text is read as it comes.

    Args:
        parser: of this sequence's text.
        shows_reasoning: whether reasoning is part of the answer, or left out.
    """

    def __init__(self, parser: AnswerParser, *, shows_reasoning: bool) -> None:
        super().__init__(parser)
        self._shows_reasoning = shows_reasoning

    def deltas(self, text: str, *, ended: bool) -> list[Delta]:
        """What more of the text says: of a call its name first, then its arguments in pieces."""
        return [delta for event in self.push(text, ended=ended) if (delta := self._delta(event))]

    def message(self, text: str, echoed: str) -> Delta:
        """The assistant's message, from the whole text.

        Args:
            echoed: stands before the content.
        """
        found = self.push(text, ended=True)
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
