"""Tool calls of earlier turns, in the form that a template reads.

Clients send OpenAI's messages: arguments as JSON text, content that is null. Templates differ: most want arguments as
an object, some as text; some look for content that is none, or "", or missing; some take ids of nine characters alone.
Which form one reads is found by rendering a small conversation in each.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from quire.errors import InvalidRequestError
from quire.text.chat.messages import plain_data

SHORT_ID = 9
"""Characters of an id that Mistral's templates take."""
MOST_CPU_SECONDS = 1.0
"""For looking at one template."""
_NONE: Mapping[str, Any] = {"content": None}
CONTENTS: tuple[Mapping[str, Any], ...] = ({}, _NONE, {"content": ""})
_NAME, _KEY, _VALUE, _RESULT = "probe_of_calls", "first_key", "second value", "third result"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template reads an assistant's calls."""

    short_ids: bool
    text_arguments: bool
    """Arguments are JSON text; otherwise an object."""
    content: Mapping[str, Any]
    """Of a turn that holds calls and no text."""


FORMS = tuple(
    CallForm(short_ids, text_arguments, content)
    for short_ids, text_arguments, content in product((False, True), (False, True), CONTENTS)
)
"""The first is what transformers' guide asks of templates."""


def arguments_of(function: Any, place: str) -> dict[str, Any]:
    """The arguments of one call, from JSON text or an object.

    Raises:
        InvalidRequestError: neither, with the place.
    """
    named = f"{place}.function.arguments"
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{named} is no JSON: {str(error)[:100]}", param="messages") from None
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(f"{named} must be the JSON text of an object, or an object", param="messages")
    plain: dict[str, Any] = plain_data(arguments)  # text may nest deeper than what was looked at
    return plain


def with_calls(messages: list[dict[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """The same messages, with calls in `form`.

    Raises:
        InvalidRequestError: a call that is none, with its place.
    """
    return [_with_calls(message, form, f"messages[{place}]") for place, message in enumerate(messages)]


def calls_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a template that knows neither calls nor their results: the assistant said JSON, a line for each
    call, and one message of the user tells what they gave.

    Raises:
        InvalidRequestError: a call that is none, with its place.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    last_role = ""
    for message in with_calls(messages, FORMS[0]):
        calls, text = message.pop("tool_calls", None) or (), _text_of(message.get("content"))
        names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        if calls:
            said = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            message = {**message, "content": "\n".join([*([text] if text else []), *said])}
        elif message.get("role") == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "the function")
            told = f"{name} gave: {text}"
            if last_role == "tool":
                told = f"{found.pop()['content']}\n{told}"
            last_role, message = "tool", {"role": "user", "content": told}
            found.append(message)
            continue
        last_role = str(message.get("role"))
        found.append(message)
    return found


def with_tools_text(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The same with `text` at the end of the system's message, or as one."""
    first = messages[0]
    if first.get("role") != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{_text_of(first.get('content'))}\n\n{text}"}, *messages[1:]]


def _text_of(content: Any) -> str:
    """Content as one text; parts, a line each."""
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""


def _with_calls(message: dict[str, Any], form: CallForm, place: str) -> dict[str, Any]:
    changed = dict(message)
    if form.short_ids and isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _short(message["tool_call_id"])
    if not message.get("tool_calls"):
        return changed
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{place}.tool_calls must be a list of calls", param="messages")
    changed["tool_calls"] = [_call(call, form, f"{place}.tool_calls[{at}]") for at, call in enumerate(calls)]
    if not message.get("content"):
        changed.pop("content", None)
        changed.update(form.content)
    return changed


def _call(call: Any, form: CallForm, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequestError(f"{place} must be an object whose function has a name", param="messages")
    arguments: Any = arguments_of(function, place)
    if form.text_arguments:
        given = function.get("arguments")
        arguments = given if isinstance(given, str) and given.strip() else json.dumps(arguments, ensure_ascii=False)
    given_id = call.get("id")
    ids = {"id": _short(given_id) if form.short_ids else given_id} if isinstance(given_id, str) else {}
    return {"type": "function", **ids, "function": {**function, "arguments": arguments}}


def _short(call_id: str) -> str:
    """An id of nine letters and digits: itself where it is one, else a digest."""
    if len(call_id) == SHORT_ID and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:SHORT_ID]


def form_of(render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]) -> CallForm | None:
    """The first form in which a template shows a call; None: in none, so it knows nothing of calls.

    Args:
        render: messages and tools to text, or `InvalidRequestError`.
    """
    end_s = time.thread_time() + MOST_CPU_SECONDS
    for form in FORMS:
        if time.thread_time() > end_s:
            break
        try:
            shown = render(with_calls(_probe(), form), _TOOLS)
        except InvalidRequestError:
            continue
        if _shows_call(shown, form):
            return form
    return None


def _probe() -> list[dict[str, Any]]:
    call = {"id": "call_0123456789", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    return [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0123456789", "name": _NAME, "content": _RESULT},
    ]


_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "another_tool",
            "description": "Another tool.",
            "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}},
        },
    }
]


def _shows_call(text: str, form: CallForm) -> bool:
    """With name, arguments and result; neither arguments as Python writes them, or as JSON in JSON, nor its None."""
    if any(part not in text for part in (_NAME, _KEY, _VALUE, _RESULT)):
        return False
    return f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text and ("None" not in text or form.content != _NONE)
