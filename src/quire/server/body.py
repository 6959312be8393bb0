"""A request body, read with a bound and parsed as strict JSON."""

import asyncio
import json
import math
import re
from typing import Any, NoReturn

import msgspec
from fastapi import Request

from quire.server import limits
from quire.server.errors import ApiError, ClientGoneError

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 415, 413, 408 or 400.
        ClientGoneError: the caller left before the end of the body.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or "content-encoding" in request.headers:
        raise ApiError(415, "the body must be JSON, sent plain as application/json", code="unsupported_media_type")
    try:
        async with asyncio.timeout(limits.BODY_SECONDS.value):
            data = await _read(request)
    except TimeoutError as error:
        raise limits.BODY_SECONDS.error() from error
    value = parse(data)
    if not isinstance(value, dict):
        raise _malformed("the body must be a JSON object")
    return value


async def _read(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.BODY_BYTES.value:
        raise limits.BODY_BYTES.error(f"{int(declared[:20]):,}")
    data = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        data += message.get("body", b"")
        if len(data) > limits.BODY_BYTES.value:
            raise limits.BODY_BYTES.error()
        if not message.get("more_body", False):
            return bytes(data)


def parse(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no number past a double, no name twice, no lone surrogate.

    Raises:
        ApiError: 400, saying what is wrong and where.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
        if _SURROGATE_ESCAPE.search(data):
            msgspec.json.decode(data)  # it refuses half a pair, which the standard library lets through
        return value
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is not valid UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _malformed(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise _malformed("the body is nested too deep") from error
    except msgspec.DecodeError as error:
        raise _malformed("the body holds a string that is not valid Unicode") from error
    except ValueError as error:  # a whole number of more digits than Python converts
        raise _malformed("the body holds a number that is too large") from error


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
            raise _malformed(f"the body names {name!r} twice")
        found[name] = value
    return found
