"""Short texts that a grammar's regular expressions match: what a completion may need and would not come upon.

A sample is a guess, which the grammar itself checks before it is used: what is not understood of an expression is left
out.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

_LARK_REGEX = re.compile(r"/((?:\\.|[^/\\\n])+)/")
_JSON_RULE = re.compile(r"%json (\{.*\})$", re.MULTILINE)
_CLASSES = {"d": "0", "w": "a", "s": " ", "D": "a", "W": "-", "S": "a"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_BOUNDS = re.compile(r"\{(\d+)(?:,\d*)?\}")
_LONGEST = 512
_MOST, _MOST_LINES = 64, 256
LINES = "// lines: "
"""Before what lines begin with, as JSON, in the first line of a grammar."""

EXTRAS = "quire"
"""The key of a structural tag's source beside its grammars: what is no grammar."""


def samples_of(source: str) -> list[str]:
    """One for each regular expression in a grammar as `source.py` writes it, without repetition."""
    found: dict[str, None] = {}
    for pattern in _patterns(json.loads(source) if source.startswith("{") else source):
        text = shortest_match(pattern)
        if text:
            found[text] = None
    return [*found][:_MOST]


def is_yaml(source: str) -> bool:
    """Whether it is a grammar of `yaml_rules.py`."""
    return source.startswith(LINES)


def lines_of(source: str) -> list[tuple[int, str]]:
    """What the lines of an answer may begin with, with their indentation, the least first."""
    first, _, _ = source.partition("\n")
    found = json.loads(first.removeprefix(LINES)) if is_yaml(source) else []
    return sorted(((indentation, text) for indentation, text in found), key=lambda one: one[0])[:_MOST_LINES]


def extras_of(source: str) -> Mapping[str, Any]:
    """What a source of `structural_tag.py` says beside its grammars; empty for any other."""
    if not source.startswith('{"grammars": [{"lark_grammar":'):
        return {}
    found: Mapping[str, Any] = json.loads(source).get(EXTRAS, {})
    return found


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "pattern" and isinstance(inner, str):
                yield inner
            elif name == "patternProperties" and isinstance(inner, dict):
                yield from inner
            yield from _patterns(inner)
    elif isinstance(value, list):
        for item in value:
            yield from _patterns(item)
    elif isinstance(value, str):
        for schema in _JSON_RULE.findall(value):
            with suppress(ValueError):
                yield from _patterns(json.loads(schema))
        yield from _LARK_REGEX.findall(value)


def shortest_match(pattern: str) -> str | None:
    """A text that `pattern` matches somewhere, as short as its parts allow; None where it is not understood."""
    try:
        text, end = _alternatives(pattern, 0)
    except (IndexError, ValueError, RecursionError):
        return None
    return text if end == len(pattern) and len(text) <= _LONGEST else None


def _alternatives(pattern: str, at: int) -> tuple[str, int]:
    best, text = None, ""
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            best, text, at = text if best is None else min(best, text, key=len), "", at + 1
            continue
        atom, at = _atom(pattern, at)
        times, at = _least(pattern, at)
        if times * len(atom) + len(text) > _LONGEST:
            raise ValueError
        text += atom * times
    return text if best is None else min(best, text, key=len), at


def _atom(pattern: str, at: int) -> tuple[str, int]:
    one = pattern[at]
    if one == "(":
        at += 1
        if pattern[at] == "?":
            at = _after_group_head(pattern, at + 1)
        text, end = _alternatives(pattern, at)
        if pattern[end] != ")":
            raise ValueError
        return text, end + 1
    if one == "[":
        return _class(pattern, at + 1)
    if one == "\\":
        return _escaped(pattern, at + 1)
    return {"^": "", "$": "", ".": "a"}.get(one, one), at + 1


def _after_group_head(pattern: str, at: int) -> int:
    if pattern[at] == ":":
        return at + 1
    if pattern[at] == "P" or pattern[at] == "<":
        if pattern[at + 1] in "=!":
            raise ValueError
        return pattern.index(">", at) + 1
    raise ValueError


def _escaped(pattern: str, at: int) -> tuple[str, int]:
    one = pattern[at]
    if one in "bBAzZ":
        return "", at + 1
    if one in "pPkuxN":
        raise ValueError
    return _CLASSES.get(one) or _ESCAPES.get(one, one), at + 1


def _class(pattern: str, at: int) -> tuple[str, int]:
    """The first character of a class; of an excluding one, the first letter, digit or sign outside."""
    excludes = pattern[at] == "^"
    at += excludes
    members, start = "", at
    while pattern[at] != "]" or at == start:
        if pattern[at] == "[":
            raise ValueError
        one, at = _escaped(pattern, at + 1) if pattern[at] == "\\" else (pattern[at], at + 1)
        members += one
        if pattern[at] == "-" and pattern[at + 1] != "]":
            last, at = _escaped(pattern, at + 2) if pattern[at + 1] == "\\" else (pattern[at + 1], at + 2)
            members += "".join(map(chr, range(ord(one), min(ord(last), ord(one) + 127) + 1)))
    if not excludes:
        return members[0], at + 1
    return next(one for one in "aA0-_ .,:;!?#" if one not in members), at + 1


def _least(pattern: str, at: int) -> tuple[int, int]:
    """How often at least, and what follows the quantifier."""
    if at >= len(pattern):
        return 1, at
    times, end = 1, at
    if pattern[at] in "*?":
        times, end = 0, at + 1
    elif pattern[at] == "+":
        end = at + 1
    elif bounds := _BOUNDS.match(pattern, at):
        times, end = int(bounds[1]), bounds.end()
    if end > at and end < len(pattern) and pattern[end] in "?+":
        end += 1
    return times, end
