"""A socket to listen on, and descriptors for connections, had before anything costly is done: this module imports
nothing of the server."""

import errno
import resource
import socket
from contextlib import suppress

from quire.errors import ConfigurationError

LISTEN_BACKLOG = 2048
"""Connections that the system holds until they are accepted."""
ACCEPT_BATCH = 16
"""Connections that are accepted at one time, before any of them is counted."""
MOST_DESCRIPTORS = 2**20
"""Asked for where the system has no bound."""
RESERVED_DESCRIPTORS = 64 + 4 * ACCEPT_BATCH
"""Not for connections: the engine's core and its successor, threads, files, and what is accepted before those that have
to go for it are gone."""
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener(socket.socket):
    """Accepts for asyncio, which asks for as many connections at one time as may wait, and logs each that it cannot
    have: where the table of descriptors is full, thousands of lines a second. This one says so once a second."""

    _has_said = False

    def listen(self, backlog: int = LISTEN_BACKLOG) -> None:
        """Let more wait than are accepted at one time."""
        super().listen(max(backlog, LISTEN_BACKLOG))

    def accept(self) -> tuple[socket.socket, object]:
        """The next connection.

        Raises:
            BlockingIOError: none waits, or there was no descriptor for the last one.
            OSError: there is no descriptor for it.
        """
        if self._has_said:
            self._has_said = False
            raise BlockingIOError
        try:
            return super().accept()
        except OSError as error:
            self._has_said = error.errno in _FULL
            raise


def raise_descriptors() -> int:
    """Let this process open as many descriptors as the system lets it. Returns how many connections it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return max(soft // 4, soft - RESERVED_DESCRIPTORS)


def bind(host: str, port: int, flag: str = "--port") -> Listener:
    """A bound socket: a busy port is found before a model is loaded, and the flag that chooses it is named.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio sets TCP_NODELAY only then, and without it small answers wait 40 ms for an ACK.
    listener = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or "not an address of this machine"
        text = f"cannot listen on {host}:{port}: {reason.lower()}"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            text += f" ({flag} N, or {flag} 0 for a free one)"
        raise ConfigurationError(text, field=flag.strip("-").replace("-", "_")) from error
    return listener
