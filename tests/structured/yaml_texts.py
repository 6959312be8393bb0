"""YAML written and read by others: PyYAML (YAML 1.1) and ruamel (1.2)."""

import json
import re
from typing import Any

import yaml
from ruamel.yaml import YAML

_PLAIN = re.compile(r"[A-Za-z_/(][A-Za-z0-9_ ./@,;()&'+=-]*(?<! )\Z|https?://[a-z.]+\Z")
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*\Z")
_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


class Unlike(Exception):
    """The two readers do not read a text, or not as the same value."""


def read(text: str) -> Any:
    """What both read.

    Raises:
        Unlike: that is not the same.
    """
    try:
        first, second = yaml.safe_load(text), YAML(typ="safe", pure=True).load(text)
    except Exception as error:
        raise Unlike(str(error)) from error
    if repr(first) != repr(second):  # repr: 1 is not true, nor 1.0
        raise Unlike(f"{first!r} and {second!r}")
    return first


def write(value: Any, depth: int = 0) -> str:
    """A value in block style with two spaces a level, lists indented, texts plain if that is safe by far."""
    between = "\n" + "  " * depth
    if isinstance(value, dict) and value:
        pairs = []
        for name, item in value.items():
            is_block = isinstance(item, dict | list) and item
            before = "\n" + "  " * (depth + 1) if is_block else " "
            pairs.append(f"{_scalar(name, _PLAIN_KEY)}:{before}{write(item, depth + 1)}")
        return between.join(pairs)
    if isinstance(value, list) and value:
        return between.join(f"- {write(item, depth + 1)}" for item in value)
    return _scalar(value, _PLAIN)


def _scalar(value: Any, plain: re.Pattern[str]) -> str:
    if isinstance(value, str) and plain.match(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
