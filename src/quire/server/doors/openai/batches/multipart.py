"""A form with a file in it (RFC 7578), read from a body that is there as a whole."""

import re
from dataclasses import dataclass

from quire.errors import InvalidRequestError
from quire.server.http.errors import ApiError

MOST_PARTS = 16
MOST_HEAD_BYTES = 4096
MOST_TEXT_BYTES = 4096
_BOUNDARY = re.compile(r'boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(r';\s*name="((?:[^"\\\r\n]|\\.)*)"', re.IGNORECASE)
_FILENAME = re.compile(r';\s*filename="((?:[^"\\\r\n]|\\.)*)"', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Form:
    """Texts by name, and the one file."""

    texts: dict[str, str]
    filename: str
    content: bytes


def boundary_of(content_type: str) -> bytes:
    """What stands between the parts.

    Raises:
        ApiError: 415, the body is no form.
    """
    found = _BOUNDARY.search(content_type)
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data" or found is None:
        raise ApiError(415, "the body must be sent as multipart/form-data", code="unsupported_media_type")
    return b"--" + (found[1] or found[2]).encode()


def parse_form(data: bytearray, boundary: bytes) -> Form:
    """The form.

    Raises:
        InvalidRequestError: it cannot be read, has no file, or has a name twice.
    """
    pieces = (b"\r\n" + bytes(data)).split(b"\r\n" + boundary, MOST_PARTS + 2)
    if len(pieces) < 3 or len(pieces) > MOST_PARTS + 2 or not pieces[-1].startswith(b"--"):
        raise _malformed(f"it must hold 1 to {MOST_PARTS} parts, and end")
    texts: dict[str, str] = {}
    file: tuple[str, bytes] | None = None
    for piece in pieces[1:-1]:
        head, blank, content = piece.partition(b"\r\n\r\n")
        if not blank or len(head) > MOST_HEAD_BYTES:
            raise _malformed("a part has no end of its headers")
        disposition = next((line for line in head.split(b"\r\n") if line[:20].lower() == b"content-disposition:"), b"")
        shown = disposition.decode(errors="replace")
        name, filename = _NAME.search(shown), _FILENAME.search(shown)
        if name is None or name[1] in texts or (name[1] == "file" and file is not None):
            raise _malformed("each part must have a name of its own")
        if name[1] == "file":
            file = (filename[1] if filename else "file")[:256], content
        elif len(content) > MOST_TEXT_BYTES:
            raise InvalidRequestError(f"{name[1][:64]} is limited to {MOST_TEXT_BYTES} bytes", param=name[1][:64])
        else:
            texts[name[1]] = content.decode(errors="replace")
    if file is None:
        raise InvalidRequestError("file is required and must be a file", param="file")
    return Form(texts, *file)


def _malformed(text: str) -> ApiError:
    return ApiError(400, f"the form cannot be read: {text}", code="malformed_form")
