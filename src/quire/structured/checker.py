"""Checks shapes in a process of their own, so that no schema can stop or end the process that serves.

The first request for a shape starts the process; it stays, and takes one job after the other. A job that exceeds its
bounds ends it: the job's request is refused, and the next one starts another process.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

from quire.errors import InvalidRequestError
from quire.structured.source import refusal
from quire.structured.worker import JOB_CPU_S, TOO_MUCH_MEMORY
from quire.structured_params import FIELD, StructuredOutputsParams

PACKAGE = str(Path(__file__).parents[2])
"""Where this interpreter found the package."""
KEPT_BYTES = 2**24
"""Of answers, with their questions."""
_LATEST_S = 120.0
"""A worker that has neither answered nor used up its processor time by then is stuck."""

_Question = tuple[tuple[str, Any], ...]


class ShapeChecker:
    """Says of `StructuredOutputsParams` which grammar they are. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Of what is kept."""
        self._turn = threading.Lock()
        """Of the worker. What is known is said meanwhile."""
        self._worker: subprocess.Popen[bytes] | None = None
        self._kept: OrderedDict[_Question, str | InvalidRequestError] = OrderedDict()
        self._kept_bytes = 0

    def source(self, params: StructuredOutputsParams) -> str:
        """The grammar to compile.

        Raises:
            InvalidRequestError: a shape that does not compile within the bounds; it names the field.
        """
        question = _question(params)
        found = self._known(question)
        if found is None:
            with self._turn:
                found = self._known(question)  # another may have asked for it meanwhile
                if found is None:
                    found = self._ask(question, params)
        if isinstance(found, InvalidRequestError):
            raise InvalidRequestError(found.message, param=found.param)
        return found

    def knows(self, params: StructuredOutputsParams) -> bool:
        """Whether `source` answers at once."""
        return self._known(_question(params)) is not None

    def _known(self, question: _Question) -> str | InvalidRequestError | None:
        with self._lock:
            if question in self._kept:
                self._kept.move_to_end(question)
            return self._kept.get(question)

    def close(self) -> None:
        """End the process."""
        with self._turn:
            self._stop()

    def _ask(self, question: _Question, params: StructuredOutputsParams) -> str | InvalidRequestError:
        worker = self._worker
        if worker is None or worker.poll() is not None:
            self._stop()
            worker = self._worker = subprocess.Popen(
                # -P: the working directory is no place to import from.
                [sys.executable, "-P", "-m", "quire.structured.worker"],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH")))),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert worker.stdin is not None and worker.stdout is not None
        watch = threading.Timer(_LATEST_S, worker.kill)
        watch.daemon = True
        watch.start()
        line, code = b"", None
        try:
            with suppress(BrokenPipeError):
                worker.stdin.write(json.dumps(dict(question)).encode() + b"\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
        finally:
            watch.cancel()
            if not line:
                code = self._stop()
        if not line and code == -signal.SIGABRT:  # so ends what is refused memory
            return refusal(params.kind, TOO_MUCH_MEMORY)
        if not line and code != -signal.SIGPROF:
            return refusal(params.kind, "could not be compiled: the compiler ended, or was stuck")
        if not line:
            found: str | InvalidRequestError = refusal(params.kind, f"takes more than {JOB_CPU_S:g} s to compile")
        else:
            answer = json.loads(line)
            found = answer["source"] if "source" in answer else InvalidRequestError(answer["error"], param=FIELD)
        self._keep(question, found)
        return found

    def _keep(self, question: _Question, answer: str | InvalidRequestError) -> None:
        with self._lock:
            self._kept[question] = answer
            self._kept_bytes += _size(question, answer)
            while self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= _size(*self._kept.popitem(last=False))

    def _stop(self) -> int | None:
        worker, self._worker = self._worker, None
        if worker is None:
            return None
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            return worker.wait(5)
        worker.kill()
        return worker.wait()


def _question(params: StructuredOutputsParams) -> _Question:
    """Its texts are shared with the parameters, and hashed once."""
    values = ((one.name, getattr(params, one.name)) for one in dataclasses.fields(params))
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in values)


def _size(question: _Question, answer: str | InvalidRequestError) -> int:
    return (
        sum(len(str(value)) for _, value in question) + len(answer if isinstance(answer, str) else answer.message) + 200
    )
