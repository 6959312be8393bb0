"""The core in a process of its own: its commands in, its outputs out.

::

    socket ──> reader thread: decode, queue ──> the loop: add, abort, step ──> socket
                     └ end of file: the other side has exited, and this process exits at once

The reader never waits for the loop, so the other side can always send; the loop may wait for the other side to read.
What arrives is not trusted: it is decoded into declared types and checked against the limits of the API again.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from quire.core.engine_core import EngineCore, Executor
from quire.core.plan import StepPlan, StepResult, TokenDelta
from quire.core.request import NewRequest
from quire.engine.channel import CoreInfo, CoreOutputs, LocalChannel
from quire.errors import InvalidRequestError
from quire.isolation.heartbeat import StepAllowance
from quire.isolation.wire import (
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
from quire.sampling_params import MAX_BAD_WORDS, MAX_STOP_STRING_BYTES, SamplingParams
from quire.structured_params import MAX_SOURCE_BYTES

PR_SET_PDEATHSIG = 1
MAX_ID_BYTES = 64
MAX_SALT_BYTES = 1024
"""More than `InputProcessor` lets in, whose module would bring the tokenizer into this process."""


def die_with_parent() -> None:
    """Signals of a terminal or a service manager are for the parent, which finishes what runs. This process ends with
    it by two means: by the end of file on the socket, and, on Linux, by the kernel, which does so when the thread ends
    that started it: that thread must live as long as the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class AnnouncingExecutor:
    """An executor that announces a step to the other side before it begins: which requests enter, how long it may take.

    It announces only what differs from the step before: most steps begin in silence.
    """

    def __init__(self, executor: Executor, connection: socket.socket, allowance: StepAllowance) -> None:
        self._executor = executor
        self._connection = connection
        self._allowance = allowance
        self._announced_s = 0.0

    def execute(self, plan: StepPlan) -> tuple[Any, float, float]:
        """Announce, then start."""
        work = sum(item.num_tokens * (1 + (item.start + item.num_tokens) / 1024) for item in plan.scheduled)
        allowed_s = self._allowance.seconds_for(work)
        if plan.new or allowed_s != self._announced_s:
            entered = tuple(new.request_id for new in plan.new)
            self._connection.sendall(encode(Begun(entered, allowed_s, self._allowance.idle_timeout_s)))
            self._announced_s = allowed_s
        start_s = time.monotonic()
        return self._executor.execute(plan), work, start_s

    def collect(self, handle: tuple[Any, float, float]) -> StepResult:
        """Wait, and learn how long it took."""
        inner, work, start_s = handle
        result = self._executor.collect(inner)
        if work:  # an empty step, where every request is held or in flight, says nothing of others
            self._allowance.observe(work, time.monotonic() - start_s)
        return result

    def run_idle_work(self) -> bool:
        """See the executor."""
        return self._executor.run_idle_work()

    def clear(self) -> None:
        """See the executor."""
        self._executor.clear()

    def give_back(self, runs: Sequence[tuple[int, int]]) -> None:
        """See the executor."""
        self._executor.give_back(runs)

    def close(self) -> None:
        """Close the executor."""
        self._executor.close()


class CoreServer:
    """Serves one core to the other end of `connection`, for as long as that end lives.

    Args:
        release: `EngineArgs.release_idle_memory`.
    """

    def __init__(self, core: EngineCore, info: CoreInfo, connection: socket.socket, release: str = "no") -> None:
        self._core = core
        self._channel = LocalChannel(core, release)
        self._info = info
        self._connection = connection
        self._commands: deque[Command] = deque()

    def run(self) -> None:
        """Serve. Never returns: the process ends with the other side, or by an exception of the core."""
        threading.Thread(target=self._read, name="quire-reader", daemon=True).start()
        while True:
            self._channel.wait()
            self._take()
            for outputs in self._channel.collect():
                self._send(outputs)

    def _read(self) -> None:
        """In a thread of its own. It ends the process, whatever the loop is doing."""
        frames = Unframer(Command, max_command_bytes(self._info.max_model_len))
        status = 0
        try:
            while data := self._connection.recv(RECEIVE_BYTES):
                self._commands.extend(frames.feed(data))
                self._channel.wake()
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
                aborted |= bool(self._core.scheduler.abort(command.request_id))
            elif isinstance(command, Check):
                self._core.check()
        if refused or (aborted and not self._core.scheduler.has_work):
            self._send(CoreOutputs(tuple(refused), None, self._channel.gauges))

    def _add(self, command: Add) -> list[TokenDelta]:
        try:
            check_new(command.new, self._info)
            self._core.scheduler.add(command.new)
        except InvalidRequestError as error:
            return [TokenDelta(command.new.request_id, (), finish_reason="error", error=error.message)]
        return []

    def _send(self, outputs: CoreOutputs) -> None:
        self._connection.sendall(encode(Stepped(outputs)))


def check_new(new: NewRequest, info: CoreInfo) -> None:
    """Refuse what `InputProcessor` would have refused. The scheduler itself checks lengths.

    Raises:
        InvalidRequestError: naming the field.
    """
    spec, resume = new.sampling, new.resume
    SamplingParams(
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        typical_p=spec.typical_p,
        presence_penalty=spec.penalties.presence,
        frequency_penalty=spec.penalties.frequency,
        repetition_penalty=spec.penalties.repetition,
        min_tokens=spec.min_tokens,
        max_tokens=None,
        logprobs=spec.num_logprobs,
        prompt_logprobs=spec.num_prompt_logprobs,
        stop_token_ids=sorted({*spec.stop_token_ids} - {*new.eos_token_ids}),
        allowed_token_ids=spec.allowed_token_ids or None,
        logprob_token_ids=spec.logprob_token_ids or None,
        logit_bias=dict(spec.logit_bias),
    )
    _require(len(new.request_id.encode()) <= MAX_ID_BYTES, "request_id")
    _require(len(new.cache_salt.encode(errors="replace")) <= MAX_SALT_BYTES, "cache_salt")
    _require(len(new.caller.encode(errors="replace")) <= MAX_ID_BYTES, "caller")
    _require(0 <= spec.seed < 2**64, "seed")
    _require(new.needs_output_tokens or not spec.needs_output_tokens, "needs_output_tokens")
    _require(len(new.eos_token_ids) <= len(spec.stop_token_ids), "eos_token_ids")
    _require(len(spec.bad_words) <= 2 * MAX_BAD_WORDS, "bad_words")
    _require(all(0 < len(word) <= MAX_STOP_STRING_BYTES + 1 for word in spec.bad_words), "bad_words")
    _require(spec.grammar is None or len(spec.grammar.source) <= 8 * MAX_SOURCE_BYTES, "structured_outputs")
    _require(0 <= resume.num_prompt_logprobs < info.max_model_len, "resume")
    _require(0 <= resume.num_cached_tokens < info.max_model_len, "resume")
    lists: dict[str, Iterable[Iterable[int]]] = {
        "prompt_token_ids": (new.prompt_token_ids,),
        "resume": (resume.output_token_ids,),
        "stop_token_ids": (spec.stop_token_ids, new.eos_token_ids),
        "allowed_token_ids": (spec.allowed_token_ids,),
        "logprob_token_ids": (spec.logprob_token_ids,),
        "logit_bias": ([token_id for token_id, _ in spec.logit_bias],),
        "bad_words": spec.bad_words,
    }
    for name, values in lists.items():
        for ids in values:
            _require(min(ids, default=0) >= 0 and max(ids, default=0) < info.vocab_size, name)


def _require(holds: bool, field: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{field} is out of range", param=field)
