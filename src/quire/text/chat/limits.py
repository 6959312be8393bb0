"""What one rendering of a chat template may cost, and what an operation of a template will make.

Every value that a template can name has a size of at most `MAX_VALUE_BYTES`, the elements of a
container counted as often as they occur. An operation in C cannot be interrupted, so what may make
more than its operands is estimated before it runs (a result may still be a few times the estimate:
escapes, wide characters). Between two operations the CPU time of the rendering and the bytes of all
its values together are checked.
"""

import operator
import re
import string
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2

MAX_VALUE_BYTES = 8 << 20
MAX_TOTAL_BYTES = 64 << 20
MAX_CPU_SECONDS = 1.0
ITEM_BYTES = 64  # what an element of a container costs at least
_MAX_ITEMS = MAX_VALUE_BYTES // ITEM_BYTES
_MAX_HASHED = 4096  # keys of chosen hashes take quadratic time, and so does adding up lists
_MAX_SLOW = 64 << 10  # characters, for filters that work on each in Python or in quadratic time
_MAX_SCAN = 1 << 28  # character comparisons of one search from the right, in the worst case
_MAX_INTEGER_BITS = 8192
_MAX_PRECISION = 64
_STEPS_PER_CLOCK = 32
_FIELD_BYTES = 1024  # of a formatted field, which has at most three digits of width and of precision
# A width or precision of four digits, or one taken from the arguments.
_WIDE = re.compile(r"%[-+ #0]*(?:\d*\.)?(?:\d{4}|\*)")
_WIDE_ANYWHERE = re.compile(r"\d{4}|\*")  # where a %(name) may stand in between
_WIDE_SPEC = re.compile(r"\d{4}|\{")
_EMPTY_STRING_BYTES = "".__sizeof__()
_SEQUENCES: tuple[Any, ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: tuple[Any, ...] = (dict, *_SEQUENCES)


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """The template asked for more time or memory than a rendering gets."""


class Budget(threading.local):
    """What the rendering of this thread may still use. One object serves all threads."""

    bytes_left = 0
    steps = 0
    deadline_s = 0.0

    def start(self) -> None:
        """Begin a rendering in this thread."""
        self.bytes_left = MAX_TOTAL_BYTES
        self.steps = 0
        self.deadline_s = time.thread_time() + MAX_CPU_SECONDS

    def spend(self, num_bytes: int = 0) -> None:
        """Account for one operation and the bytes it made. Raises `TemplateLimitError`."""
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise TemplateLimitError(f"its values take more than {MAX_TOTAL_BYTES >> 20} MB together")
        self.steps += 1
        if self.steps % _STEPS_PER_CLOCK == 0:
            self.timed()

    def timed(self, value: Any = None) -> Any:
        """`value`, if there is time left: for operations that may have taken long. Raises `TemplateLimitError`."""
        if time.thread_time() > self.deadline_s:
            raise TemplateLimitError(f"it takes longer than {MAX_CPU_SECONDS:g} s")
        return value

    def charge(self, value: Any) -> Any:
        """`value`, accounted for: its own bytes are spent, its elements' are only bounded (others may hold them)."""
        num_bytes = 0
        if isinstance(value, str):
            num_bytes = string_bytes(value)
            require(num_bytes)
        elif isinstance(value, _CONTAINERS):
            num_bytes = ITEM_BYTES * len(value)
            require(size_of(value))
        elif isinstance(value, int):
            size_of(value)  # refuses large numbers
        self.spend(num_bytes)
        return self.timed(value)

    def count(self, items: Any) -> "_Counted":
        """The same items, each accounted for as it is taken."""
        return _Counted(items, self.spend)


class _Counted:
    """An iterable that spends for each step; it keeps the length, for `loop.length`."""

    def __init__(self, items: Any, spend: Callable[[int], None]) -> None:
        self._items = items
        self._spend = spend

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._spend(ITEM_BYTES)
            yield item

    def __len__(self) -> int:
        return len(self._items)


def string_bytes(text: str) -> int:
    """Memory of the characters: 1, 2 or 4 bytes each, by the widest."""
    return text.__sizeof__() - _EMPTY_STRING_BYTES


def size_of(value: Any) -> int:
    """Bytes of a value, repeated elements counted each time; just over the limit when there are more.

    What a template cannot print the inside of (loops, macros, generators, namespaces) has no size.
    """
    total = 0
    pending = [value]
    while pending and total <= MAX_VALUE_BYTES:
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
                pending += [*current.keys(), *current.values()]
        elif isinstance(current, _SEQUENCES):
            total += ITEM_BYTES * len(current)
            if total <= MAX_VALUE_BYTES:
                pending += current
    return total


def require(num_bytes: int) -> None:
    """Raise `TemplateLimitError` for a value of that size when it is too large."""
    if num_bytes > MAX_VALUE_BYTES:
        raise TemplateLimitError(f"a value of it takes more than {MAX_VALUE_BYTES >> 20} MB")


def few(items: Any) -> Any:
    """The same, a mapping or a list of few elements: for operations that may take quadratic time."""
    if isinstance(items, Mapping):
        return items
    items = list(items)
    if len(items) > _MAX_HASHED:
        raise TemplateLimitError(f"a sequence of it has more than {_MAX_HASHED} elements")
    return items


def _is_scanned(text: str, *others: Any) -> int:
    """No growth, but a search that compares each character with each."""
    if any(isinstance(other, str) and len(text) * len(other) > _MAX_SCAN for other in others):
        raise TemplateLimitError("it searches for too long a string")
    return 0


def _padded(text: Any, width: int = 80, *fill: str) -> int:
    return operator.index(width)


def _tabs(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * operator.index(tabsize)


def _replaced(text: Any, old: str, new: str, count: int | None = None) -> int:
    times = str(text).count(str(old))
    times = times if count is None or count < 0 else min(count, times)
    return len(str(text)) + times * max(len(str(new)) - len(str(old)), 0)


def _joined(separator: str, items: list[Any]) -> int:
    return size_of(items) + len(items) * len(separator)


def _parts(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    return ITEM_BYTES * len(text.split(sep, min(maxsplit, _MAX_ITEMS) if maxsplit >= 0 else _MAX_ITEMS))


def _parts_from_the_right(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    return _is_scanned(text, sep) + _parts(text, sep, maxsplit)


def _lines(text: str, keepends: bool = False) -> int:
    return ITEM_BYTES * (1 + sum(text.count(border) for border in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))


def _formatted(text: str, *arguments: Any, **named: Any) -> int:
    fields = [spec or "" for _, name, spec, _ in string.Formatter().parse(text) if name is not None]
    if any(_WIDE_SPEC.search(spec) for spec in fields):
        raise TemplateLimitError("a field width of it is too large")
    return len(text) + len(fields) * (size_of([arguments, named]) + _FIELD_BYTES)


def printf_size(text: str, values: Any) -> int:
    """Of `text % values`: neither wide fields nor `*`."""
    if (_WIDE_ANYWHERE if "%(" in text else _WIDE).search(text):
        raise TemplateLimitError("a field width of it is too large")
    return len(text) + text.count("%") * (size_of(values) + _FIELD_BYTES)


METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
        "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
        "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
        "startswith strip swapcase title upper zfill".split()
    ),
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    int: frozenset({"bit_count", "bit_length", "is_integer"}),
    float: frozenset({"is_integer"}),
}
"""What a template may call on plain values. Not `encode`, `to_bytes`, `translate`: bytes have methods of their own."""

METHOD_SIZES: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition"), _is_scanned),
    "expandtabs": _tabs,
    "replace": _replaced,
    "join": _joined,
    "split": _parts,
    "rsplit": _parts_from_the_right,
    "splitlines": _lines,
    **dict.fromkeys(("format", "format_map"), _formatted),
}
"""Of methods of strings: what the result will take, from the string and the arguments. The others do not grow it."""


def _indented(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    lines = _lines(str(value))
    return lines + lines // ITEM_BYTES * (width if isinstance(width, int) else len(width))


def _is_short(value: Any, most: int = _MAX_SLOW) -> int:
    if size_of(value) > most:
        raise TemplateLimitError(f"a filter of it takes at most {most} bytes: they are too many")
    return 0


def _wrapped(value: Any, width: Any = 79, long: Any = True, wrapstring: str = "", *_: Any, **named: Any) -> int:
    _is_short(value, _MAX_SLOW // 4)  # blanks take quadratic time
    return len(str(value)) * (1 + len(wrapstring or ""))


def _linked(value: Any, *options: Any, **named: Any) -> int:
    return len(str(value)) * size_of([*options, *named.values()])


def _rounded(value: Any, precision: int = 0, method: str = "common") -> int:
    if abs(precision) > _MAX_PRECISION:
        raise TemplateLimitError("a precision of it is too large")
    return 0


def _summed(value: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        few(value)
    return 0


CONSUMING = frozenset({"groupby", "join", "sum", "unique"})
"""Filters whose estimate walks through the value: an iterator becomes a list first."""
LINEAR_FILTERS = frozenset(
    "abs capitalize center count d default e escape first forceescape format indent last length lower random "
    "replace reverse safe string tojson trim truncate upper".split()
)
"""Filters that take a string of any size: they work in C, in linear time. The others take `_MAX_SLOW` characters, of
arguments too."""
FILTER_SIZES: dict[str, Callable[..., int]] = {
    "center": _padded,
    "trim": lambda value, chars=None: _is_scanned(str(value), chars),
    "indent": _indented,
    "wordwrap": _wrapped,
    "urlize": _linked,
    "replace": _replaced,
    "format": lambda value, *values, **named: printf_size(str(value), named or values),
    "join": lambda value, d="", attribute=None: _joined(str(d), value),
    "groupby": lambda value, attribute, default=None, case_sensitive=False: len(value) * size_of(default),
    "batch": lambda value, linecount, fill_with=None: ITEM_BYTES * operator.index(linecount),
    "slice": lambda value, slices, fill_with=None: ITEM_BYTES * operator.index(slices),
    "round": _rounded,
    "sum": _summed,
    "unique": lambda value, *options, **named: size_of(few(value)),
    **dict.fromkeys(("pprint", "urlencode", "xmlattr"), lambda value, *options, **named: _is_short(value)),
}
"""Of filters: what the result will take, from the value and the arguments."""


def filter_size(name: str, value: Any, *arguments: Any, **named: Any) -> int:
    """What a filter's result will take, as far as it may exceed its operands."""
    strings = () if name in LINEAR_FILTERS else (value, *arguments, *named.values())
    if any(isinstance(item, str) and len(item) > _MAX_SLOW for item in strings):
        raise TemplateLimitError(f"the filter {name} takes at most {_MAX_SLOW} characters: they are too many")
    estimate = FILTER_SIZES.get(name)
    return 0 if estimate is None else estimate(value, *arguments, **named)
