"""Which format a model's answers have, seen from its chat template."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quire.errors import InvalidRequestError, unknown_name_message
from quire.text.parsers.answer import AnswerFormat, ToolFormat
from quire.text.parsers.harmony import NAMES as HARMONY_MARKS
from quire.text.parsers.harmony import Harmony
from quire.text.parsers.json_calls import BareJson, MarkedJson
from quire.text.parsers.named_json import NamedJson
from quire.text.parsers.parameters import Gemma, Pythonic, QwenXml
from quire.text.parsers.reasoning import Thinking
from quire.text.parsers.tags import Marker

Mark = Callable[[str], Marker]


@dataclass(frozen=True, slots=True)
class _Known:
    """A format, and what in a template tells of it: all texts of one of `seen`."""

    make: Callable[[Mark, str], ToolFormat]
    seen: tuple[tuple[str, ...], ...] = ()


def _harmony(mark: Mark, template: str) -> ToolFormat:
    return Harmony({name: mark(name) for name in HARMONY_MARKS})


def _gemma(mark: Mark, template: str) -> ToolFormat:
    return Gemma(mark("<start_function_call>"), mark("<end_function_call>"), mark("<escape>"))


def _deepseek(name: str, kind: str, before: str, after: str, separator: str) -> Callable[[Mark, str], ToolFormat]:
    def make(mark: Mark, template: str) -> ToolFormat:
        section, call = "<｜tool▁calls▁{}｜>", "<｜tool▁call▁{}｜>"
        return NamedJson(
            name, mark(call.format("begin")), mark("<｜tool▁sep｜>"), mark(call.format("end")), kind, before, after,
            separator, mark(section.format("begin")), mark(section.format("end")),
        )  # fmt: skip

    return make


def _mistral(mark: Mark, template: str) -> ToolFormat:
    if "[ARGS]" in template:
        return NamedJson("mistral", mark("[TOOL_CALLS]"), mark("[ARGS]"))
    return MarkedJson("mistral", mark("[TOOL_CALLS]"), is_list=True, has_ids=True)


def _phi4(mark: Mark, template: str) -> ToolFormat:
    if "functools[" in template:
        return MarkedJson("phi4_mini", Marker("functools["), is_list=True)
    return MarkedJson("phi4_mini", mark("<|tool_call|>"), mark("<|/tool_call|>"), is_list=True)


def _bare(name: str, key: str, separator: str, *more: str) -> Callable[[Mark, str], ToolFormat]:
    openings = (f'{{"name": NAME, "{key}": ', f'{{"name":NAME,"{key}":', *more)
    return lambda mark, template: BareJson(name, openings, separator)


def _hermes(mark: Mark, template: str) -> ToolFormat:
    return MarkedJson("hermes", mark("<tool_call>"), mark("</tool_call>"), "\n", "\n")


TOOL_FORMATS: Mapping[str, _Known] = {
    "openai": _Known(_harmony, (("<|channel|>",),)),
    "functiongemma": _Known(_gemma, (("<start_function_call>",),)),
    "deepseek_v3": _Known(
        _deepseek("deepseek_v3", "function", "\n```json\n", "\n```", "\n"), (("<｜tool▁sep｜>", "```json"),)
    ),
    "deepseek_v31": _Known(_deepseek("deepseek_v31", "", "", "", ""), (("<｜tool▁sep｜>",),)),
    "qwen3_coder": _Known(
        lambda mark, _: QwenXml(mark("<tool_call>"), mark("</tool_call>")), (("<function=", "<parameter="),)
    ),
    "mistral": _Known(_mistral, (("[TOOL_CALLS]",),)),
    "granite": _Known(
        lambda mark, _: MarkedJson("granite", mark("<|tool_call|>"), is_list=True),
        (("<|tool_call|>", "<|start_of_role|>"),),
    ),
    "granite-20b-fc": _Known(
        lambda mark, _: MarkedJson("granite-20b-fc", mark("<function_call>"), before=" "), (("<function_call>",),)
    ),
    "phi4_mini": _Known(_phi4, (("functools[",), ("<|tool|>",), ("<|tool_call|>",))),
    "hermes": _Known(_hermes, (("<tool_call>",),)),
    "llama4_pythonic": _Known(lambda mark, _: Pythonic(), (("<|python_start|>",), ("[func_name1(",))),
    "llama3_json": _Known(
        _bare("llama3_json", "parameters", "; ", '{"type": "function", "name": NAME, "parameters": '),
        (("<|python_tag|>",), ('"parameters": ', "<|eot_id|>")),
    ),
    "json": _Known(_bare("json", "arguments", "\n")),
}
"""By name; the first that a template tells of is taken."""
REASONING_FORMATS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "openai_gptoss": ("<|channel|>analysis<|message|>", "<|end|>", ("<|channel|>",)),
    "mistral": ("[THINK]", "[/THINK]", ("[THINK]",)),
    "granite": ("Here is my thought process:", "Here is my response:", ("Here is my thought process:",)),
    "granite_think": ("<think>", "</think>", ("</think>", "<response>")),
    "deepseek_r1": ("<think>", "</think>", ("</think>", "<｜Assistant｜>")),
    "qwen3": ("<think>", "</think>", ("</think>",)),
}
"""By name: what begins it, what ends it, and what in a template tells of it."""
_AROUND_ANSWERS: Mapping[str, tuple[str, ...]] = {"granite_think": ("<response>", "</response>")}


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
    reasoning, why_reasoning = _reasoning(text, mark, reasoning_parser, tools)
    return AnswerFormat(
        tools, reasoning, f"{why_tools}; {why_reasoning}", tuple(special), describes_tools="tools" in text
    )


def _tools(text: str, mark: Mark, name: str | None) -> tuple[ToolFormat, str]:
    if name is not None:
        if name not in TOOL_FORMATS:
            raise _unknown("tool_call_parser", name, list(TOOL_FORMATS))
        return TOOL_FORMATS[name].make(mark, text), f"{name}: --tool-call-parser says so"
    for known_name, known in TOOL_FORMATS.items():
        for seen in known.seen:
            if all(one in text for one in seen):
                return known.make(mark, text), f"{known_name}: the chat template has {' and '.join(seen)}"
    return TOOL_FORMATS["json"].make(mark, text), "json: the chat template " + (
        "marks no calls" if text else "is missing"
    )


def _unknown(field: str, name: str, known: list[str]) -> InvalidRequestError:
    text = f"{unknown_name_message(field, name, known)}; known are {', '.join(known)}"
    return InvalidRequestError(text, param=field)


def _reasoning(text: str, mark: Mark, name: str | None, tools: ToolFormat) -> tuple[Thinking | None, str]:
    if name == "none":
        return None, "no reasoning: --reasoning-parser says so"
    if name is not None:
        if name not in REASONING_FORMATS:
            raise _unknown("reasoning_parser", name, [*REASONING_FORMATS, "none"])
        why = f"reasoning {name}: --reasoning-parser says so"
    elif tools.is_whole:
        name = "openai_gptoss"
        why = f"reasoning {name}: it belongs to {tools.name}"
    else:
        name = next((one for one, (*_, seen) in REASONING_FORMATS.items() if all(part in text for part in seen)), None)
        if name is None:
            return None, "no reasoning: the chat template has none"
        why = f"reasoning {name}: the chat template has {' and '.join(REASONING_FORMATS[name][2])}"
    begin, end, _ = REASONING_FORMATS[name]
    return Thinking(name, mark(begin), mark(end), _AROUND_ANSWERS.get(name, ())), why
