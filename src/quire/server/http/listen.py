"""A socket to listen on, had before anything costly is done: this module imports nothing of the server."""

import socket

from quire.errors import ConfigurationError


def bind(host: str, port: int) -> socket.socket:
    """A bound socket: a busy port is found before a model is loaded.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named: asyncio sets TCP_NODELAY only then, and without it small answers wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or "not an address of this machine"
        raise ConfigurationError(f"cannot listen on {host}:{port}: {reason.lower()}", field="port") from error
    return listener
