"""Checks in a process of their own, within bounds of time and memory; each ends in one verdict."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.course.exercises import Exercise

START_S = 120.0
"""For the process to begin, before it looks at the file."""
SHOWN_LINES = 20
"""Of what a file printed, the last."""
LOADING = "the file is loaded"
MOST_LINE_BYTES = 2**20
"""Of what the process says at once."""
KINDS = {"checks": list, "passed": str, "failed": str}
"""Of what it says, by its name."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one check."""

    title: str
    passed: bool | None
    """None: it was not run, since the one before ended the process."""
    text: str


class CheckedFile:
    """A learner's file and the process that runs it.

    Args:
        timeout_s: of each check, and of loading the file.
        recording: of a server, for an exercise that has a check with one.
    """

    def __init__(self, exercise: Exercise, path: Path, timeout_s: float, recording: Path | None = None) -> None:
        self._exercise, self._path, self._timeout_s = exercise, path.resolve(), timeout_s
        self._recordings = [] if recording is None else [str(recording.resolve())]
        self.printed: list[str] = []
        """The last lines that the file printed; known when all verdicts are."""

    def verdicts(self) -> Iterator[Verdict]:
        """Run the checks, one after the other."""
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile(dir=folder) as output:
            reader, writer = os.pipe()
            # -P and an empty folder: no module beside the file, nor in the current folder, is taken for another one.
            command = [sys.executable, "-P", "-B", "-m", "quire.course.worker", self._exercise.section]
            process = subprocess.Popen(
                [*command, str(self._path), str(writer), str(self._timeout_s), *self._recordings],
                cwd=folder,
                env={**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                start_new_session=True,
            )
            os.close(writer)
            try:
                yield from self._read(process, reader)
            finally:
                os.close(reader)
                _kill(process)
                output.seek(0)
                self.printed = output.read().decode(errors="replace").splitlines()[-SHOWN_LINES:]

    def _read(self, process: "subprocess.Popen[bytes]", reader: int) -> Iterator[Verdict]:
        lines = _Lines(reader)
        if lines.next(START_S) is None:
            yield Verdict("the process begins", False, f"it did not within {START_S:g} s")
            return
        first = self._next(process, lines, ("checks", "failed"))
        if "failed" in first:
            yield Verdict(LOADING, False, first["failed"])
            return
        titles = [str(one) for one in first["checks"]]
        for place, title in enumerate(titles):
            found = self._next(process, lines, ("passed", "failed"))
            yield Verdict(title, "passed" in found, found.get("passed", found.get("failed", "")))
            if "last" in found:
                yield from (Verdict(one, None, "not run") for one in titles[place + 1 :])
                return

    def _next(self, process: "subprocess.Popen[bytes]", lines: "_Lines", names: tuple[str, ...]) -> dict[str, Any]:
        """What the process says next, under one of the names, or how it ended instead."""
        deadline_s = time.monotonic() + self._timeout_s
        line = lines.next(self._timeout_s)
        if line:
            if (found := _understood(line, names)) is not None:
                return found
            _kill(process)
            return {"failed": "it wrote where the checks tell what they found", "last": True}
        code = None
        if line is not None:  # a file can close the pipe and go on
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0.0, deadline_s - time.monotonic()))
        if code is None:
            _kill(process)
            return {"failed": f"it did not end within {self._timeout_s:g} s", "last": True}
        signals = {one.value: one.name for one in signal.Signals}
        how = f"signal {signals.get(-code, -code)}" if code < 0 else f"exit code {code}"
        return {"failed": f"it ended the process: {how}", "last": True}


class _Lines:
    """Lines of a pipe, each waited for no longer than so long."""

    def __init__(self, reader: int) -> None:
        self._reader, self._read = reader, b""

    def next(self, timeout_s: float) -> bytes | None:
        """The next line, or what is longer than one may be; empty at the end; None when the time is over."""
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            while b"\n" not in self._read and len(self._read) <= MOST_LINE_BYTES:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    return None
                more = os.read(self._reader, 65536)
                if not more:
                    return b""
                self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line


def _understood(line: bytes, names: tuple[str, ...]) -> dict[str, Any] | None:
    """What a line says; None where the worker would not say it so: the file wrote it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or len(found) != 1:
        return None
    ((name, value),) = found.items()
    return found if name in names and isinstance(value, KINDS[name]) else None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
