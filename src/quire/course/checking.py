"""What checks are made of: how they fail, and how a failing case becomes small.

A check is a function of the learner's module. It raises `Failed` with the smallest case, what came and what was
expected; what it returns is shown beside its title. The first line of its docstring is the title.
"""

from collections.abc import Callable, Iterable
from types import ModuleType, TracebackType
from typing import TypeVar

Check = Callable[[ModuleType], str | None]
T = TypeVar("T")
MOST_TRIES = 800
"""To make a case smaller."""
MOST_CHARACTERS = 100


class Failed(Exception):
    """A check failed; the text is for the learner."""


def title(check: Check) -> str:
    """A check in a few words."""
    return (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")


def shown(value: object) -> str:
    """A value on part of a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def expect(found: object, wanted: object, asked: str) -> None:
    """Raise `Failed` unless both are equal."""
    if isinstance(found, bool) != isinstance(wanted, bool) or found != wanted:
        raise Failed(f"{asked} gave {shown(found)}; expected {shown(wanted)}")


def said(error: BaseException, path: str) -> str:
    """An exception in one line, with the last line of the learner's file that it passed."""
    lines = [number for name, number in _places(error.__traceback__) if name == path]
    if isinstance(error, SyntaxError) and error.filename == path and error.lineno is not None:
        lines.append(error.lineno)
    where = f" (line {lines[-1]})" if lines else ""
    if isinstance(error, NotImplementedError):
        return f"it is not written yet{where}"
    try:
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    except BaseException:  # noqa: BLE001 - `__str__` may be the learner's
        text = ""
    text = text if len(text) <= 3 * MOST_CHARACTERS else f"{text[: 3 * MOST_CHARACTERS]}..."
    if isinstance(error, MemoryError):
        text = text or "more memory than a check may take"
    return f"it raised {type(error).__name__}{f': {text}' if text else ''}{where}"


def _places(trace: TracebackType | None) -> Iterable[tuple[str, int]]:
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


def smallest(case: T, smaller: Callable[[T], Iterable[T]], problem: Callable[[T], str | None]) -> str | None:
    """What is wrong with the smallest case that can be reached and still is wrong; None where `case` is right.

    Args:
        smaller: cases that are a step smaller, the boldest step first.
        problem: what is wrong with a case.
    """
    found = problem(case)
    num_tries, goes_on = 0, found is not None
    while goes_on and num_tries < MOST_TRIES:
        goes_on = False
        for candidate in smaller(case):
            num_tries += 1
            if (text := problem(candidate)) is not None:
                case, found, goes_on = candidate, text, True
                break
    return found


def shorter(items: list[T]) -> Iterable[list[T]]:
    """A sequence without a half of it, a quarter, ..., one item."""
    size = len(items) // 2
    while size:
        for first in range(0, len(items), size):
            yield [*items[:first], *items[first + size :]]
        size //= 2
    if len(items) == 1:
        yield []
