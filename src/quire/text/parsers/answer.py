"""The format of a model's answers: how its calls are written, and its reasoning."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quire.errors import InvalidRequestError
from quire.text.parsers.events import Asked, Tool
from quire.text.parsers.reader import AnswerParser, Reader, Step
from quire.text.parsers.reasoning import Thinking
from quire.text.parsers.tags import ANY_TEXT, Format, Marker, one_of, shared

_HOW_TO_CALL = """To call one, write a JSON object, on a line of its own and nothing after it:
{"name": <name of the function>, "arguments": <object of its arguments>}
"""


class ToolFormat(Protocol):
    """How calls are written."""

    @property
    def name(self) -> str:
        """As `--tool-call-parser` takes it."""

    @property
    def markers(self) -> tuple[Marker, ...]:
        """What the reader looks for."""

    @property
    def is_whole(self) -> bool:
        """Whether it says everything of an answer, its reasoning and `Asked.then` too."""

    def held(self, asked: Asked) -> Format:
        """Content and calls, as a structural tag's format."""

    def read(self, reader: Reader, asked: Asked) -> Step[None]:
        """Content and calls, to the end of the text."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What a model's answers look like, and why it is taken to be so.

    Args:
        special: all special tokens of the model: those that are no marker here are taken out of the text.
        describes_tools: whether the chat template tells the model of tools; where it does not, `tools_text` must.
    """

    tools: ToolFormat
    reasoning: Thinking | None
    reason: str
    special: tuple[str, ...] = ()
    describes_tools: bool = True

    @property
    def name(self) -> str:
        """Of the format of calls."""
        return self.tools.name

    @property
    def reasoning_name(self) -> str:
        """Of the format of reasoning; `none` without any."""
        return "none" if self.reasoning is None else self.reasoning.name

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens that the parser must see: with any, texts are detokenised with special tokens in them."""
        markers = (*self.tools.markers, *(() if self.reasoning is None else self.reasoning.markers))
        return tuple(dict.fromkeys(one.text for one in markers if one.token_id is not None))

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside the model's reasoning."""
        return self.reasoning is not None and self.reasoning.is_open(prompt)

    def may_reason(self, prompt: str) -> bool:
        """Whether the answer to a rendered prompt may hold reasoning."""
        return self.reasoning is not None and not self.reasoning.is_closed(prompt)

    def tools_text(self, tools: Sequence[Tool], descriptions: Mapping[str, str]) -> str | None:
        """What tells a model of tools in its system message; None where the chat template does.

        Args:
            descriptions: by name of the tool.
        """
        if self.describes_tools:
            return None
        lines = [
            {"name": tool.name, "description": descriptions.get(tool.name, ""), "parameters": tool.schema}
            for tool in tools
        ]
        how = _HOW_TO_CALL if self.name == "json" else ""
        listed = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        return f"You may call functions. {how}The functions, each with the JSON Schema of its arguments:\n{listed}"

    def structural_tag(self, asked: Asked) -> dict[str, Any] | None:
        """What the answer is held to, for `structured_outputs.structural_tag`; None where it may be any text.

        Raises:
            InvalidRequestError: a tool whose parameters are no object.
        """
        for tool in asked.tools:
            if tool.schema["type"] != "object":
                raise InvalidRequestError(f"the parameters of the tool {tool.name!r} must be an object", param="tools")
        reasoning = self.reasoning if asked.in_reasoning or asked.may_reason else None
        budget = reasoning.budget(asked) if reasoning is not None else None
        if not asked.tools and asked.then is None and budget is None:
            return None
        held, definitions = shared(self._held(asked, reasoning))
        found: dict[str, Any] = {"type": "structural_tag", "format": held}
        if definitions:
            found["definitions"] = definitions
        return found if budget is None else found | {"reasoning": budget}

    def _held(self, asked: Asked, reasoning: Thinking | None) -> Format:
        if self.tools.is_whole:
            return self.tools.held(asked)
        if asked.then is None:
            answer = self.tools.held(asked) if asked.tools else ANY_TEXT
        elif not asked.tools:
            answer = asked.then
        else:
            calls = self.tools.held(Asked(asked.tools, must_call=True, parallel=asked.parallel))
            answer = calls if asked.must_call else one_of([calls, asked.then])
        return answer if reasoning is None else reasoning.held(asked, answer)

    def parser(self, asked: Asked) -> AnswerParser:
        """For one answer."""
        is_either = asked.then is not None and not self.tools.is_whole
        reader = Reader((tool.name for tool in asked.tools), is_either=is_either)
        kept = self.special_tokens
        extra = () if self.reasoning is None else self.reasoning.dropped
        dropped = [*(one for one in self.special if one not in kept), *extra] if kept else extra
        return AnswerParser(reader, self._read(reader, asked), dropped)

    def _read(self, reader: Reader, asked: Asked) -> Step[None]:
        if self.reasoning is not None and not self.tools.is_whole and (asked.in_reasoning or asked.may_reason):
            yield from self.reasoning.read(reader, asked)
        yield from self.tools.read(reader, asked)
