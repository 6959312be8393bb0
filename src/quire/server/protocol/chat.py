"""The body of POST /v1/chat/completions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError, unknown_name_message
from quire.sampling_params import SamplingParams
from quire.server.limits import Limits
from quire.server.protocol.fields import CHAT, flag, take
from quire.server.protocol.sampling import ResponseOptions, make_params, take_options

ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_FIELDS = ("role", "content", "name")
_EMPTY_ONLY = ("tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning", "tool_call_id")
"""Fields that answers of other servers carry; a client that sends history back may hold them empty."""
_TEMPLATE_OWN = frozenset(
    {
        "messages",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "tools",
        "documents",
        "add_special_tokens",
        "self",
    }
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template makes a prompt of."""

    messages: list[dict[str, str]]
    add_generation_prompt: bool
    continue_final_message: bool
    template: str | None
    """Instead of the model's own."""
    documents: list[dict[str, Any]]
    add_special_tokens: bool
    template_arguments: dict[str, Any]

    @property
    def ends_with_assistant(self) -> bool:
        """True when the last message is the assistant's own."""
        return self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One parsed request."""

    conversation: Conversation
    params: SamplingParams
    options: ResponseOptions
    top_logprobs: int | None
    """None: no logprobs; 0: the chosen tokens' only."""
    wants_prompt_logprobs: bool
    wants_prompt_text: bool
    echoed: str
    """Stands before the answer: with `echo`, a last message of the assistant."""


def parse_chat(body: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> ChatCall:
    """Check everything that can be checked without the model.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    taken = take(body, CHAT, limits)
    options = take_options(taken)
    conversation = take_conversation(taken, limits)
    echo, wants_prompt_text = flag(taken, "echo", False), flag(taken, "return_prompt_text", False)
    top_logprobs = _top_logprobs(taken)
    overrides: dict[str, Any] = {"logprobs": top_logprobs, "max_tokens": taken.get("max_tokens")}
    try:
        params = make_params(taken, defaults, stream=options.stream, overrides=overrides)
    except InvalidRequestError as error:
        if error.param == "logprobs":  # here the count has another name
            raise InvalidRequestError("top_" + error.message, param="top_logprobs") from error
        raise
    if params.n > limits.sequences.value:
        raise limits.sequences.error(str(params.n))
    return ChatCall(
        conversation,
        params,
        options,
        top_logprobs,
        wants_prompt_logprobs=params.prompt_logprobs is not None,
        wants_prompt_text=wants_prompt_text,
        echoed=conversation.messages[-1]["content"] if echo and conversation.ends_with_assistant else "",
    )


def take_conversation(taken: dict[str, Any], limits: Limits) -> Conversation:
    """Take messages and the template's options out of `taken`.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    messages = _messages(taken.pop("messages", None), limits)
    continue_final = flag(taken, "continue_final_message", False)
    add_prompt = flag(taken, "add_generation_prompt", not continue_final)
    arguments = _template_arguments(taken.pop("chat_template_kwargs", {}), limits)
    conversation = Conversation(
        messages,
        add_prompt,
        continue_final,
        _template(taken.pop("chat_template", None), limits),
        _documents(taken.pop("documents", []), limits),
        flag(taken, "add_special_tokens", False),
        arguments,
    )
    if continue_final and add_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
    if continue_final and not conversation.ends_with_assistant:
        raise InvalidRequestError(
            "continue_final_message needs a last message of the assistant", param="continue_final_message"
        )
    return conversation


def _top_logprobs(taken: dict[str, Any]) -> int | None:
    wanted = flag(taken, "logprobs", False)
    count: Any = taken.pop("top_logprobs", None)
    if count is not None and not wanted:
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if isinstance(count, bool):
        raise InvalidRequestError("top_logprobs must be a whole number, got bool", param="top_logprobs")
    if not wanted:
        return None
    checked: int = 0 if count is None else count  # SamplingParams checks type and range
    return checked


def _messages(value: Any, limits: Limits) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InvalidRequestError("messages must be a list that is not empty", param="messages")
    if len(value) > limits.messages.value:
        raise limits.messages.error(f"{len(value):,}")
    return [_message(f"messages[{index}]", item, limits) for index, item in enumerate(value)]


def _message(place: str, item: Any, limits: Limits) -> dict[str, str]:
    if not isinstance(item, dict):
        raise InvalidRequestError(f"{place} must be an object", param=place)
    for name, value in item.items():
        if name in _EMPTY_ONLY:
            if value not in (None, [], ""):
                raise InvalidRequestError(
                    f"{place}.{name} is not supported: tool calling and audio are not in this version",
                    param=f"{place}.{name}",
                )
        elif name not in _MESSAGE_FIELDS:
            text = unknown_name_message("field", f"{place}.{name[:64]}", [f"{place}.{k}" for k in _MESSAGE_FIELDS])
            raise InvalidRequestError(text, param=f"{place}.{name[:64]}")
    role = item.get("role")
    if role not in ROLES:
        raise InvalidRequestError(f"{place}.role must be one of {', '.join(ROLES)}", param=f"{place}.role")
    # Few templates know the newer name of the system role.
    message = {
        "role": "system" if role == "developer" else role,
        "content": _content(f"{place}.content", item.get("content"), limits),
    }
    name = item.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise InvalidRequestError(f"{place}.name must be a string", param=f"{place}.name")
        message["name"] = name
    return message


def _content(place: str, content: Any, limits: Limits) -> str:
    """A string, or text parts, which are joined by line ends as vLLM joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequestError(f"{place} must be a string or a list of text parts", param=place)
    if len(content) > limits.content_parts.value:
        raise limits.content_parts.error(f"{len(content):,}")
    texts: list[str] = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
            named = f" of type {kind[:32]!r}" if isinstance(kind, str) and kind != "text" else ""
            raise InvalidRequestError(
                f'{place}[{index}]{named} is not supported: this server reads {{"type": "text", "text": ...}} only',
                param=f"{place}[{index}]",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _template(value: Any, limits: Limits) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError("chat_template must be a string", param="chat_template")
    if value is not None and len(value) > limits.chat_template_characters.value:
        raise limits.chat_template_characters.error(f"{len(value):,}")
    return value


def _documents(value: Any, limits: Limits) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidRequestError("documents must be a list of objects", param="documents")
    if len(value) > limits.documents.value:
        raise limits.documents.error(f"{len(value):,}")
    for item in value:
        if not all(isinstance(text, str) for text in item.values()):
            raise InvalidRequestError("documents must hold strings by name", param="documents")
    return value


def _template_arguments(value: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequestError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    if len(value) > limits.template_arguments.value:
        raise limits.template_arguments.error(str(len(value)))
    for name in value:
        if name in _TEMPLATE_OWN or not name.isidentifier() or name.startswith("_") or len(name) > 64:
            raise InvalidRequestError(f"chat_template_kwargs may not set {name[:64]!r}", param="chat_template_kwargs")
    if _depth_exceeds(value, limits.template_argument_depth.value):
        raise limits.template_argument_depth.error()
    return value


def _depth_exceeds(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_depth_exceeds(item, levels - 1) for item in inner)
