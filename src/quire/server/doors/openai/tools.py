"""From the tools of a request and what it says of them to what its answers are asked for."""

from typing import Any

import msgspec

from quire.engine.tools import Asked, Tool, read_tools
from quire.errors import InvalidRequestError
from quire.server.answers.single import tool_named
from quire.server.doors.openai.bodies import ChatBody
from quire.server.doors.openai.conversation import AllowedTools, Conversation, ToolChoice
from quire.server.http.limits import Limits


def tools_of(conversation: Conversation) -> tuple[list[dict[str, Any]], tuple[Tool, ...]]:
    """Tools as templates show them, and as answers are held to them.

    Raises:
        InvalidRequestError: naming the place.
    """
    return read_tools([{"function": msgspec.structs.asdict(tool.function)} for tool in conversation.tools])


def check_tools(conversation: Conversation, limits: Limits) -> None:
    """Refuse tools that are too large; what they hold is read where it is needed.

    Raises:
        ApiError: naming the limit.
    """
    if not conversation.tools:
        return
    size = len(msgspec.json.encode(conversation.tools))
    if size > limits.tool_characters.value:
        raise limits.tool_characters.error(f"{size:,}")


def asked_of(body: ChatBody) -> Asked:
    """What the answers are asked for.

    Raises:
        InvalidRequestError: a choice that names no tool, or that needs tools.
    """
    tools, choice = tools_of(body.conversation)[1], body.tool_choice
    must_call, parallel = choice == "required", body.parallel_tool_calls
    if isinstance(choice, ToolChoice) and choice.type == "function":
        if choice.function is None or choice.allowed_tools is not None:
            raise _refused("of type function must hold function, with its name, and nothing else")
        tools = (tool_named(tools, choice.function.name, "tool_choice.function.name"),)
        must_call, parallel = True, False
    elif isinstance(choice, ToolChoice):
        if choice.allowed_tools is None or choice.function is not None:
            raise _refused("of type allowed_tools must hold allowed_tools, with mode and tools, and nothing else")
        tools = _allowed(tools, choice.allowed_tools)
        must_call = choice.allowed_tools.mode == "required"
    elif choice == "none":
        tools = ()
    if must_call and not tools:
        raise _refused(f"{choice} needs tools, and there are none")
    return Asked(tools, must_call=must_call, parallel=parallel, reasoning_budget=body.thinking_token_budget)


def _allowed(tools: tuple[Tool, ...], allowed: AllowedTools) -> tuple[Tool, ...]:
    place = "tool_choice.allowed_tools.tools"
    named = {
        item.function.name: tool_named(tools, item.function.name, f"{place}[{at}].function.name")
        for at, item in enumerate(allowed.tools)
    }
    return tuple(named.values())


def _refused(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"tool_choice {text}", param="tool_choice")
