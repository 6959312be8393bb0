"""A process that does as its first message says, and says what came of it: to test the side that started it."""

import hashlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any

from quire.isolation.wire import Begun, Unframer, encode

SYSTEM_SECONDS = 0.5


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    connection = socket.socket(fileno=int(sys.argv[1]))
    frames, messages = Unframer(list, 2**26), iter(())
    order: list[Any] | None = None
    while order is None:
        messages = frames.feed(connection.recv(2**16))
        order = next(messages, None)
    name, value = order
    if name == "die":
        for number in range(3):
            connection.sendall(encode(Begun((str(number),), 1.0, 1.0)))
        _die(value)
    elif name == "digest":
        _digest(connection, frames, list(messages), value)
    elif name == "spend":
        _spend(connection)
    connection.recv(1)  # until the other side has exited
    if name == "stay":
        time.sleep(600)


def _die(how: int) -> None:
    """By a signal, or with an exit status below zero."""
    if how < 0:
        os._exit(-how)
    os.kill(os.getpid(), how)
    signal.pause()


def _digest(connection: socket.socket, frames: Unframer, received: list[Any], count: int) -> None:
    """Of so many messages, in the order in which they came."""
    while len(received) < count:
        received += frames.feed(connection.recv(2**16))
    digest = hashlib.sha256(b"".join(bytes(body) for _, body in received)).hexdigest()
    connection.sendall(encode(Begun((digest,), 1.0, 1.0)))


def _spend(connection: socket.socket) -> None:
    """In another thread than the first, and in the system more than anywhere; then all sleep."""

    def work() -> None:
        while time.thread_time() < SYSTEM_SECONDS:
            os.urandom(2**20)
        connection.sendall(encode(Begun((str(threading.get_native_id()),), time.thread_time(), 1.0)))
        time.sleep(600)

    threading.Thread(target=work, daemon=True).start()


if __name__ == "__main__":
    main()
