"""The file of `--config`: flat YAML, or JSON, which is YAML too.

`key: value` on a line; a list is `[a, b]` or lines of `- item` below its key; `#` begins a comment; a value stands
plain, or in '...' or "..." (with JSON's escapes). More of YAML (nesting, anchors, blocks) is refused with the line's
number. Values stay texts: a flag reads them as it does on the command line.
"""

import json
import re
from pathlib import Path
from typing import Any

from quire.errors import ConfigurationError

MAX_BYTES = 2**20
Value = str | list[str]
_PAIR = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):(?:\s+(.*))?")
_ITEM = re.compile(r"\s*-\s+(.*)")
_SCALAR = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|[^\s'"\[\]{}>|*&!%@`#,?:-][^#,\[\]{}]*|-?[0-9][^#,\[\]{}]*""")

_LIST = re.compile(rf"\[\s*(?:(?:{_SCALAR.pattern})\s*(?:,\s*(?:{_SCALAR.pattern})\s*)*)?\]")


def read_config(path: str) -> dict[str, tuple[Value, int]]:
    """Key -> value and the number of its line. A null is a key left out.

    Raises:
        ConfigurationError: the file cannot be read, or a line of it is not of this form.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the file of --config cannot be read as text: {path}", field="config") from error
    if len(data) > MAX_BYTES:
        raise ConfigurationError(f"the file of --config is larger than {MAX_BYTES:,} bytes", field="config")
    return _of_json(text, path) if text.lstrip().startswith("{") else _Lines(path).read(text)


def read_list(text: str) -> Value:
    """A list in JSON, or one value."""
    if not text.startswith("["):
        return text
    try:
        items = json.loads(text)
    except ValueError:
        return text
    return [_json_scalar(item) for item in items]


class _Lines:
    def __init__(self, path: str) -> None:
        self._path = path
        self._found: dict[str, tuple[Value, int]] = {}
        self._open: str | None = None
        """The key without a value, whose items may follow."""

    def read(self, text: str) -> dict[str, tuple[Value, int]]:
        for number, line in enumerate(text.splitlines(), 1):
            bare = line.rstrip()
            if not bare or bare.lstrip().startswith("#") or bare == "---":
                continue
            try:
                self._line(bare, number)
            except ValueError as error:
                raise ConfigurationError(f"line {number} of {self._path}: {error}", field="config") from error
        return {key: (value, line) for key, (value, line) in self._found.items() if value not in ("null", "~", [])}

    def _line(self, line: str, number: int) -> None:
        item = _ITEM.fullmatch(line)
        if item is not None and self._open is not None:
            values, first = self._found[self._open]
            assert isinstance(values, list)
            self._found[self._open] = ([*values, _scalar(item[1])], first)
            return
        pair = _PAIR.fullmatch(line)
        if pair is None:
            raise ValueError("expected `key: value`, or `- item` below a key")
        key, rest = pair[1], _without_comment(pair[2] or "")
        if key in self._found:
            raise ValueError(f"{key} stands there twice")
        self._open = None if rest else key
        self._found[key] = (_value(rest) if rest else [], number)


def _without_comment(text: str) -> str:
    scalar = _SCALAR.match(text) if text[:1] in ("'", '"') else None
    start = scalar.end() if scalar else 0
    at = re.search(r"(^|\s)#", text[start:])
    return text[: start + at.start()].strip() if at else text.strip()


def _value(text: str) -> Value:
    if not text.startswith("["):
        return _scalar(text)
    if _LIST.fullmatch(text) is None:
        raise ValueError("a list is [a, b] on one line, its values in quotes if they hold signs of their own")
    return [_scalar(item[0].strip()) for item in _SCALAR.finditer(text[1:-1].strip())]


def _scalar(text: str) -> str:
    text = _without_comment(text)
    whole = _SCALAR.fullmatch(text)
    if whole is None or (text[0] not in "'\"" and re.search(r":(\s|$)", text)):
        raise ValueError("a value with signs of its own must stand in quotes; nesting and blocks are not read")
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    return str(json.loads(text)) if text[0] == '"' else text


def _of_json(text: str, path: str) -> dict[str, tuple[Value, int]]:
    try:
        content: dict[str, Any] = json.loads(text)
        return {
            key: ([_json_scalar(item) for item in value] if isinstance(value, list) else _json_scalar(value), 1)
            for key, value in content.items()
            if value is not None
        }
    except ValueError as error:
        raise ConfigurationError(f"{path} is not flat JSON: {error}", field="config") from error


def _json_scalar(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list) or value is None:
        raise ValueError("values are texts, numbers, true and false, and lists of them")
    return json.dumps(value)
