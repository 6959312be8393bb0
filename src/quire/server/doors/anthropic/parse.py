"""From bodies to checked calls: what needs two fields, or a count that no type states."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.engine.tools import Asked, Tool, read_tools
from quire.errors import InvalidRequestError
from quire.sampling_params import FROM_MODEL, RequestOutputKind, SamplingParams
from quire.server.answers.single import Chat, tool_named
from quire.server.doors.anthropic.bodies import (
    COUNT,
    MESSAGES,
    BlockParam,
    Conversation,
    MessageParam,
    MessagesBody,
    TextBlockParam,
    ToolChoiceParam,
)
from quire.server.http.limits import Limits
from quire.server.http.schema import check_length
from quire.structured_params import StructuredOutputsParams

KINDS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "text": ("", ("text",), ()),
    "tool_use": ("assistant", ("id", "name", "input"), ("caller",)),
    "tool_result": ("user", ("tool_use_id",), ("content", "is_error")),
    "thinking": ("assistant", ("thinking",), ("signature",)),
}
"""Kind of a block -> the role that may hold it ("" for both), fields that it must have, others that it may have."""
_COMMON = ("type", "cache_control", "citations")
_NAMES = (
    ("thinking_token_budget", "thinking.budget_tokens"),
    ("structured_outputs.json", "output_config.format.schema"),
    ("structured_outputs", "output_config.format"),
    (".function.parameters", ".input_schema"),
    (".function.", "."),
)
"""What the engine calls a field -> what this API does."""
_PARAMS = {"prompt": "messages", "stop": "stop_sequences"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One parsed request."""

    model: str
    chat: Chat
    stream: bool
    shows_thinking: bool
    """Whether blocks of thinking are part of the answer."""
    omits_thinking: bool
    """They hold no text."""


@contextmanager
def in_own_names() -> Iterator[None]:
    """Let a refusal name the field of the body that it came from."""
    try:
        yield
    except InvalidRequestError as error:
        for theirs, ours in _NAMES:
            error.message = error.message.replace(theirs, ours)
            error.param = None if error.param is None else error.param.replace(theirs, ours)
        name = _PARAMS.get(error.param or "")
        if name is not None:
            error.message = name + error.message.removeprefix(error.param or "") if _begins(error) else error.message
            error.param = name
        error.args = (error.message,)
        raise


def _begins(error: InvalidRequestError) -> bool:
    return error.message.startswith(f"{error.param} ") or error.message.startswith(f"{error.param}[")


def parse_messages(raw: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> Call:
    """Check everything that can be checked without the model.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    with in_own_names():
        body = MESSAGES.read(raw, limits)
        thinking, conversation = body.conversation.thinking, body.conversation
        if thinking is not None and (thinking.budget_tokens or 0) >= body.max_tokens:
            text = f"thinking.budget_tokens must be less than max_tokens ({body.max_tokens})"
            raise InvalidRequestError(text, param="thinking.budget_tokens")
        params = _params(body, defaults, limits)
        return Call(
            model=conversation.model,
            chat=_chat(conversation, params, limits),
            stream=body.stream,
            shows_thinking=thinking is not None and thinking.type != "disabled",
            omits_thinking=thinking is not None and thinking.display == "omitted",
        )


def parse_count(raw: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> tuple[str, Chat]:
    """The model, and the conversation whose tokens are counted.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    with in_own_names():
        conversation = COUNT.read(raw, limits).conversation
        return conversation.model, _chat(conversation, defaults, limits)


def _params(body: MessagesBody, defaults: SamplingParams, limits: Limits) -> SamplingParams:
    stops = body.stop_sequences or []
    size = sum(map(len, stops))
    if size > limits.stop_characters.value:
        raise limits.stop_characters.error(f"{size:,}", "stop_sequences")
    values = {name: getattr(defaults, name) for name in FROM_MODEL} | body.sampling
    config = body.conversation.output_config
    if config is not None and config.format is not None:
        values["structured_outputs"] = StructuredOutputsParams(json=config.format.schema)
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams.from_mapping(
        {**values, "max_tokens": body.max_tokens, "stop": stops or None, "output_kind": kind}
    )


def _chat(conversation: Conversation, params: SamplingParams, limits: Limits) -> Chat:
    if conversation.tools:
        size = len(msgspec.json.encode(conversation.tools))
        if size > limits.tool_characters.value:
            raise limits.tool_characters.error(f"{size:,}")
    shown, tools = read_tools([_function(tool) for tool in conversation.tools])
    messages = [] if conversation.system is None else [{"role": "system", "content": _joined(conversation.system)}]
    messages += _messages(conversation.messages, limits)
    thinking, config = conversation.thinking, conversation.output_config
    if thinking is not None and (thinking.type == "enabled") != (thinking.budget_tokens is not None):
        text = "thinking.budget_tokens belongs to thinking of type enabled, which needs it"
        raise InvalidRequestError(text, param="thinking.budget_tokens")
    arguments: dict[str, Any] = {"enable_thinking": thinking is not None and thinking.type != "disabled"}
    if config is not None and config.effort is not None:
        arguments["reasoning_effort"] = config.effort
    return Chat(
        messages=messages,
        tools=shown,
        asked=_asked(conversation.tool_choice, tools, None if thinking is None else thinking.budget_tokens),
        params=params,
        template_arguments=arguments,
        continues=conversation.messages[-1].role == "assistant",
    )


def _function(tool: Any) -> dict[str, Any]:
    return {
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.input_schema,
            "strict": tool.strict,
        }
    }


def _asked(choice: ToolChoiceParam | None, tools: tuple[Tool, ...], budget: int | None) -> Asked:
    if choice is None:
        return Asked(tools, reasoning_budget=budget)
    if (choice.type == "tool") != (choice.name is not None):
        raise _refused(".name belongs to tool_choice of type tool, which needs it")
    if choice.type == "none":
        if choice.disable_parallel_tool_use is not None:
            raise _refused(".disable_parallel_tool_use does not belong to tool_choice of type none")
        tools = ()
    if choice.name is not None:
        tools = (tool_named(tools, choice.name, "tool_choice.name"),)
    must_call = choice.type in ("any", "tool")
    if must_call and not tools:
        raise _refused(f" of type {choice.type} needs tools, and there are none")
    parallel = choice.type != "tool" and not choice.disable_parallel_tool_use
    return Asked(tools, must_call=must_call, parallel=parallel, reasoning_budget=budget)


def _messages(turns: Sequence[MessageParam], limits: Limits) -> list[dict[str, Any]]:
    """As templates take them: a result is a message of its own, and neighbours of one role are one."""
    found: list[dict[str, Any]] = []
    called: set[str] = set()
    for place, turn in enumerate(turns):
        if isinstance(turn.content, str):
            _last(found, turn.role)["content"].append(turn.content)
            continue
        check_length(limits.content_parts, turn.content, "messages")
        for at, block in enumerate(turn.content):
            named = f"messages[{place}].content[{at}]"
            _check_block(block, turn.role, named)
            if block.type == "tool_result":
                if block.tool_use_id not in called:
                    text = f"{named}.tool_use_id is {(block.tool_use_id or '')[:64]!r}, which no tool_use before it has"
                    raise InvalidRequestError(text, param=f"{named}.tool_use_id")
                found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": [_result(block)]})
                continue
            message = _last(found, turn.role)
            if block.type == "text":
                message["content"].append(block.text)
            elif block.type == "thinking":
                message.setdefault("reasoning_content", []).append(block.thinking)
            else:
                called.add(block.id or "")
                function = {"name": block.name, "arguments": block.input}
                message.setdefault("tool_calls", []).append({"type": "function", "id": block.id, "function": function})
    if found[-1].get("tool_calls"):
        text = f"messages[{len(turns) - 1}] calls tools: a tool_result for each must follow"
        raise InvalidRequestError(text, param="messages")
    for message in found:  # joined once: to add each to those before it would take the square of their number
        for name, between in (("content", "\n"), ("reasoning_content", "")):
            if name in message:
                message[name] = between.join(filter(None, message[name]))
    return found


def _last(found: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """The message that goes on, or a new one."""
    if not found or found[-1]["role"] != role:
        found.append({"role": role, "content": []})
    return found[-1]


def _check_block(block: BlockParam, role: str, place: str) -> None:
    owner, needed, more = KINDS[block.type]
    if owner and role != owner:
        raise InvalidRequestError(f"{place} of type {block.type} belongs to the role {owner}", param=place)
    for name in block.__struct_fields__:
        value = getattr(block, name)
        if name in needed and value is None:
            raise InvalidRequestError(f"{place}.{name} is required in {block.type}", param=f"{place}.{name}")
        if value is not None and name not in (*needed, *more, *_COMMON):
            raise InvalidRequestError(f"{place}.{name} does not belong to {block.type}", param=f"{place}.{name}")


def _result(block: BlockParam) -> str:
    return ("Error: " if block.is_error else "") + _joined(block.content or "")


def _joined(content: str | list[TextBlockParam]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _refused(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"tool_choice{text}", param="tool_choice")
