"""A response as it grows: from what an answer says to OpenAI's events, in order and numbered.

::

    created, in_progress,
      output_item.added, content_part.added, *.delta ..., *.done, content_part.done, output_item.done   (each item)
    completed | incomplete | failed
"""

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from quire.engine.tools import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quire.server.doors.openai.responses.items import Item, new_item_id

ResponseEvent = dict[str, Any]
_TEXT = {
    "message": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}
"""Type of an item -> the type of its part, and the events of its text."""


class Writer:
    """Makes the events of one response.

    Args:
        head: the response without its output, state and usage.
        shows_reasoning: whether reasoning is part of it.
    """

    def __init__(self, head: dict[str, Any], *, shows_reasoning: bool) -> None:
        self._head, self._shows_reasoning = head, shows_reasoning
        self._num_events = 0
        self.output: list[Item] = []
        """Items that are whole, and the one that grows."""
        self._open: Item | None = None
        self._texts: list[str] = []
        """Of the item that grows."""
        self._logprobs: list[dict[str, Any]] = []
        self.reasoning: list[str] = []
        """All of it, also where it is not shown."""

    def begin(self) -> Iterator[ResponseEvent]:
        """The first two events."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.response("in_progress"))

    def push(self, events: Iterable[Event], logprobs: list[dict[str, Any]] | None = None) -> Iterator[ResponseEvent]:
        """More of the answer.

        Args:
            logprobs: of its tokens; they go with the text of a message.
        """
        for event in events:
            match event:
                case Content(text):
                    yield from self._text("message", text, logprobs or [])
                    logprobs = None
                case Reasoning(text):
                    self.reasoning.append(text)
                    if self._shows_reasoning:
                        yield from self._text("reasoning", text, [])
                case CallStart(_, name):
                    yield from self._begin_item("function_call", call_id=f"call_{secrets.token_hex(12)}", name=name)
                case CallArguments(_, text):
                    self._texts.append(text)
                    yield self._of_item("response.function_call_arguments.delta", delta=text)
                case CallEnd():
                    yield from self._end_item("completed")

    def end(self, status: str, usage: dict[str, Any] | None, **more: Any) -> Iterator[ResponseEvent]:
        """The rest of the item that grows, and the last event."""
        if not self.output and status == "completed":
            yield from self._begin_item("message")
        yield from self._end_item("completed" if status == "completed" else "incomplete")
        yield self._event(f"response.{status}", response=self.response(status, usage=usage, **more))

    def response(self, status: str, **more: Any) -> dict[str, Any]:
        """The whole response, as far as it is."""
        return {**self._head, "status": status, "output": [*self.output], **more}

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[ResponseEvent]:
        if self._open is None or self._open["type"] != kind:
            yield from self._begin_item(kind)
        self._texts.append(text)
        self._logprobs += logprobs
        more = {"logprobs": logprobs} if kind == "message" else {}
        yield self._of_item(f"{_TEXT[kind][1]}.delta", content_index=0, delta=text, **more)

    def _begin_item(self, kind: str, **fields: Any) -> Iterator[ResponseEvent]:
        yield from self._end_item("completed")
        item: Item = {"id": new_item_id(kind), "type": kind, "status": "in_progress", **fields}
        begun: dict[str, Item] = {
            "message": {"role": "assistant", "content": []},
            "reasoning": {"summary": [], "content": []},
            "function_call": {"arguments": ""},
        }
        item |= begun[kind]
        self._open, self._texts, self._logprobs = item, [], []
        self.output.append(item)
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=dict(item))
        if kind in _TEXT:
            yield self._of_item("response.content_part.added", content_index=0, part=self._part(""))

    def _end_item(self, status: str) -> Iterator[ResponseEvent]:
        if self._open is None:
            return
        kind, text = self._open["type"], "".join(self._texts)
        done = {**self._open, "status": status}
        if kind in _TEXT:
            part = self._part(text)
            more = {"logprobs": self._logprobs} if kind == "message" else {}
            yield self._of_item(f"{_TEXT[kind][1]}.done", content_index=0, text=text, **more)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
            done["content"] = [part]
        else:
            yield self._of_item("response.function_call_arguments.done", arguments=text)
            done["arguments"] = text
        self.output[-1], self._open = done, None
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=done)

    def _part(self, text: str) -> dict[str, Any]:
        assert self._open is not None
        kind = _TEXT[self._open["type"]][0]
        more = {"annotations": [], "logprobs": [*self._logprobs]} if kind == "output_text" else {}
        return {"type": kind, "text": text, **more}

    def _of_item(self, name: str, **fields: Any) -> ResponseEvent:
        assert self._open is not None
        return self._event(name, item_id=self._open["id"], output_index=len(self.output) - 1, **fields)

    def _event(self, name: str, **fields: Any) -> ResponseEvent:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": name, "sequence_number": number, **fields}
