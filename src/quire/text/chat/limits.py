"""What one rendering of a chat template may cost, and the operations that could cost more.

The bound rests on one invariant: **every value a template can name weighs at most `MAX_VALUE_BYTES`**,
a list counted with all its elements as often as they are repeated. An operation in C cannot be
interrupted, so each one that may build something larger than its operands is measured *before* it
runs; then every single operation is short, and a check of the clock after each bounds the whole.
The bytes of all intermediate values together are bounded too: that bounds the memory, whatever the
template keeps.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2

MAX_VALUE_BYTES = 8 << 20
MAX_TOTAL_BYTES = 64 << 20
MAX_CPU_SECONDS = 1.0
_MAX_SCAN = 1 << 28  # character comparisons of one search, in the worst case
_MAX_INTEGER_BITS = 8192
ITEM_BYTES = 64  # what an element of a list costs at least
MAX_ITEMS = MAX_VALUE_BYTES // ITEM_BYTES
_EMPTY_STRING_BYTES = "".__sizeof__()
_STEPS_PER_CLOCK = 32
# A width or precision of four digits, or one taken from the arguments.
_WIDE = re.compile(r"%[-+ #0]*(?:\d*\.)?(?:\d{4}|\*)")
_WIDE_ANYWHERE = re.compile(r"\d{4}|\*")  # where a %(name) may stand in between


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """The template asked for more time or memory than a rendering gets."""


class Meter:
    """Counts what the renderings of this thread have used. One object for all threads."""

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self) -> None:
        """Start a rendering in this thread."""
        self._local.left = MAX_TOTAL_BYTES
        self._local.steps = 0
        self._local.deadline_s = time.thread_time() + MAX_CPU_SECONDS

    def charge(self, num_bytes: int = 0) -> None:
        """Account for one operation whose result has this size."""
        local = self._local
        local.left -= num_bytes
        if local.left < 0:
            raise TemplateLimitError(f"its values take more than {MAX_TOTAL_BYTES >> 20} MB together")
        local.steps += 1
        if num_bytes > 4096 or local.steps % _STEPS_PER_CLOCK == 0:
            self._check_clock()

    def _check_clock(self) -> None:
        if time.thread_time() > self._local.deadline_s:
            raise TemplateLimitError(f"it takes longer than {MAX_CPU_SECONDS:g} s")

    def settle(self, value: Any) -> Any:
        """`value`, once it is known to be small enough; everything a template computes passes here."""
        if value is None or value is True or value is False:
            self.charge()
        else:
            weight = weigh(value)
            if weight > MAX_VALUE_BYTES:
                raise TemplateLimitError(f"a value of it takes more than {MAX_VALUE_BYTES >> 20} MB")
            self.charge(weight)
        return value

    def iterate(self, items: Any) -> "_Counted":
        """The same items, each counted as it is taken."""
        return _Counted(items, self.charge)


class _Counted:
    """An iterable that charges each step; it keeps the length, for `loop.length`."""

    def __init__(self, items: Any, charge: Callable[[int], None]) -> None:
        self._items = items
        self._charge = charge

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._charge(ITEM_BYTES)
            yield item

    def __len__(self) -> int:
        return len(self._items)


def string_bytes(text: str) -> int:
    """Memory of the characters: 1, 2 or 4 bytes each, by the widest."""
    return text.__sizeof__() - _EMPTY_STRING_BYTES


def weigh(value: Any) -> int:
    """Bytes of a value, repeated elements counted each time; just over the limit when there are more.

    What a template cannot take apart (loops, macros, generators, namespaces) weighs nothing.
    """
    total = 0
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, str):
            total += string_bytes(current)
        elif isinstance(current, int):
            bits = current.bit_length()
            if bits > _MAX_INTEGER_BITS:
                raise TemplateLimitError("a number of it is too large")
            total += bits >> 3
        elif isinstance(current, dict):
            total += 2 * ITEM_BYTES * len(current)
            if total <= MAX_VALUE_BYTES:
                pending.extend(current.keys())
                pending.extend(current.values())
        elif isinstance(current, list | tuple):
            total += ITEM_BYTES * len(current)
            if total <= MAX_VALUE_BYTES:
                pending.extend(current)
        if total > MAX_VALUE_BYTES:
            break
    return total


def _require(num_bytes: int) -> None:
    if num_bytes > MAX_VALUE_BYTES:
        raise TemplateLimitError(f"a value of it takes more than {MAX_VALUE_BYTES >> 20} MB")


def _require_scan(text: str, other: Any) -> None:
    if isinstance(other, str) and len(text) * len(other) > _MAX_SCAN:
        raise TemplateLimitError("it searches for too long a string")


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0


def as_items(value: Any) -> list[Any]:
    """The elements of anything iterable, as a list; long strings and long iterables are refused."""
    try:
        length = len(value)
    except TypeError:
        length = 0  # a generator: what it yields has been charged where it was made
    if length > MAX_ITEMS:
        raise TemplateLimitError(f"a sequence of it has more than {MAX_ITEMS} elements")
    return list(value)


def concatenate(pieces: Iterable[str]) -> str:
    """All pieces as one string, measured first."""
    pieces = list(pieces)
    _require(sum(map(len, pieces)))
    return "".join(pieces)


def concatenate_values(values: tuple[Any, ...]) -> str:
    """The operator `~`."""
    return concatenate([str(value) for value in values])


def add(left: Any, right: Any) -> Any:
    if not isinstance(left, int | float):
        _require(weigh(left) + weigh(right))
    return left + right


def multiply(left: Any, right: Any) -> Any:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple):
            _require(weigh(value) * max(_integer(times), 1))
    return left * right


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and left.bit_length() * abs(_integer(right)) > _MAX_INTEGER_BITS:
        raise TemplateLimitError("a number of it is too large")
    return left**right


def arithmetic(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The operation, for numbers alone."""

    def apply(left: Any, right: Any) -> Any:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise TypeError(f"cannot calculate with {type(left).__name__} and {type(right).__name__}")
        return operation(left, right)

    return apply


def modulo(left: Any, right: Any) -> Any:
    """A remainder, or printf-style formatting with neither wide fields nor `*`."""
    if isinstance(left, str):
        if (_WIDE_ANYWHERE if "%(" in left else _WIDE).search(left):
            raise TemplateLimitError("a field width of it is too large")
        _require(string_bytes(left) + (left.count("%") * (weigh(right) + 1024)))
    return left % right


def join(separator: str, values: Any) -> str:
    pieces = [str(value) for value in as_items(values)]
    _require(sum(map(string_bytes, pieces)) + len(pieces) * string_bytes(separator))
    return separator.join(pieces)


def replace(text: str, old: str, new: str, count: int | None = None) -> str:
    times = text.count(old) if count is None else min(count, text.count(old))
    _require(string_bytes(text) + times * 4 * max(len(new) - len(old), 0))
    return text.replace(old, new, times)


def split(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return text.split(sep, MAX_ITEMS if maxsplit < 0 else min(maxsplit, MAX_ITEMS))


def rsplit(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    _require_scan(text, sep)
    return text.rsplit(sep, MAX_ITEMS if maxsplit < 0 else min(maxsplit, MAX_ITEMS))


def splitlines(text: str, keepends: bool = False) -> list[str]:
    borders = sum(text.count(border) for border in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
    _require(ITEM_BYTES * borders)
    return text.splitlines(keepends)


def strip(text: str, characters: str | None = None) -> str:
    _require_scan(text, characters)
    return text.strip(characters)


def _padded(name: str) -> Callable[..., str]:
    def pad(text: str, width: int, *fill: str) -> str:
        _require(4 * width)
        padded: str = getattr(text, name)(width, *fill)
        return padded

    return pad


def _scanned(name: str) -> Callable[..., Any]:
    def scan(text: str, *arguments: Any) -> Any:
        for argument in arguments:
            _require_scan(text, argument)
        return getattr(text, name)(*arguments)

    return scan


# The methods a template may call on plain values. None: the method as it is, linear in its operands.
STRING_METHODS: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys(
        "startswith endswith removeprefix removesuffix upper lower title capitalize casefold swapcase find "
        "index count partition isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle "
        "isupper".split()
    ),
    **{name: _padded(name) for name in ("center", "ljust", "rjust", "zfill")},
    **{name: _scanned(name) for name in ("lstrip", "rstrip", "rfind", "rindex", "rpartition")},
    "join": join,
    "replace": replace,
    "split": split,
    "rsplit": rsplit,
    "splitlines": splitlines,
    "strip": strip,
}
VALUE_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(STRING_METHODS) | {"format"},
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    int: frozenset(),
    float: frozenset({"is_integer"}),
}
