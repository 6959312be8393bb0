"""The core in a process of its own: what the other side asks, step by step, and what came of it.

::

    socket ──> reader thread: decode, queue ──> the loop: add, abort, step ──> socket
                     └ end of file: the other side has exited, and this process exits at once

The reader never waits for the loop, so the other side can always send; the loop may wait for the other side to read.
What arrives is not trusted: it is decoded into declared types and held against the limits of the door again.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from typing import Any

from quire.core.engine_core import EngineCore, PlanExecutor
from quire.core.plan import StepPlan, StepResult, TokenDelta
from quire.engine.admission import check_new
from quire.engine.channel import CoreInfo, CoreOutputs, core_gauges, step_outputs, wait_for_work
from quire.engine.step_allowance import StepAllowance
from quire.engine.wire import (
    RECEIVE_BYTES,
    Abort,
    Add,
    Begun,
    Check,
    Command,
    ProtocolError,
    Stepped,
    Unframer,
    encode,
    max_command_bytes,
)
from quire.errors import InvalidRequestError

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Signals of a terminal or a service manager are for the parent, which finishes what runs. This process ends with
    it by two means: by the end of file on the socket, and, on Linux, by the kernel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class AnnouncingExecutor:
    """An executor that announces a step to the other side before it begins: which requests enter, how long it may take.

    It announces only what differs from the step before: most steps begin in silence.
    """

    def __init__(self, executor: PlanExecutor, connection: socket.socket, allowance: StepAllowance) -> None:
        self._executor = executor
        self._connection = connection
        self._allowance = allowance
        self._told_s = 0.0

    def execute(self, plan: StepPlan) -> tuple[Any, float, float]:
        """Tell, then begin."""
        work = sum(item.num_tokens * (1 + (item.start + item.num_tokens) / 1024) for item in plan.scheduled)
        allowed_s = self._allowance.seconds_for(work)
        if plan.new or allowed_s != self._told_s:
            entered = tuple(new.request_id for new in plan.new)
            self._connection.sendall(encode(Begun(entered, allowed_s, self._allowance.idle_timeout_s)))
            self._told_s = allowed_s
        start_s = time.monotonic()
        return self._executor.execute(plan), work, start_s

    def collect(self, handle: tuple[Any, float, float]) -> StepResult:
        """Wait, and learn how long it took."""
        inner, work, start_s = handle
        result = self._executor.collect(inner)
        self._allowance.observe(work, time.monotonic() - start_s)
        return result

    def run_idle_work(self) -> bool:
        """See the executor."""
        return self._executor.run_idle_work()

    def close(self) -> None:
        """Close the executor."""
        self._executor.close()


class CoreServer:
    """Serves one core to the other end of `connection`, for as long as that end lives."""

    def __init__(self, core: EngineCore, info: CoreInfo, connection: socket.socket) -> None:
        self._core = core
        self._info = info
        self._connection = connection
        self._commands: deque[Command] = deque()
        self._arrived = threading.Event()

    def run(self) -> None:
        """Serve. Never returns: the process ends with the other side, or by an exception of the core."""
        threading.Thread(target=self._read, name="quire-reader", daemon=True).start()
        while True:
            wait_for_work(self._core, self._arrived)
            self._arrived.clear()
            self._take()
            if self._core.has_work:
                self._tell(step_outputs(self._core))

    def _read(self) -> None:
        """In a thread of its own. It ends the process, whatever the loop is doing."""
        frames = Unframer(Command, max_command_bytes(self._info.max_model_len))
        status = 0
        try:
            while data := self._connection.recv(RECEIVE_BYTES):
                self._commands.extend(frames.feed(data))
                self._arrived.set()
        except ProtocolError:
            status = 3
        except OSError:
            pass
        finally:
            os._exit(status)

    def _take(self) -> None:
        """All commands that have come. Refusals, and the state of a core that has nothing left to do, are sent."""
        refused: list[TokenDelta] = []
        aborted = False
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Add):
                refused += self._add(command)
            elif isinstance(command, Abort):
                aborted |= bool(self._core.abort(command.request_id))
            elif isinstance(command, Check):
                self._core.check()
        if refused or (aborted and not self._core.has_work):
            self._tell(CoreOutputs(tuple(refused), None, core_gauges(self._core)))

    def _add(self, command: Add) -> list[TokenDelta]:
        try:
            check_new(command.new, self._info)
            self._core.add(command.new)
        except InvalidRequestError as error:
            return [TokenDelta(command.new.request_id, (), finish_reason="error", error=error.message)]
        return []

    def _tell(self, outputs: CoreOutputs) -> None:
        self._connection.sendall(encode(Stepped(outputs)))
