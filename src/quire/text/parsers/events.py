"""What is asked of an answer, and what is found in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a tool that names none."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] | None = None
    """A JSON Schema of an object; None for a function without parameters."""
    strict: bool = False
    """Objects hold the named properties alone."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """Of the arguments: always one of an object."""
        if not self.parameters:
            return NO_PARAMETERS
        return self.parameters if "type" in self.parameters else {"type": "object", **self.parameters}


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks of its answers."""

    tools: tuple[Tool, ...] = ()
    """Those that may be called."""
    must_call: bool = False
    parallel: bool = True
    """Whether an answer may hold several calls."""
    in_reasoning: bool = False
    """The prompt ends inside the model's reasoning."""
    may_reason: bool = False
    """The answer may begin with reasoning."""
    reasoning_budget: int | None = None
    """Tokens of reasoning after which it is ended."""
    then: Mapping[str, Any] | None = None
    """What content must be, as a format of structural tags; None for any text."""

    def tool(self, name: str) -> Tool | None:
        """The one of this name."""
        return next((tool for tool in self.tools if tool.name == name), None)


@dataclass(frozen=True, slots=True)
class Content:
    """More of what is said to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    index: int
    """Counted from 0 in the answer."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of a call: joined, they are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments are whole. A call that was cut off has none."""

    index: int


Event = Content | Reasoning | CallStart | CallArguments | CallEnd


def joined(events: Sequence[Event]) -> list[Event]:
    """The same with neighbours of one kind made one: what does not depend on how the text came."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            found[-1] = CallArguments(event.index, last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        else:
            found.append(event)
    return found
