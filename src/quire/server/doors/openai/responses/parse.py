"""From a body of /v1/responses to the chat that it asks for.

A response is a chat whose messages are items. Its fields become those of a chat, which checks them; what that refuses
is said in the words of this API.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.server.doors.openai.parse import ChatCall, parse_chat
from quire.server.doors.openai.responses.bodies import (
    INPUT_TOKENS,
    RESPONSE,
    InputItem,
    ResponseBody,
    ResponseToolChoice,
)
from quire.server.doors.openai.responses.items import Item, checked_items, messages_of, with_types
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits

_RENAMED = (
    (r"\bresponse_format\.json_schema\b", "text.format"),
    (r"\bresponse_format\b", "text.format"),
    (r"\bmessages\b", "input"),
    (r"\bmax_tokens\b", "max_output_tokens"),
    (r"\b(tools\[\d+\])\.function\b", r"\1"),
    (r"\btool_choice\.function\b", "tool_choice"),
    (r"\btool_choice\.allowed_tools\b", "tool_choice"),
    (r"\breasoning_effort\b", "reasoning.effort"),
    (r"(?<!text\.)\bverbosity\b", "text.verbosity"),
)
_LOGPROBS = "message.output_text.logprobs"


@contextmanager
def in_our_words() -> Iterator[None]:
    """Let what a chat refuses name the fields of this API."""
    try:
        yield
    except InvalidRequestError as error:
        error.args = (_renamed(error.message),)
        error.message, error.param = _renamed(error.message), error.param and _renamed(error.param)
        raise
    except ApiError as error:
        error.message, error.param = _renamed(error.message), error.param and _renamed(error.param)
        raise


def _renamed(text: str) -> str:
    for old, new in _RENAMED:
        text = re.sub(old, new, text)
    return text


def parse_response(raw: Mapping[str, Any], limits: Limits) -> tuple[ResponseBody, list[Item]]:
    """The body, and its input as items.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    body = RESPONSE.read(_typed(raw), limits)
    given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input or []
    items = checked_items(given, "input")
    if not items and body.previous_response_id is None and body.conversation is None:
        raise InvalidRequestError("input is required and must be a string or a list of items, not empty", param="input")
    if body.previous_response_id is not None and body.conversation is not None:
        text = "previous_response_id and conversation both say what came before: send one"
        raise InvalidRequestError(text, param="conversation")
    if body.background and not body.store:
        raise InvalidRequestError("background needs store: true, or no answer could be retrieved", param="background")
    if body.stream_options is not None and not body.options.stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        text = "stream_options.include_obfuscation is not supported: nothing is obfuscated here"
        raise InvalidRequestError(text, param="stream_options")
    if "top_logprobs" in body.sampling and _LOGPROBS not in (body.include or ()):
        if body.sampling["top_logprobs"] != 0 or type(body.sampling["top_logprobs"]) is not int:
            raise InvalidRequestError(f"top_logprobs needs {_LOGPROBS} in include", param="top_logprobs")
        del body.sampling["top_logprobs"]
    return body, items


def parse_input(raw: Mapping[str, Any], limits: Limits) -> tuple[ResponseBody, list[Item]]:
    """The same of a body that asks for the tokens of its input alone: a response that is not made.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    INPUT_TOKENS.read(_typed(raw), limits)
    known = {name: value for name, value in raw.items() if name != "personality"}
    return parse_response({**known, "store": False}, limits)


def _typed(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**raw, "input": with_types(raw["input"])} if "input" in raw else raw


def chat_of(body: ResponseBody, items: Sequence[Item], defaults: SamplingParams, limits: Limits) -> ChatCall:
    """The chat that a body and all the items of its input ask for.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    if len(items) > limits.input_items.value:
        raise limits.input_items.error(f"{len(items):,}")
    first = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    options: dict[str, Any] = msgspec.to_builtins(body.options)
    raw: dict[str, Any] = {
        **{name: value for name, value in options.items() if value is not None},
        **{name: value for name, value in body.sampling.items() if name != "max_output_tokens"},
        "messages": first + messages_of(items),
        "tools": [_tool(msgspec.structs.asdict(tool)) for tool in body.tools],
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "include_reasoning": body.include_reasoning,
        "thinking_token_budget": body.thinking_token_budget,
        "max_tokens": body.sampling.get("max_output_tokens"),
        "logprobs": _LOGPROBS in (body.include or ()),
        "stream": body.options.stream or body.background,
    }
    if body.text is not None:
        raw |= {"verbosity": body.text.verbosity, **_format(body.text.format)}
    if body.reasoning is not None:
        raw["reasoning_effort"] = body.reasoning.effort
    with in_our_words():
        return parse_chat(raw, defaults, limits)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _choice(choice: str | ResponseToolChoice) -> Any:
    if isinstance(choice, str):
        return choice
    if choice.type == "function":
        if choice.name is None or choice.tools is not None or choice.mode is not None:
            raise InvalidRequestError("tool_choice of type function must hold name alone", param="tool_choice")
        return {"type": "function", "function": {"name": choice.name}}
    if choice.tools is None or choice.mode is None or choice.name is not None:
        raise InvalidRequestError("tool_choice of type allowed_tools must hold mode and tools", param="tool_choice")
    named = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}


def _format(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """`text.format` as the `response_format` of a chat."""
    if given is None:
        return {}
    if given.get("type") != "json_schema":
        return {"response_format": given}
    named = {name: value for name, value in given.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": named}}
