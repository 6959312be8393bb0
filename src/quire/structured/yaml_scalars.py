"""Scalars and keys of YAML, as texts and as regular expressions of Lark's: only those that YAML 1.1 (PyYAML) and 1.2
read as the same value."""

import json
import re
from collections.abc import Iterable
from typing import Any

from quire.structured.keys import LONGEST_PLAIN, LONGEST_QUOTED
from quire.structured.source import ESCAPES

UNPRINTABLE = "\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ufffe\\uffff"
"""Characters that no YAML may hold, that break lines there, or that a reader drops; C1 controls among them."""
_HIDDEN = re.compile(f"[{UNPRINTABLE}]")
_ABOVE_ASCII = "\\u00a1-\\u1fff\\u3001-\\ud7ff\\ue000-\\ufefe\\uff01-\\ufffd\\U00010000-\\U0010ffff"
_FIRST = "A-Za-z0-9_/($" + _ABOVE_ASCII
_INNER = "\\-!$%&'()*+,./0-9;<=>?@A-Z\\\\^_`a-z|~" + _ABOVE_ASCII
"""No quotes, brackets and braces: what closes a text or a list closes nothing here."""
_PLAIN = f"[{_FIRST}](:*[{_INNER}#]| +[{_INNER}])*"
_LIKE_NUMBERS = "[0-9][0-9A-Fa-fxXoO_:.+tTzZ -]*"
"""More than any resolver takes for a number, a date or a time."""
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
"""Of a regular expression: an escape, a class, a character."""
_LOOKS = re.compile(r"\(\?<?[=!]|\[\^?\]")
_WORDS = "null|true|false|yes|no|on|off|y|n"
_IS_PLAIN = re.compile(f"(?!(?:{_LIKE_NUMBERS})\\Z)(?!(?i:{_WORDS})\\Z){_PLAIN}\\Z")
_KEY = "[A-Za-z_](?:[A-Za-z0-9_./ -]{0,62}[A-Za-z0-9_])?"
_IS_PLAIN_KEY = re.compile(f"(?!(?i:{_WORDS})\\Z){_KEY}\\Z")
LONGEST_KEY = 1000
"""Characters of a key with its quotes: YAML allows 1,024 (section 7.4.2)."""
IN_QUOTES = f'[^"\\\\{UNPRINTABLE}]'
KEY_STARTS = (*"abcdefghijklmnopqrstuvwxyz", *"0123456789", "")
"""Keys that a schema does not name, by their first character, letters in either case; "" stands for all others."""

INTEGER = "-?(0|[1-9][0-9]{0,17})"
INTEGER_BOUND = 10**15
"""Of numbers that have a bound on one side."""
SAFE_PATTERN = "^[^" + UNPRINTABLE.replace("x00-\\x1f", "x00-\\x07\\x0b\\x0e-\\x1f") + "]*$"
"""Of texts in JSON: these characters, and those that have an escape."""
PLAIN = f"/{_PLAIN.replace('/', chr(92) + '/')}/ & ~/{_LIKE_NUMBERS}/ & ~/(?i:{_WORDS})/"
"""Texts without quotes."""
_HOST = "[A-Za-z][A-Za-z0-9]{0,15}(-[A-Za-z0-9]{1,15})?(\\.[A-Za-z][A-Za-z0-9]{0,15}(-[A-Za-z0-9]{1,15})?){0,6}"
PLAIN_FORMATS = {
    "email": f"[A-Za-z][A-Za-z0-9]*([._][A-Za-z0-9]+)*@{_HOST}",
    "hostname": _HOST,
    "uri": f"(https?|ftps?|gs|s3|file)://{_HOST}(/[A-Za-z0-9._-]+)*/?",
    "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
}
"""Of texts of a format those that are written plain; others are quoted."""
TERMINALS = {
    "INTEGER": f"/{INTEGER}/",
    "NUMBER": f"/{INTEGER}(\\.[0-9]{{1,17}})?/",
    "QUOTED": f'/"({IN_QUOTES}|\\\\[{ESCAPES}])*"/',
    "PLAIN": PLAIN,
    "LINE": f"/[^ {UNPRINTABLE}][^{UNPRINTABLE}]*/",
    "INDENTED": f"/ *[^ {UNPRINTABLE}][^{UNPRINTABLE}]*/",
}
"""Numbers of at most 18 digits, and 17 behind the point, which both read as integers and doubles; texts; the lines of a
literal block, the first without spaces before it."""


def lark(text: str) -> str:
    """A string of Lark's that is `text`. Its lexer takes no control characters, and no surrogates."""
    return "".join(
        f"\\u{ord(one):04x}" if "\x7f" <= one < "\xa0" else one for one in json.dumps(text, ensure_ascii=False)
    )


def json_text(value: Any) -> str:
    """A value in flow style, which is JSON on one line with what YAML may not hold escaped, and with exponents that
    YAML 1.1 reads."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json_text(name)}: {json_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    if isinstance(value, float):
        text = repr(int(value) if value.is_integer() and abs(value) < 2**53 else value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    text = json.dumps(value, ensure_ascii=False)
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def text_of(value: Any) -> str:
    """A value on one line in block style: a text without quotes where it would be read as the same text."""
    return value if isinstance(value, str) and _IS_PLAIN.match(value) else json_text(value)


def key_of(name: str) -> str:
    """A key in block style, without its colon."""
    return name if _IS_PLAIN_KEY.match(name) else json_text(name)


def other_keys(start: str | None, named: Iterable[str], inside: str | None, outside: Iterable[str]) -> tuple[str, str]:
    """Expressions for keys that a schema does not name, their colon with them: in block style, and in flow style.

    Args:
        start: one of `KEY_STARTS`, with which they begin; None for any.
        named: keys that are none of these.
        inside: an expression that they match as well.
        outside: expressions that they do not match.
    """
    limits = [f"& {inside}" if inside else "", *(f"& ~({one})" for one in outside)]
    names = " | ".join(lark(name) for name in named if start is None or _starts(name) == start)
    limits.append(f"& ~({names})" if names else "")
    held = " ".join(filter(None, limits))
    first = IN_QUOTES
    if start is not None:
        first = (
            f"[^A-Za-z0-9{IN_QUOTES[2:]}" if not start else f"[{start}{start.upper()}]" if start.isalpha() else start
        )
    quoted = f'"\\"" (/{first}{IN_QUOTES}{{0,{LONGEST_QUOTED - 1}}}/ {held}) "\\""'
    if start is not None and not start.isalpha():
        return f'{quoted} ":"', f'{quoted} ": "'
    letter = "[A-Za-z_]" if start is None else first
    more = f"([A-Za-z0-9_.\\/ -]{{0,{LONGEST_PLAIN - 2}}}[A-Za-z0-9_])?"
    plain = f"(/{letter}{more}/ & ~/(?i:{_WORDS})/ {held})"
    return f'{plain} ":" | {quoted} ":"', f'{quoted} ": "'


def _starts(name: str) -> str:
    first = name[:1].lower()
    return first if first.isascii() and first.isalnum() else ""


def whole_pattern(pattern: str) -> str | None:
    """The expression of a `pattern`, for the whole text; None where it looks around, or has anchors inside."""
    found = [_whole(part) for part in _parts(pattern)]
    return None if None in found else f"/{'|'.join(filter(None, found))}/"


def _parts(pattern: str) -> list[str]:
    """What stands between the bars that are in no group and no class."""
    found, depth = [""], 0
    for piece in _PIECE.findall(pattern):
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += piece
    return found


def _whole(pattern: str) -> str | None:
    from llguidance import regex_to_lark

    pieces = _PIECE.findall(pattern)
    begins, ends = pieces[:1] == ["^"], pieces[-1:] == ["$"] and len(pieces) > 1
    core = pieces[begins : len(pieces) - ends]
    if any(one in ("^", "$", "\\b", "\\B", "\\A", "\\z", "\\Z") for one in core) or _LOOKS.search("".join(core)):
        return None
    try:
        inner = regex_to_lark("".join(core), "dw")
    except ValueError:
        return None
    return f"({'' if begins else '(?s:.*)'}({inner}){'' if ends else '(?s:.*)'})"


def is_endless(pattern: str) -> bool:
    """Whether every key that matches can become a longer one that does, as far as is seen: what comes last is repeated,
    or anything may come before or behind it."""
    return all(map(_is_endless, _parts(pattern)))


def _is_endless(pattern: str) -> bool:
    if not pattern.startswith("^") or not pattern.endswith("$"):
        return True
    repeated = re.search(r"(?:^|[^\\])(?:\.|\\w|\[(?:[^\]\\]|\\.)+\])(?:[+*]|\{\d+,(\d*)\})\$$", pattern)
    return repeated is not None and int(repeated[1] or LONGEST_QUOTED) >= LONGEST_QUOTED
