"""Messages as chat templates take them: plain data, checked. No template is run here."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quire.errors import InvalidRequestError

RESERVED_NAMES = frozenset(
    "self messages tokenize add_generation_prompt continue_final_message chat_template tools documents "
    "add_special_tokens".split()
)
"""What no variable of a template that a caller sets may be called: each has a parameter of its own."""

_MAX_DEPTH = 64
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names clients use; templates read the first two


def plain_data(value: Any, *, depth: int = 0) -> Any:
    """A copy of JSON-like data made of exact built-in types, so that a template finds no other methods.

    Raises `InvalidRequestError` for anything else, and for data nested more than 64 levels deep.
    """
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"the messages nest deeper than {_MAX_DEPTH} levels", param="messages")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item, depth=depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, depth=depth + 1) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    raise InvalidRequestError(f"messages cannot hold a value of type {type(value).__name__}", param="messages")


def check_messages(messages: Any) -> None:
    """Raise `InvalidRequestError` for anything but a list of at least one object."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list of at least one message", param="messages")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"messages[{place}] must be an object with role and content", param="messages")


def read_messages(messages: Any, *, keeps_parts: bool) -> list[dict[str, Any]]:
    """Messages as a template takes them.

    Keys whose value is None are dropped, a message's reasoning is given under each of its names, and
    content in parts becomes one string, a line for each part, unless `keeps_parts`.
    """
    check_messages(messages)
    result = []
    for place, message in enumerate(messages):
        plain = {key: item for key, item in plain_data(message).items() if item is not None}
        reasoning = next((plain[name] for name in _REASONING if name in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        if isinstance(plain.get("content"), list):
            parts = [_text_part(part, place) for part in plain["content"]]
            plain["content"] = plain["content"] if keeps_parts else "\n".join(parts)
        result.append(plain)
    return result


def _text_part(part: Any, place: int) -> str:
    if isinstance(part, str):
        return part
    kind = type(part).__name__
    if isinstance(part, dict):
        kind, text = str(part.get("type")), part.get("text")
        if kind == "text" and isinstance(text, str):
            return text
    raise InvalidRequestError(
        f"messages[{place}].content: parts must be of type 'text' with a string, not {kind[:40]!r}",
        param="messages",
    )


def strings_in(value: Any) -> Iterator[str]:
    """Every string in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


class ContinuationMarker:
    """Leaves the last message open (`continue_final_message`): marks its end, and cuts the text there."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._mark = secrets.token_hex(16)
        last = messages[-1]
        content = last.get("content")
        # The space shows whether the template trims what it is given.
        if isinstance(content, str):
            last["content"] = content + self._mark + " "
            self._text = content
        elif isinstance(content, list) and content:
            part = content[-1]
            self._text = part if isinstance(part, str) else part["text"]
            marked = self._text + self._mark + " "
            content[-1] = marked if isinstance(part, str) else {**part, "text": marked}
        else:
            raise InvalidRequestError("continue_final_message: the last message has no content", param="messages")

    def cut(self, rendered: str) -> str:
        """The rendered text up to the end of the last message."""
        place = rendered.rfind(self._mark)
        if place < 0 or self._text.strip() not in rendered:
            raise InvalidRequestError(
                "continue_final_message: the chat template does not keep the last message as it is", param="messages"
            )
        keeps_space = rendered.startswith(" ", place + len(self._mark))
        kept = rendered[:place].replace(self._mark + " ", "").replace(self._mark, "")  # where it stands earlier too
        return kept if keeps_space else kept.rstrip()
