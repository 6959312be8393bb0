"""`python -m quire.compose.core_process FD`: a core in a process of its own, at the end of an inherited socket.

Started by `quire.engine.core_process` and by nobody else. It lives as long as the process that started it.
"""

import ctypes
import signal
import socket
import sys
from pathlib import Path

from quire.engine.wire import MAX_FRAME_BYTES, RECEIVE_BYTES, ProtocolError, Ready, Start, StartFailed, Unframer, encode
from quire.errors import ConfigurationError

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Take the first message, build the core that it asks for, serve."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    _die_with_parent()
    start = _first_message(connection)
    try:
        from quire.compose.core import compose_core
        from quire.engine.core_server import AnnouncingExecutor, CoreServer

        parts = compose_core(start.args, Path(start.directory))
    except ConfigurationError as error:
        connection.sendall(encode(StartFailed(type(error).__name__, error.message, error.field)))
        return
    connection.sendall(encode(Ready(parts.facts)))
    CoreServer(parts.core(AnnouncingExecutor(parts.executor, connection)), parts.facts, connection).run()


def _die_with_parent() -> None:
    """Signals of a terminal or a service manager are for the parent, which finishes what runs. That this process ends
    with it is made sure of twice: by the end of file on the socket, and, on Linux, by the kernel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_message(connection: socket.socket) -> Start:
    frames = Unframer(Start, MAX_FRAME_BYTES)
    while data := connection.recv(RECEIVE_BYTES):
        for message in frames.feed(data):
            assert isinstance(message, Start)
            return message
    raise ProtocolError("nobody asked for a core")


if __name__ == "__main__":
    main()
