"""What a test says that it asks of a client, held against what it did ask.

`@pytest.mark.client("openai", "chat.completions.create(stream, n)")`: the test makes this call with these arguments
(each not None), in one call, and it gives an answer. `@pytest.mark.client_refused(...)`: each of the arguments, or the
call that has none, is refused with an error that names it. From these marks the page of what works is made
(`scripts/compatibility_page.py`); so a mark that is not true fails its test, and so does a marked test that is skipped.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest

from scripts.client_calls import CLIENTS, method_of
from scripts.compatibility_marks import Asked, asked_of


@dataclass(frozen=True, slots=True)
class Ended:
    """One call that a test made: with what it was given, and what it raised."""

    given: frozenset[str]
    error: BaseException | None


Made = dict[tuple[str, str], list[Ended]]


@contextmanager
def watched(item: pytest.Item) -> Iterator[None]:
    """Let a test run, and hold its marks against the calls that it made."""
    marks = [(mark.name, asked) for name in ("client", "client_refused") for mark in item.iter_markers(name)
             for asked in asked_of(mark.args)]  # fmt: skip
    made: Made = {}
    with pytest.MonkeyPatch.context() as patch:
        for client, call in {(asked.client, asked.call) for _, asked in marks}:
            owner, name = method_of(client, call)
            made[client, call] = []
            patch.setattr(owner, name, _noting(inspect.getattr_static(owner, name), made[client, call]))
        yield
    for mark, asked in marks:
        found = made[asked.client, asked.call]
        says = f"{CLIENTS[asked.client].title}: {asked}"
        if mark == "client":
            assert any(one.error is None and one.given.issuperset(asked.arguments) for one in found), (
                f"not made: {says}"
            )
        else:
            _check_refusal(asked, found, says)


def _check_refusal(asked: Asked, found: list[Ended], says: str) -> None:
    for argument in asked.arguments:
        assert any(argument in one.given and argument in str(one.error or "") for one in found), f"not refused: {says}"
    words = ("not supported", "fetches no models", "no such", "not found")
    if not asked.arguments:
        assert any(any(word in str(one.error or "").lower() for word in words) for one in found), f"not refused: {says}"
        assert all(one.error is not None for one in found), f"not refused: {says}"


def _noting(function: Callable[..., Any], made: list[Ended]) -> Callable[..., Any]:
    """The same method, which notes how each call of it ends."""
    signature = inspect.signature(function)

    def given(*args: Any, **kwargs: Any) -> frozenset[str]:
        bound = signature.bind_partial(*args, **kwargs).arguments
        bound |= bound.pop("extra_body", None) or {}
        return frozenset(name for name, value in bound.items() if value is not None)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = function(*args, **kwargs)
        except Exception as error:
            made.append(Ended(given(*args, **kwargs), error))
            raise
        made.append(Ended(given(*args, **kwargs), None))
        return answer

    @wraps(function)
    async def async_call(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = await function(*args, **kwargs)
        except Exception as error:
            made.append(Ended(given(*args, **kwargs), error))
            raise
        made.append(Ended(given(*args, **kwargs), None))
        return answer

    return async_call if inspect.iscoroutinefunction(function) else call
