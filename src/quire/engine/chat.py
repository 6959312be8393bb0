"""Conversations to token ids, checked: the same for the library and the server."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quire.engine.inputs import InputProcessor
from quire.errors import InvalidRequestError
from quire.text.chat.calls import calls_as_text, with_tools_text
from quire.text.chat.messages import RESERVED_NAMES, check_messages
from quire.text.parsers.answer import AnswerFormat
from quire.text.parsers.events import Tool
from quire.text.tokenizer import Tokenizer

MAX_MESSAGES = 4096
ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A role becomes part of the template's own markers, so it may hold nothing that could make one."""


def encode_chat(
    tokenizer: Tokenizer,
    inputs: InputProcessor,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answers: AnswerFormat | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_special_tokens: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation under the model's chat template, or under `chat_template`.

    Args:
        messages: each with `role` and `content` (text, or a list of `{"type": "text", "text": ...}`).
        add_generation_prompt: end with the beginning of the assistant's turn.
        continue_final_message: leave the last message open, for the model to continue.
        tools: what the model may call, as templates show it (see `quire.engine.tools.read_tools`).
        answers: the format of the model's answers; it says whether the template tells of tools.
        documents: what the template may show the model beside the messages.
        add_special_tokens: add what the tokenizer adds to a raw prompt.

    Raises:
        InvalidRequestError: naming the field.
    """
    check_messages(messages)
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages may hold at most {MAX_MESSAGES}, got {len(messages)}", param="messages")
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise InvalidRequestError(
                "messages must hold objects with a role of at most 64 letters, digits, '-' and '_'", param="messages"
            )
    for name in chat_template_kwargs or ():
        if name in RESERVED_NAMES:
            raise InvalidRequestError(f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs")
    inputs.check_text_size("".join(texts_in([*messages, *(documents or ()), *(tools or ())])))
    given = _as_shown(tokenizer, [dict(message) for message in messages], tools or (), answers, chat_template)
    token_ids = tokenizer.apply_chat_template(
        given,
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        chat_template=chat_template,
        tools=tools or None,
        documents=documents,
        add_special_tokens=add_special_tokens,
        **(chat_template_kwargs or {}),
    )
    assert isinstance(token_ids, list)
    inputs.check_encoded(token_ids, "messages")
    return token_ids


def _as_shown(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    answers: AnswerFormat | None,
    chat_template: str | None,
) -> list[dict[str, Any]]:
    """Messages that say what the template does not: which tools there are, earlier calls and what they gave."""
    if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
        messages = messages if tokenizer.shows_calls(chat_template) else calls_as_text(messages)
    if not tools or answers is None:
        return messages
    functions = [tool["function"] for tool in tools]
    descriptions = {one["name"]: one.get("description", "") for one in functions}
    text = answers.tools_text([Tool(one["name"], one["parameters"]) for one in functions], descriptions)
    return messages if text is None else with_tools_text(messages, text)


def texts_in(value: Any) -> list[str]:
    """Every string in a message, wherever it stands."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in texts_in(item)]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for item in value for text in texts_in(item)]
    return []
