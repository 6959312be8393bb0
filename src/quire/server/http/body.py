"""A request body, read with a bound and parsed as strict JSON."""

import asyncio
import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from starlette.requests import Request

from quire.engine.queue import Caller
from quire.server.http.errors import ApiError, ClientGoneError
from quire.server.http.limits import INLINE_BODY_BYTES, Limit, Limits
from quire.server.http.shares import Shares, sharer_of

if TYPE_CHECKING:
    from quire.server.http.models import ServedModels

T = TypeVar("T")
COUNT_BYTES = 2**16
_ESCAPED_TEXT = re.compile(rb"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]", re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class Bodies:
    """Reads the bodies of one server's requests. What it holds of them is shared by their callers.

    Args:
        models: their threads parse large ones beside the event loop; None: a thread does.
    """

    def __init__(self, limits: Limits, models: "ServedModels | None" = None) -> None:
        self._limits, self._models = limits, models
        self.shares = Shares(limits.all_bodies_bytes.value)

    async def read(self, request: Request, parse: Callable[[dict[str, Any]], T]) -> T:
        """What `parse` makes of the body, a JSON object. A large one is parsed in a thread beside the event loop.

        Raises:
            ApiError: 415, 413, 408, 503 or 400.
            ClientGoneError: the caller left before the end of the body.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or "content-encoding" in request.headers:
            text = "the body must be JSON, sent plain with the header Content-Type: application/json"
            raise ApiError(415, text, code="unsupported_media_type")
        return await self.read_bytes(request, lambda data: parse(self.object_in(data)), self._limits.body_bytes)

    async def read_bytes(self, request: Request, parse: Callable[[bytearray], T], most: Limit) -> T:
        """What `parse` makes of a body of any kind.

        Raises:
            ApiError: 413, 408, 503, or what `parse` raises.
            ClientGoneError: the caller left before the end of the body.
        """
        data, sharer = bytearray(), sharer_of(request.scope)
        try:
            async with asyncio.timeout(self._limits.body_seconds.value):
                await self._fill(data, request, sharer, most)
            if len(data) <= INLINE_BODY_BYTES:
                return parse(data)
            return await self._beside(lambda: parse(data), len(data), request)
        except TimeoutError as error:
            raise self._limits.body_seconds.error() from error
        finally:
            self.shares.give(sharer, len(data))

    async def _fill(self, data: bytearray, request: Request, sharer: str, most: Limit) -> None:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most.value:
            raise most.error(f"{int(declared[:20]):,}")
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            if not self.shares.take(sharer, len(part)):
                raise self._limits.all_bodies_bytes.error()
            data += part
            if len(data) > most.value:
                raise most.error()
            if not message.get("more_body", False):
                return

    async def _beside(self, work: Callable[[], T], size: int, request: Request) -> T:
        """In the engine's threads for texts: with threads of their own, bodies would take the interpreter from the loop
        by turns, and callers would not share them."""
        if self._models is None:
            return await asyncio.to_thread(work)
        return await self._models.beside(work, size, Caller(sharer_of(request.scope)))

    def _check_size(self, data: bytearray) -> None:
        """Refuse what would keep the parser, which no other thread can interrupt, for long."""
        most_values, most_names = self._limits.body_values, self._limits.body_names
        # Signs in strings too: an upper bound, and cheap.
        if data.count(b",") <= most_values.value and data.count(b":") + data.count(b"[") <= most_names.value:
            return
        num_commas, num_names, num_lists = count_outside_strings(bytes(data), b",", b":", b"[")
        if num_commas > most_values.value:
            raise most_values.error()
        if num_names + num_lists > most_names.value:
            raise most_names.error(f"{num_names + num_lists:,}")

    def object_in(self, data: bytearray) -> dict[str, Any]:
        """The JSON object that this is.

        Raises:
            ApiError: 413 or 400.
        """
        self._check_size(data)
        value = parse_json(bytes(data))
        if not isinstance(value, dict):
            raise _malformed("the body must be a JSON object")
        return value


def count_outside_strings(data: bytes, *signs: bytes) -> list[int]:
    """How often each sign stands in JSON, strings left out. In pieces, between which other threads may run."""
    bare, counts, is_inside = data.replace(b"\\\\", b"").replace(b'\\"', b""), [0] * len(signs), 0
    for start in range(0, len(bare), COUNT_BYTES):
        parts = bare[start : start + COUNT_BYTES].split(b'"')
        outside = b"".join(parts[is_inside::2])
        counts = [count + outside.count(sign) for count, sign in zip(counts, signs, strict=True)]
        is_inside ^= (len(parts) - 1) & 1
    return counts


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no number past a double, no name twice, no lone surrogate.

    Raises:
        ApiError: 400, saying what is wrong and where.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is not valid UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _malformed(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise _malformed("the body is nested too deep") from error
    except ValueError as error:  # a whole number of more digits than Python converts
        raise _malformed("the body holds a number that is too large") from error
    # The standard library lets half a pair through. Backslashes that are text, and whole pairs, are taken away first.
    if _SURROGATE_ESCAPE.search(data) and _SURROGATE_ESCAPE.search(_ESCAPED_TEXT.sub(b"", data)):
        raise _malformed("the body holds a string that is not valid Unicode")
    return value


def _malformed(text: str) -> ApiError:
    return ApiError(400, text, code="malformed_json")


def _no_constant(name: str) -> NoReturn:
    raise _malformed(f"the body is not valid JSON: {name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _malformed("the body holds a number that is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _malformed(f"the body names {name[:64]!r} twice")
        found[name] = value
    return found
