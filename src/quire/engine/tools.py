"""What a chat asks of its answers beside their text: tools, reasoning; and how answers are then held and read."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from quire.engine.inputs import InputProcessor
from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.structured_params import FIELD, StructuredOutputsParams
from quire.text.parsers.answer import AnswerFormat
from quire.text.parsers.events import Asked, CallArguments, CallEnd, CallStart, Content, Event, Reasoning, Tool, joined
from quire.text.parsers.reader import AnswerParser
from quire.text.tokenizer import Tokenizer

__all__ = [
    "AnswerFormat",
    "AnswerParser",
    "Asked",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Content",
    "Event",
    "HeldAnswer",
    "Reasoning",
    "Tool",
    "check_held",
    "hold",
    "is_known_good",
    "joined",
    "read_tools",
]
PROMPT_END = 64
"""Tokens of a prompt in which it is seen whether it ends inside reasoning."""


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """How the answers to one prompt are held, and read."""

    params: SamplingParams
    asked: Asked
    make_parser: Callable[[], AnswerParser] | None = None
    """Reads the text of one answer; None: there are neither calls nor reasoning, and the text is the answer."""
    shape: StructuredOutputsParams | None = None
    """Of the content, where other parts are held beside it."""


def read_tools(given: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], tuple[Tool, ...]]:
    """Tools in OpenAI's form, `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`: as
    chat templates show them, and as answers are held to them.

    Raises:
        InvalidRequestError: naming the place.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise InvalidRequestError("tools must be a list", param="tools")
    shown: list[dict[str, Any]] = []
    found: dict[str, Tool] = {}
    for place, item in enumerate(given):
        function = item.get("function") if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or item.get("type", "function") != "function":
            raise _bad(f"tools[{place}]", "must be an object of type function")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name:
            raise _bad(f"tools[{place}].function.name", "must be a text that is not empty")
        if name in found:
            raise _bad(f"tools[{place}].function.name", f"is {name[:64]!r}, as of another tool")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise _bad(f"tools[{place}].function.parameters", "must be a JSON schema of an object")
        if parameters and parameters.get("type", "object") != "object":
            kind = str(parameters["type"])[:64]
            raise _bad(f"tools[{place}].function.parameters", f"must be of type object, not {kind}")
        described = {} if function.get("description") is None else {"description": function["description"]}
        schema = {"type": "object", "properties": {}} if parameters is None else parameters
        shown.append({"type": "function", "function": {"name": name, **described, "parameters": schema}})
        found[name] = Tool(name, parameters, function.get("strict") is True)
    return shown, tuple(found.values())


def hold(
    tokenizer: Tokenizer, answers: AnswerFormat, asked: Asked, prompt_token_ids: Sequence[int], params: SamplingParams
) -> HeldAnswer:
    """Hold answers to what is asked: calls to the parameters of their tools, content behind the reasoning to the shape
    of `params`.

    Raises:
        InvalidRequestError: what this model's format cannot hold.
    """
    end = tokenizer.decode(prompt_token_ids[-PROMPT_END:], skip_special_tokens=False)
    in_reasoning, may_reason = answers.starts_in_reasoning(end), answers.may_reason(end)
    if asked.reasoning_budget is not None and answers.reasoning is None:
        text = "thinking_token_budget: the answers of this model hold no reasoning between markers"
        raise InvalidRequestError(text, param="thinking_token_budget")
    if not asked.tools and not in_reasoning and not may_reason:
        return HeldAnswer(params, asked)
    shape = params.structured_outputs
    if shape is not None and shape.structural_tag is not None:
        if asked.tools:
            raise InvalidRequestError(f"{FIELD}.structural_tag and tools both hold calls: send one", param=FIELD)
        if not _is_plain_tag(shape.structural_tag):
            return HeldAnswer(params, asked)
    then = None if shape is None else _as_format(shape)
    asked = replace(asked, in_reasoning=in_reasoning, may_reason=may_reason, then=then)
    tag = answers.structural_tag(asked)
    held = replace(params, structured_outputs=shape if tag is None else _as_shape(tag, shape))
    if answers.special_tokens:  # markers are; the parser takes all others out
        held = replace(held, skip_special_tokens=False, spaces_between_special_tokens=False)
    return HeldAnswer(held, asked, partial(answers.parser, asked), shape)


def is_known_good(inputs: InputProcessor, params: SamplingParams) -> bool:
    """Whether it is known that a shape can be held: nothing is compiled."""
    if not inputs.knows_shape(params):
        return False
    try:
        inputs.grammar_source(params)
    except InvalidRequestError:
        return False
    return True


def check_held(inputs: InputProcessor, answers: AnswerFormat, held: HeldAnswer, names: Sequence[str]) -> None:
    """Compile what answers are held to.

    Args:
        names: of all tools, in the order of the request.

    Raises:
        InvalidRequestError: it does not compile; where the shape or the parameters of a tool are at fault, it names
            them.
    """
    try:
        inputs.grammar_source(held.params)
    except InvalidRequestError:
        if held.shape is not None:
            inputs.grammar_source(replace(held.params, structured_outputs=held.shape))
        for place, tool in enumerate(map(held.asked.tool, names)):
            if tool is None:
                continue
            alone = answers.structural_tag(Asked((tool,), must_call=True))
            for shape in ({"json": tool.schema}, {"structural_tag": alone}):
                params = replace(held.params, structured_outputs=StructuredOutputsParams(**shape))
                _check_tool(inputs, params, f"tools[{place}].function.parameters")
        raise


def _check_tool(inputs: InputProcessor, params: SamplingParams, place: str) -> None:
    try:
        inputs.grammar_source(params)
    except InvalidRequestError as error:
        text = re.sub(rf"^{FIELD}\.\w+\W*", "", error.message)
        raise _bad(place, f"cannot be held: {text}") from error


def _is_plain_tag(tag: str | Mapping[str, Any]) -> bool:
    """Whether it can be a part of another: one with names or a bound of its own says all of the answer."""
    try:
        value = json.loads(tag) if isinstance(tag, str) else tag
    except (ValueError, RecursionError):  # it is refused where it is compiled
        return False
    return isinstance(value, Mapping) and not value.keys() & {"definitions", "reasoning"}


def _as_shape(tag: dict[str, Any], then: StructuredOutputsParams | None) -> StructuredOutputsParams:
    """The tag of all, with what was said of white space beside a tag in it."""
    options = _options(then) if then is not None and then.structural_tag is not None else {}
    try:
        return StructuredOutputsParams(structural_tag=tag, **options)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"tools and shape together are too large: {error.message}", param="tools") from error


def _as_format(shape: StructuredOutputsParams) -> dict[str, Any]:
    """A shape as a structural tag holds content to it."""
    if shape.choice is not None:
        choices = cast(Sequence[str], shape.choice)
        return {"type": "or", "elements": [{"type": "const_string", "value": one} for one in choices]}
    if shape.regex is not None:
        return {"type": "regex", "pattern": shape.regex}
    if shape.grammar is not None:
        return {"type": "grammar", "grammar": shape.grammar}
    if shape.structural_tag is not None:
        return {**_json(str(shape.structural_tag), shape.kind), "type": "structural_tag"}
    schema = shape.json if shape.yaml is None else shape.yaml
    options = _options(shape) | ({} if shape.yaml is None else {"style": "yaml"})
    held = {"type": "object"} if schema is None else _json(str(schema), shape.kind)
    return {"type": "json_schema", "json_schema": held, **options}


def _options(shape: StructuredOutputsParams) -> dict[str, Any]:
    names = ("disable_additional_properties", "disable_any_whitespace", "whitespace_pattern")
    return {name: getattr(shape, name) for name in names if getattr(shape, name)}


def _json(text: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{FIELD}.{kind}: is no JSON: {str(error)[:200]}", param=FIELD) from None


def _bad(place: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{place} {text}", param=place)
