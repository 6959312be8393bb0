"""What a driver (`drivers/drive.py`) may say, read from its lines: it is another's program, so all is checked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

import msgspec

from quire.errors import QuireError

Seconds = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Scalar = str | int | Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)] | bool | None


class PeerError(QuireError):
    """An engine did not start, or failed; its own reason, as one line that commands no terminal."""

    def __init__(self, reason: str) -> None:
        super().__init__(plain(reason))


class PeerMissing(PeerError):
    """An engine is not installed."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself when it is ready."""

    versions: Mapping[str, str]
    settings: Mapping[str, Scalar | list[Scalar]]
    kv_bytes: Count | None = None
    """Of its KV cache, by its own account; None where it has none that stays."""
    is_client: bool = False
    """The driver's process is a client of the engine, and no part of it: its memory does not count."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """One workload. Lists are in the order of the requests."""

    elapsed_s: Seconds
    ttfts_s: Sequence[Seconds]
    """From the moment when all requests came."""
    output_lens: Sequence[Count]
    token_ids: Sequence[Sequence[Count]] | None = None
    """Of the outputs; None where an engine gives text alone."""
    kv_bytes: Count | None = None
    """The most that its KV cache was at a time, where it grows with the requests."""


T = TypeVar("T", EngineInfo, RunResult)


def plain(text: str) -> str:
    """One line of at most 500 characters, none of which commands a terminal or cannot be encoded."""
    line = " ".join(text[:5000].split())[:500]
    return "".join(character if character.isprintable() else "?" for character in line)


def read(line: bytes, kind: str, form: type[T]) -> T:
    """What a line says under `kind`, as `form` has it.

    Raises:
        PeerError: the driver tells an error, or says something else.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if isinstance(message, dict) and "error" in message:
        raise (PeerMissing if message.get("missing") is True else PeerError)(str(message["error"]))
    if not isinstance(message, dict) or kind not in message:
        raise PeerError(f"its driver said {line[:100]!r} where {kind} was due")
    return convert(message[kind], form)


def convert(answer: Any, form: type[T]) -> T:
    """Checked; texts become plain.

    Raises:
        PeerError: naming the field.
    """
    what = "its driver's answer is not as the protocol has it"
    try:
        answer = _plain_texts(answer)
        found = msgspec.convert(answer, form)
    except (msgspec.ValidationError, RecursionError) as error:
        raise PeerError(f"{what} ({error})") from error
    if unknown := sorted(answer.keys() - {one.name for one in fields(form)}):
        raise PeerError(f"{what} (there is no field {unknown[0]})")
    return found


def _plain_texts(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(name): _plain_texts(one) for name, one in value.items()}
    return [_plain_texts(one) for one in value] if isinstance(value, list) else value
