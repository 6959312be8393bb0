"""A conversation in a file: JSON that only its owner may read."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import InvalidRequestError

Message = dict[str, str]
MARK = "quire_chat"
"""The field by which such a file is known; its value is the version."""
VERSION = 1
MAX_FILE_BYTES = 16 * 2**20
ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class Saved:
    """What is kept."""

    system: str | None
    settings: dict[str, Any]
    messages: list[Message]
    """A question and its answer, and so on."""


def save(name: str, saved: Saved) -> Path:
    """Write a file, whole or not at all. One that is no conversation is not replaced.

    Raises:
        InvalidRequestError: no name, another file of that name, or it cannot be written.
    """
    path = _path(name, "/save")
    if path.exists():
        try:
            load(name)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"/save: {path} is another kind of file, and is left as it is") from error
    content = {MARK: VERSION, "system": saved.system, "settings": saved.settings, "messages": saved.messages}
    new = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
        new.replace(path)
    except (OSError, UnicodeError) as error:
        with suppress(OSError):
            new.unlink()
        raise InvalidRequestError(f"/save: {path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def load(name: str) -> Saved:
    """Read one.

    Raises:
        InvalidRequestError: it cannot be read, or holds something else; by the name of the field.
    """
    path = _path(name, "/load")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError(f"/load: {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequestError(f"/load: {path} has more than {MAX_FILE_BYTES} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"/load: {path} is not JSON") from error
    if not isinstance(found, dict) or found.get(MARK) != VERSION:
        raise InvalidRequestError(f"/load: {path} is no conversation of this version: {MARK} must be {VERSION}")
    return _checked(found, f"/load: {path}")


def _checked(found: dict[str, Any], place: str) -> Saved:
    system, settings, messages = found.get("system"), found.get("settings"), found.get("messages")
    if not isinstance(system, str | None):
        raise InvalidRequestError(f"{place}: system must be text or null", param="system")
    if not isinstance(settings, dict):
        raise InvalidRequestError(f"{place}: settings must be an object", param="settings")
    if not isinstance(messages, list) or len(messages) % 2:
        raise InvalidRequestError(f"{place}: messages must be a list of questions, each with its answer")
    for at, one in enumerate(messages):
        role = ROLES[at % 2]
        if not isinstance(one, dict) or one.get("role") != role or not isinstance(one.get("content"), str):
            text = f"{place}: messages[{at}] must have the role {role!r} and a text as content"
            raise InvalidRequestError(text, param="messages")
    return Saved(system, settings, [{"role": one["role"], "content": one["content"]} for one in messages])


def _path(name: str, command: str) -> Path:
    if not name:
        raise InvalidRequestError(f"{command} needs the name of a file")
    with suppress(RuntimeError):  # no home
        return Path(name).expanduser()
    return Path(name)
