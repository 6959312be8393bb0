"""`python -m quire.compose.core_process FD`: a core in its own process, at the end of an inherited socket.

Started by `quire.isolation.core_process` alone. It lives as long as the process that started it.
"""

import logging
import socket
import sys
from pathlib import Path

from quire.compose.core import compose_core
from quire.errors import ConfigurationError
from quire.isolation.core_server import AnnouncingExecutor, CoreServer, die_with_parent
from quire.isolation.heartbeat import StepAllowance
from quire.isolation.wire import (
    MAX_FRAME_BYTES,
    RECEIVE_BYTES,
    ProtocolError,
    Ready,
    Start,
    StartFailed,
    Unframer,
    encode,
)


def main() -> None:
    """Take the first message, build the core that it asks for, serve."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent()
    start = _first_message(connection)
    if start.args.verify_cached_blocks:
        logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")
    try:
        parts = compose_core(start.args, Path(start.model_path), share=start.share)
    except ConfigurationError as error:
        _say(connection, StartFailed(type(error).__name__, error.message, error.field))
        return
    if not _say(connection, Ready(parts.info)):
        return
    allowance = StepAllowance(parts.host_weight_bytes, start.args.hang_timeout)
    executor = AnnouncingExecutor(parts.executor, connection, allowance)
    CoreServer(parts.core(executor), parts.info, connection, start.args.release_idle_memory).run()


def _say(connection: socket.socket, message: Ready | StartFailed) -> bool:
    """Send a message. False: the other side has gone while this one loaded, and there is nothing to do."""
    try:
        connection.sendall(encode(message))
    except ConnectionError:
        return False
    return True


def _first_message(connection: socket.socket) -> Start:
    frames = Unframer(Start, MAX_FRAME_BYTES)
    while data := connection.recv(RECEIVE_BYTES):
        for message in frames.feed(data):
            assert isinstance(message, Start)
            return message
    raise ProtocolError("no core was asked for")


if __name__ == "__main__":
    main()
