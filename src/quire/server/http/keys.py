"""API keys: which are known, and which of them a request came with.

A caller is known by a digest of the key, which names prefix caches and queues. Without keys all callers are one, "".
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.engine.queue import MAX_CALLER_WEIGHT
from quire.errors import ConfigurationError
from quire.server.http.errors import ApiError, error_response

CALLER = "quire.caller"
"""The entry of an ASGI scope that holds the caller."""
ADMIN = "quire.admin"
"""The entry that is true when the admin key came."""


def caller_of(scope: Scope) -> str:
    """The caller: the same text for the same key, telling nothing about it; "" on a server without keys."""
    caller: str = scope.get(CALLER, "")
    return caller


def is_admin(request: Request) -> bool:
    """Whether the admin key came with a request."""
    return bool(request.scope.get(ADMIN, False))


def caller_name(api_key: str) -> str:
    """The caller that a key stands for."""
    return hashlib.sha256(b"caller\0" + api_key.encode()).hexdigest()[:32]


def read_keys(path: str) -> dict[str, int]:
    """Keys and their weights from a file: on each line a key and, if it is not 1, its weight; `#` begins a comment.

    Raises:
        ConfigurationError: the file cannot be read, or a line of it is wrong. Keys are not shown.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError("the file of --api-key-file cannot be read as text", field="api_key_file") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        weight = words[1] if len(words) > 1 else "1"
        if len(words) > 2 or words[0] in found or not weight.isdecimal() or not 1 <= int(weight) <= MAX_CALLER_WEIGHT:
            raise ConfigurationError(
                f"line {number} of --api-key-file must be a new key and a weight from 1 to {MAX_CALLER_WEIGHT}",
                field="api_key_file",
            )
        found[words[0]] = int(weight)
    if not found:
        raise ConfigurationError("the file of --api-key-file holds no key", field="api_key_file")
    return found


def cache_namespace(caller: str, cache_salt: str) -> str:
    """The prefix cache of a caller's requests with this salt: a digest, of the same size whatever the client sent."""
    if not caller and not cache_salt:
        return ""
    return hashlib.blake2b(f"{caller}\0{cache_salt}".encode(), digest_size=16).hexdigest()


class KeyRequired:
    """Lets nothing but `open_paths` through without one of the keys. Deny is the default: new routes need one too.

    The admin key opens what the others do. Where there is an admin key alone, callers need none.
    """

    def __init__(
        self, app: ASGIApp, *, api_keys: Iterable[str], open_paths: frozenset[str], admin_key: str | None = None
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._admin = None if admin_key is None else hashlib.sha256(admin_key.encode()).digest()
        self._callers = [(hashlib.sha256(key.encode()).digest(), caller_name(key)) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] == "lifespan" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        sent = credentials(scope.get("headers", ()))
        caller, admin = self.identify(sent)
        if caller is not None:
            scope[CALLER], scope[ADMIN] = caller, admin
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        text = "this API key is not known here" if sent else "this server needs an API key"
        text += ": send one as 'Authorization: Bearer KEY', or as 'x-api-key: KEY'"
        refusal = ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error_response(scope, refusal)(scope, receive, send)

    def identify(self, authorizations: Sequence[bytes]) -> tuple[str | None, bool]:
        """The caller, None without a known key, and whether the key is the admin's, from what `credentials` gave."""
        digest = _digest_of(authorizations)
        admin = self._admin is not None and digest is not None and hmac.compare_digest(digest, self._admin)
        return "" if admin or not self._callers else self._caller(digest), admin

    def _caller(self, digest: bytes | None) -> str | None:
        """Digests are compared, all of them, in a time that does not depend on where they differ."""
        found = None
        for known, caller in self._callers:
            if digest is not None and hmac.compare_digest(digest, known):
                found = caller
        return found


def credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """What `Authorization` headers hold, and keys in `x-api-key` in the same form. Names are in small letters."""
    found = []
    for name, value in headers:
        if name == b"authorization":
            found.append(value)
        elif name == b"x-api-key":
            found.append(b"Bearer " + value)
    return found


def _digest_of(authorizations: Sequence[bytes]) -> bytes | None:
    """Of the one bearer token that came."""
    if len(authorizations) != 1:
        return None
    scheme, _, key = authorizations[0].partition(b" ")
    return hashlib.sha256(key.strip()).digest() if scheme.lower() == b"bearer" else None
