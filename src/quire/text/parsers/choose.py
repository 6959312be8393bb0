"""Which format a model's answers have, seen from its chat template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quire.errors import InvalidRequestError, unknown_name_message
from quire.text.parsers.answer import AnswerFormat, ToolFormat
from quire.text.parsers.json_calls import BareJson, MarkedJson
from quire.text.parsers.reasoning import Thinking
from quire.text.parsers.tags import Marker

Mark = Callable[[str], Marker]


@dataclass(frozen=True, slots=True)
class _Known:
    """A format and what, in a template, tells of it: all of `seen`."""

    seen: tuple[str, ...]
    make: Callable[[Mark, str], ToolFormat]


def _hermes(mark: Mark, template: str) -> ToolFormat:
    return MarkedJson("hermes", mark("<tool_call>"), mark("</tool_call>"), "\n", "\n")


def _plain(mark: Mark, template: str) -> ToolFormat:
    return BareJson("json", ('{"name": NAME, "arguments": ', '{"name":NAME,"arguments":'), "\n")


TOOL_FORMATS: Mapping[str, _Known] = {
    "hermes": _Known(("<tool_call>",), _hermes),
    "json": _Known((), _plain),
}
"""By name; the first that a template tells of is taken."""
REASONING_FORMATS: Mapping[str, tuple[str, str]] = {
    "qwen3": ("<think>", "</think>"),
    "deepseek_r1": ("<think>", "</think>"),
}


def choose(
    template: str | None,
    special: Mapping[str, int],
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> AnswerFormat:
    """The format of a model's answers.

    Args:
        template: its chat template, that for tools where it has several.
        special: its special tokens, with their ids.
        tool_call_parser, reasoning_parser: names that are to be taken; None to see it from the template.

    Raises:
        InvalidRequestError: an unknown name.
    """
    text = template or ""

    def mark(marker: str) -> Marker:
        return Marker(marker, special.get(marker))

    tools, why_tools = _tools(text, mark, tool_call_parser)
    reasoning, why_reasoning = _reasoning(text, mark, reasoning_parser)
    return AnswerFormat(
        tools, reasoning, f"{why_tools}; {why_reasoning}", tuple(special), describes_tools="tools" in text
    )


def _tools(text: str, mark: Mark, name: str | None) -> tuple[ToolFormat, str]:
    if name is not None:
        if name not in TOOL_FORMATS:
            raise InvalidRequestError(
                unknown_name_message("tool_call_parser", name, list(TOOL_FORMATS)), param="tool_call_parser"
            )
        return TOOL_FORMATS[name].make(mark, text), f"{name}: --tool-call-parser says so"
    for known_name, known in TOOL_FORMATS.items():
        if known.seen and all(one in text for one in known.seen):
            return known.make(mark, text), f"{known_name}: the chat template writes {known.seen[0]}"
    return _plain(mark, text), "json: the chat template " + ("marks no calls" if text else "is missing")


def _reasoning(text: str, mark: Mark, name: str | None) -> tuple[Thinking | None, str]:
    if name == "none":
        return None, "no reasoning: --reasoning-parser says so"
    if name is not None:
        if name not in REASONING_FORMATS:
            known = [*REASONING_FORMATS, "none"]
            raise InvalidRequestError(unknown_name_message("reasoning_parser", name, known), param="reasoning_parser")
        why = f"reasoning {name}: --reasoning-parser says so"
    else:
        name = next((one for one, (_, end) in REASONING_FORMATS.items() if end in text), None)
        if name is None:
            return None, "no reasoning: the chat template has none"
        why = f"reasoning {name}: the chat template has {REASONING_FORMATS[name][1]}"
    begin, end = REASONING_FORMATS[name]
    return Thinking(name, mark(begin), mark(end)), why
