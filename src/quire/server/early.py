"""Refusals from a request's first bytes: under a flood, to parse each request would take the time of those who run."""

import time
from typing import TYPE_CHECKING

from quire.engine.queue_bound import Caller
from quire.errors import OverloadedError
from quire.server.http.access import log_request
from quire.server.http.errors import as_api_error
from quire.server.http.keys import KeyRequired

if TYPE_CHECKING:
    from quire.server.http.context import ServerContext


class EarlyRefusal:
    """Finds who asks and whether there is a place for them. Everything else is left to those who parse: a head that
    can be read in more than one way, a key that is none.

    Args:
        keys: who may come in; None: everybody, as one caller.
        logs: writes the record of a request for each that is refused.
    """

    def __init__(self, context: "ServerContext", keys: KeyRequired | None, *, logs: bool) -> None:
        self._context = context
        self._keys = keys
        self._logs = logs

    def __call__(self, data: bytes) -> bytes | None:
        """The whole answer to a request with these first bytes, its head complete, that there is no place for; None
        while there is one."""
        begun_s = time.monotonic()
        lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")
        name = "" if self._keys is None else self._caller(self._keys, lines[1:])
        if name is None:
            return None
        try:
            self._context.engine.check_room(Caller(name, self._context.weights.get(name, 1)))
        except OverloadedError as error:
            refusal = as_api_error(error)
            method, path, _ = lines[0].decode().split(" ")
            if self._logs:
                log_request(method, path, refusal.status, time.monotonic() - begun_s)
            return refusal.plain(self._context.error_body(path, refusal))
        return None

    def _caller(self, keys: KeyRequired, lines: list[bytes]) -> str | None:
        if any(line[:1] in (b" ", b"\t") for line in lines):  # the line before goes on
            return None
        named = [line.partition(b":") for line in lines]
        return keys.identify([value.strip() for name, _, value in named if name.lower() == b"authorization"])[0]
