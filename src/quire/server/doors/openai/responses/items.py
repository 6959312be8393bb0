"""Items of input and output: checked, in the form in which they are kept, and as the messages of a chat."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.doors.openai.responses.bodies import ContentPart, InputItem

Item = dict[str, Any]
PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
    "item_reference": ("id",),
}


def with_types(items: Any) -> Any:
    """Raw items, each with its type: a message may come without one."""
    if not isinstance(items, list):
        return items
    return [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in items]


def new_item_id(kind: str) -> str:
    """One that cannot be guessed."""
    return f"{PREFIXES[kind]}_{secrets.token_hex(16)}"


def checked_items(items: Sequence[InputItem], place: str) -> list[Item]:
    """Items as they are kept.

    Raises:
        InvalidRequestError: an item lacks what its type needs.
    """
    found = []
    for number, item in enumerate(items):
        for name in _NEEDED[item.type]:
            if getattr(item, name) is None:
                where = f"{place}[{number}].{name}"
                raise InvalidRequestError(f"{where} is required in an item of type {item.type}", param=where)
        found.append(_kept(item, f"{place}[{number}]"))
    return found


def _kept(item: InputItem, place: str) -> Item:
    if item.type == "item_reference":
        return {"type": item.type, "id": item.id}
    kept: Item = {"id": new_item_id(item.type), "type": item.type}
    match item.type:
        case "message":
            kind = "output_text" if item.role == "assistant" else "input_text"
            kept |= {"role": item.role, "content": _parts(item.content, kind, f"{place}.content")}
        case "function_call":
            kept |= {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        case "function_call_output":
            kept |= {"call_id": item.call_id, "output": _text(item.output, f"{place}.output")}
        case "reasoning":
            texts = item.content if isinstance(item.content, list) else [*(item.summary or ())]
            content = [{"type": "reasoning_text", "text": _text([part], place)} for part in texts]
            return {**kept, "summary": [], "content": content, "status": item.status or "completed"}
    return {**kept, "status": item.status or "completed"}


def _parts(content: str | list[ContentPart] | None, kind: str, place: str) -> list[dict[str, Any]]:
    parts = [ContentPart("text", content)] if isinstance(content, str) else content or []
    more: Item = {"annotations": []} if kind == "output_text" else {}
    return [{"type": kind, "text": _text([part], place), **more} for part in parts]


def _text(content: str | list[ContentPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise InvalidRequestError(f"{place}: a part of type {part.type} needs its text", param=place)
        texts.append(text)
    return "\n".join(texts)


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """The conversation that items are: an assistant's turn has its reasoning, its text and its calls together."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None
    for item in items:
        kind = item["type"]
        if kind == "function_call_output" or (kind == "message" and item["role"] != "assistant"):
            turn = None
            messages.append(_of_others(item))
            continue
        begins_anew = turn is None or (kind == "message" and ("content" in turn or "tool_calls" in turn))
        if begins_anew or (kind == "reasoning" and turn is not None and len(turn) > 2):
            turn = {"role": "assistant"}
            messages.append(turn)
        assert turn is not None
        _extend(turn, item)
    return [message for message in messages if "content" in message or "tool_calls" in message]


def _of_others(item: Item) -> dict[str, Any]:
    if item["type"] == "message":
        return {"role": item["role"], "content": _joined(item["content"])}
    return {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}


def _extend(turn: dict[str, Any], item: Item) -> None:
    match item["type"]:
        case "message":
            turn["content"] = _joined(item["content"])
        case "reasoning":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _joined(item["content"])
        case "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def _joined(parts: Iterable[Mapping[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts)
