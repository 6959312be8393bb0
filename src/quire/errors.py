"""Every exception that Quire raises on purpose.

::

    QuireError
    ├── InvalidRequestError      the caller's fault: HTTP 400, refused before any work is done
    │   ├── ModelNotFoundError   404: no such model is served here
    │   └── PromptTooLongError   400: can never fit, with the numbers
    ├── OverloadedError          503: the queue is full, come back after `retry_after_s`
    │   └── TooManyRequestsError 429: this caller's part of the queue is
    ├── RequestFailedError       this request failed while it ran: it alone ends with `error`
    │   ├── DeadlineExceededError  408: its `timeout` passed, in the queue or while it ran
    │   ├── NoTokenLeftError     400: what it excludes left no token to go on with
    │   └── ShapeError           400: what its answer is held to cannot be compiled, or not be followed here
    ├── ProgramError             a variable of a program was not filled: it is named, and the cause is chained
    ├── ConfigurationError       the operator's fault: refused before the engine starts
    │   ├── ModelFileError       a file of the model is missing, damaged or not supported
    │   └── UnsupportedModelError  an architecture that Quire does not have
    └── EngineDeadError          the engine's fault: nothing more can be served by this process

Texts are for Quire's callers: they name the field and the limit, and never carry an
absolute path, an address or a trace.
"""

import difflib
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")


class QuireError(Exception):
    """The root of the tree. All can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[QuireError], args: tuple[Any, ...], fields: dict[str, Any]) -> QuireError:
    error = kind.__new__(kind, *args)  # without `__init__`, whose further arguments are among the fields
    error.__dict__.update(fields)
    return error


class InvalidRequestError(QuireError, ValueError):
    """A request that is refused. `param` names the field at fault, if there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ModelNotFoundError(InvalidRequestError):
    """The named model is not served here."""


class PromptTooLongError(InvalidRequestError):
    """The request cannot fit, however long it waits."""


class OverloadedError(QuireError):
    """The queue is full."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequestsError(OverloadedError):
    """This caller has too many requests waiting; others are let in."""


class RequestFailedError(QuireError):
    """One request failed while it ran; the other requests in the batch are unaffected."""


class DeadlineExceededError(RequestFailedError):
    """The request's `timeout` passed."""


class NoTokenLeftError(RequestFailedError):
    """What a request excludes left no token to go on with, which shows only at that place."""


class ShapeError(RequestFailedError):
    """What an answer is held to cannot be compiled within its bounds, or not be followed at this place. Its text begins
    with `SHAPE`, by which it is known on its way from the core."""

    def __init__(self, text: str) -> None:
        super().__init__(text if text.startswith(SHAPE) else SHAPE + text)


class ProgramError(QuireError):
    """A call of a program failed. `variable` is the one that it was to fill; `__cause__` says why."""

    def __init__(self, message: str, variable: str | None = None) -> None:
        super().__init__(message)
        self.variable = variable


NO_TOKEN_LEFT = "no token is left to go on with: allowed_token_ids, bad_words and min_tokens exclude all of them here"
SHAPE = "structured_outputs "


class ConfigurationError(QuireError, ValueError):
    """The engine cannot start with these arguments. `field` names the argument at fault, if there is one."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class ModelFileError(ConfigurationError):
    """A file of the model is missing, damaged or of a kind that Quire does not read."""


class UnsupportedModelError(ConfigurationError):
    """The architecture is not one that Quire has."""


class EngineDeadError(QuireError):
    """The engine stopped for a reason that is not one request's."""


def request_failure(message: str) -> RequestFailedError:
    """The exception of a request that ended with this error."""
    if message.startswith(SHAPE):
        return ShapeError(message)
    return (NoTokenLeftError if message == NO_TOKEN_LEFT else RequestFailedError)(message)


def context_length_message(most: int, prompt: int, completion: int, hint: str) -> str:
    """That prompt and answer do not fit, in the words that clients look for (OpenAI's, and vLLM's after it).

    Args:
        most, prompt, completion: tokens.
        hint: what the caller may do, naming a field and its limit.
    """
    return (
        f"This model's maximum context length is {most} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the messages, {completion} in the completion). Please reduce the length of the messages or "
        f"completion. {hint}"
    )


def unknown_name_message(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown sampling parameter 'top_kk'; did you mean 'top_k'?` A name with all its words goes before one that is
    spelt alike. Of names with dots, the last parts are compared."""
    places = {place.rpartition(".")[2]: place for place in sorted(known)}
    last = name.rpartition(".")[2]
    words = set(last.split("_"))
    longer = [item for item in places if len(words) > 1 and words <= set(item.split("_"))]
    nearest = [places[item] for item in longer[:1] or difflib.get_close_matches(last, places, n=1, cutoff=0.6)]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}{hint}"


def names_unknown_arguments(kind: str) -> Callable[[type[T]], type[T]]:
    """For a dataclass: its TypeError for an unexpected keyword says the nearest known one."""

    def decorate(owner: type[T]) -> type[T]:
        init = owner.__init__

        @wraps(init)
        def named(self: T, *args: Any, **values: Any) -> None:
            try:
                init(self, *args, **values)
            except TypeError:
                known = owner.__dataclass_fields__  # type: ignore[attr-defined]
                for name in sorted(values.keys() - known.keys()):
                    raise TypeError(f"{owner.__name__}: {unknown_name_message(kind, name, known)}") from None
                raise

        owner.__init__ = named  # type: ignore[assignment, method-assign]
        return owner

    return decorate


def internal_fault_message(error: BaseException) -> str:
    """What the caller reads of a fault: of an internal one none of its text, which may hold anything."""
    if isinstance(error, ShapeError):
        return str(error)
    return f"an internal fault stopped this request ({type(error).__name__})"
