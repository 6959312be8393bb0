"""The file of `--config`: flat YAML, or JSON, which is YAML too.

`key: value` on a line; a list is `[a, b]` or lines of `- item` below its key; `#` begins a comment; a value stands
plain, or in '...' or "..." (with JSON's escapes). Below `models:` stand entries of such lines, each begun by `- `. More
of YAML (nesting, anchors, blocks) is refused with the line's number. Values stay texts: a flag reads them as it does on
the command line.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from quire.errors import ConfigurationError

MAX_BYTES = 2**20
MODELS = "models"
Value = str | list[str]
Values = dict[str, tuple[Value, int]]
"""Key -> value and the number of its line. A null is a key left out."""
_PAIR = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):(?:\s+(.*))?")
_IN_ENTRY = re.compile(r"(\s*-\s+|\s+)([A-Za-z][A-Za-z0-9_-]*:(?:\s.*)?)")
_ITEM = re.compile(r"\s*-\s+(.*)")
_SCALAR = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|[^\s'"\[\]{}>|*&!%@`#,?:-][^#,\[\]{}]*|-?[0-9][^#,\[\]{}]*""")

_LIST = re.compile(rf"\[\s*(?:(?:{_SCALAR.pattern})\s*(?:,\s*(?:{_SCALAR.pattern})\s*)*)?\]")


class Config(NamedTuple):
    """What a file holds."""

    values: Values
    models: list[Values]
    """Entries of `models:`."""


def read_config(path: str) -> Config:
    """Read a file.

    Raises:
        ConfigurationError: the file cannot be read, or a line of it is not of this form.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        why = (getattr(error, "strerror", None) or "").lower() or "it is not UTF-8"
        raise ConfigurationError(f"the file of --config cannot be read: {path}: {why}", field="config") from error
    if len(data) > MAX_BYTES:
        raise ConfigurationError(f"the file of --config is larger than {MAX_BYTES:,} bytes", field="config")
    return _of_json(text, path) if text.lstrip().startswith("{") else _Lines(path).read(text)


def read_list(text: str) -> Value:
    """A list in JSON, or one value."""
    if not text.startswith("["):
        return text
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return [_json_scalar(item) for item in items]


class _Lines:
    def __init__(self, path: str) -> None:
        self._path = path
        self._found: Values = {}
        self._open: str | None = None
        """The key without a value, whose items may follow."""
        self._models: list[Values] = []
        self._column = 0
        """At which keys of the last entry stand."""

    def read(self, text: str) -> Config:
        for number, line in enumerate(text.splitlines(), 1):
            bare = line.rstrip()
            if not bare or bare.lstrip().startswith("#") or bare == "---":
                continue
            try:
                self._line(bare, number)
            except ValueError as error:
                raise ConfigurationError(f"line {number} of {self._path}: {error}", field="config") from error
        value, _ = self._found.pop(MODELS, (None, 0))
        if value:
            raise ConfigurationError(f"{MODELS} in {self._path} must be entries of their own lines", field="config")
        if value is not None and not self._models:
            raise ConfigurationError(f"{MODELS} in {self._path} has no entry below it", field="config")
        return Config(_given(self._found), [_given(entry) for entry in self._models])

    def _line(self, line: str, number: int) -> None:
        item = _ITEM.fullmatch(line)
        if self._open == MODELS and line[0] in " -":
            return self._entry_line(line, number)
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

    def _entry_line(self, line: str, number: int) -> None:
        found, item = _IN_ENTRY.fullmatch(line), _ITEM.fullmatch(line)
        pair = None if found is None else _PAIR.fullmatch(found[2])
        if found is None or pair is None:
            if item is not None and _SCALAR.fullmatch(item[1]):
                raise ValueError(f"an entry of {MODELS} is `- model: {item[1][:80]}`, not `- {item[1][:80]}`")
            raise ValueError(f"expected `- key: value` or `key: value` in an entry of {MODELS}; a list is [a, b]")
        if "-" in found[1]:
            self._models.append({})
            self._column = len(found[1])
        elif not self._models or len(found[1]) != self._column:
            raise ValueError(f"the keys of an entry of {MODELS} must stand below its first one")
        key, rest = pair[1], _without_comment(pair[2] or "")
        if key in self._models[-1]:
            raise ValueError(f"{key} stands there twice")
        if not rest:
            raise ValueError(f"{key} has no value on its line")
        self._models[-1][key] = (_value(rest), number)


def _given(values: Values) -> Values:
    return {key: (value, line) for key, (value, line) in values.items() if value not in ("null", "~", [])}


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


def _of_json(text: str, path: str) -> Config:
    try:
        content: dict[str, Any] = json.loads(text)
        has_models = MODELS in content
        models = content.pop(MODELS, [])
        if has_models and not models:
            raise ValueError(f"{MODELS} has no entry")
        if not isinstance(models, list) or not all(isinstance(entry, dict) for entry in models):
            raise ValueError(f"{MODELS} must be a list of objects")
        return Config(_of_object(content), [_of_object(entry) for entry in models])
    except RecursionError as error:
        raise ConfigurationError(f"{path} is not flat JSON: it is nested too deeply", field="config") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not flat JSON: {error}", field="config") from error


def _of_object(content: dict[str, Any]) -> Values:
    return {
        key: ([_json_scalar(item) for item in value] if isinstance(value, list) else _json_scalar(value), 1)
        for key, value in content.items()
        if value is not None
    }


def _json_scalar(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list) or value is None:
        raise ValueError("values are texts, numbers, true and false, and lists of them")
    return json.dumps(value)
