"""Reading JSON of unknown origin: bounded in size, depth and number of values, no duplicate keys."""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from quire.errors import ModelFileError

MAX_MARKS = 400_000
"""Most of `{`, `[` and `,` together: what bounds the memory of the parsed value (about 40 MB)."""


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file (or a link to one, as the hub's cache uses) for reading.

    Raises:
        ModelFileError: there is none, it may not be read, or it is a directory, pipe or device, or a Git LFS pointer.
    """
    try:
        # A pipe must not block the open; the flag changes nothing for regular files.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "not a file name"
        raise ModelFileError(f"{path.name}: {reason.lower()}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelFileError(f"{path.name}: not a regular file")
    file = os.fdopen(descriptor, "rb")
    if file.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
        file.close()
        raise ModelFileError(f"{path.name}: a Git LFS pointer, not the file itself; `git lfs pull` fetches it")
    return file


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelFileError: no such file, too large, not JSON, or not an object.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ModelFileError(f"{path.name}: larger than {max_bytes:,} bytes")
    return parse_json_object(data, path.name)


def parse_json_object(data: bytes, name: str) -> dict[str, Any]:
    """The object in `data`.

    Args:
        name: of the file, for errors.

    Raises:
        ModelFileError: not JSON, too many values, nested too deeply, a duplicate key, or not an object.
    """
    if sum(data.count(mark) for mark in (b"{", b"[", b",")) > MAX_MARKS:
        raise ModelFileError(f"{name}: more than {MAX_MARKS:,} values in its JSON")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ModelFileError(f"{name}: JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and numbers of too many digits
        raise ModelFileError(f"{name}: not valid JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{name}: not a JSON object")
    return value


def printable(name: str) -> str:
    """A name from a file, for an error text: one line of at most 100 printable characters."""
    return "".join(c if c.isprintable() else "?" for c in name[:100])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
