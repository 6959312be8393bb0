"""A core's process, from the side that started it: an interpreter of its own, and our end of the socket pair."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quire.isolation.heartbeat import Activity
from quire.isolation.wire import MAX_FRAME_BYTES, RECEIVE_BYTES, ProtocolError, Report, Unframer, encode

CORE_MODULE = "quire.compose.core_process"
LEAVE_SECONDS = 5.0
"""For a process to exit once its socket is closed, and again once it is killed."""

NUM_SPARE_DESCRIPTORS = 16
"""A start takes a socket pair, a pipe and the empty input; other threads may take some meanwhile."""


class CoreExitedError(Exception):
    """The process has ended, or what it sends can no longer be understood.

    Args:
        is_from_outside: it was killed by a person, a service manager or the kernel that lacked memory.
    """

    def __init__(self, reason: str, *, is_from_outside: bool = False) -> None:
        super().__init__(reason)
        self.is_from_outside = is_from_outside


class CoreProcess:
    """One core. Never forked: a fresh interpreter, which inherits one end of a socket pair and nothing else.

    Nothing here waits: what the core is slow to read is kept, and `flush` is called when `has_unsent` and the socket
    can be written.

    Args:
        first: its first message, which says what it is to be.
        niceness: above this process's own.
        module: run with the number of its end of the socket as argument.

    Raises:
        OSError: the system has no descriptor, process or memory for it.
    """

    def __init__(self, first: Any, module: str = CORE_MODULE, *, niceness: int = 0) -> None:
        self._connection, theirs = socket.socketpair()
        self._frames = Unframer(Report, MAX_FRAME_BYTES)
        self._unsent = bytearray()
        self._at_end = False
        try:
            with theirs, _without_interrupts():
                self._process = _spawn(module, theirs.fileno(), niceness)
        except BaseException:
            self._connection.close()
            raise
        self._connection.setblocking(False)
        self.send(first)

    def activity(self) -> Activity | None:
        """What it does; None where the system does not say."""
        threads: dict[int, list[str]] = {}
        with suppress(OSError):  # no descriptor to read it with
            for path in Path(f"/proc/{self.pid}/task").glob("*/stat"):
                with suppress(OSError):  # a thread that has just ended
                    threads[int(path.parent.name)] = _after_name(path)
        if not threads:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        used_s = {thread: (int(fields[11]) + int(fields[12])) / ticks for thread, fields in threads.items()}
        return Activity(used_s, any(fields[0] in "RD" for fields in threads.values()))

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` has something to do."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """Our end of the socket pair."""
        return self._connection.fileno()

    def send(self, message: Any) -> None:
        """Send, or keep to be sent. If the process has exited, `receive` raises."""
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what was kept, as much as the socket takes."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()

    def receive(self) -> list[Any]:
        """All reports that have come.

        Raises:
            CoreExitedError: the process has ended, and all its reports have been returned before.
        """
        if self._at_end:
            raise self._end()
        reports: list[Any] = []
        try:
            while data := self._connection.recv(RECEIVE_BYTES):
                reports += self._frames.feed(data)
            self._at_end = True
        except BlockingIOError:
            pass
        except ConnectionError:
            self._at_end = True
        except ProtocolError as error:
            raise CoreExitedError(str(error)) from error
        return reports

    def end(self, *, at_once: bool) -> None:
        """Let the process go, or kill it; wait until it has exited. Calling it again does nothing."""
        self._connection.close()
        if at_once:
            self._process.kill()
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVE_SECONDS)

    def _end(self) -> CoreExitedError:
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(LEAVE_SECONDS)
            text = f"signal {-status}" if status < 0 else f"exit status {status}"
            return CoreExitedError(text, is_from_outside=-status in (signal.SIGKILL, signal.SIGTERM))
        return CoreExitedError("it closed its socket")


class SpareDescriptors:
    """Held open, and given up while a core is started: so it can be, also when this process may open no more."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._fill()

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Others may be opened meanwhile."""
        self.close()
        try:
            yield
        finally:
            self._fill()

    def close(self) -> None:
        """Give them up."""
        while self._held:
            os.close(self._held.pop())

    def _fill(self) -> None:
        with suppress(OSError):
            while len(self._held) < NUM_SPARE_DESCRIPTORS:
                self._held.append(os.open(os.devnull, os.O_RDONLY))


def _spawn(module: str, fileno: int, niceness: int) -> "subprocess.Popen[bytes]":
    """Start a core in a thread that ends with it: the kernel ends a core with the *thread* that started it
    (`core_server.die_with_parent`), and the caller's may end long before the process."""
    started: Future[subprocess.Popen[bytes]] = Future()

    def run() -> None:
        try:
            # -P: the working directory is no place to import from.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(fileno)],
                pass_fds=[fileno],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())},
            )
            with suppress(ProcessLookupError):
                # Before it has threads: on Linux each has a niceness of its own, from the one that made it.
                os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        except BaseException as error:  # noqa: BLE001 -- raised in the caller's thread
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()

    try:
        threading.Thread(target=run, name="quire-core-owner", daemon=True).start()
    except RuntimeError as error:  # the system has no more threads
        raise OSError(errno.EAGAIN, str(error)) from error
    return started.result()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started here gets no SIGINT: Ctrl-C goes to all processes of a terminal, and this side ends the core.
    The mask belongs to the thread and is inherited, also while the new interpreter imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _after_name(stat: Path) -> list[str]:
    """Fields of a thread (proc_pid_stat(5)), from its state on."""
    return stat.read_text().rpartition(")")[2].split()


def _import_path() -> Sequence[str]:
    """Where this interpreter found the package, before what the environment says."""
    inherited = os.environ.get("PYTHONPATH")
    return [str(Path(__file__).parents[2]), *([inherited] if inherited else [])]
