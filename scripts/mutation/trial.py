"""Runs tests in a copy of the tree, in a process group of their own and for a limited time."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from threading import Event
from typing import IO

from scripts.mutation.tree_copy import PLUGIN, TreeCopy

MEMORY_BYTES = 8 * 2**30
"""What one process may take: a fault that allocates without end must not take the machine with it."""
_FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
# The plugin of schemathesis takes a second to import, and no test uses it.
_PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "-p", PLUGIN]
_NO_TESTS_EXITS = (4, 5)  # pytest: there is no such file or test; nothing was collected


class Ending(Enum):
    """How a run of tests ended."""

    PASSED = "passed"
    FAILED = "failed"
    HUNG = "hung"
    NO_TESTS = "no tests"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of tests."""

    ending: Ending
    seconds: float
    failure: str = ""
    """The id of the first test that failed, as far as pytest could say it."""


def run_tests(copy: TreeCopy, tests: Sequence[str], limit_s: float, stop: Event | None = None) -> Trial:
    """Run pytest up to the first failure, or until `stop` is set. Nothing that it started is left running."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [*_PYTEST, *tests],
            cwd=copy.root,
            env=copy.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _limit_memory(process.pid)
            code = _exit_code(process, begun + limit_s, stop)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - begun
        if code is None:
            return Trial(Ending.HUNG if stop is None or not stop.is_set() else Ending.STOPPED, seconds)
        if code == 0:
            return Trial(Ending.PASSED, seconds)
        if code in _NO_TESTS_EXITS:
            return Trial(Ending.NO_TESTS, seconds)
        return Trial(Ending.FAILED, seconds, _first_failure(output))


def _exit_code(process: subprocess.Popen[bytes], end_s: float, stop: Event | None) -> int | None:
    """None if it still runs when the time is over, or when it is to stop."""
    while time.monotonic() < end_s and (stop is None or not stop.is_set()):
        with suppress(subprocess.TimeoutExpired):
            return process.wait(min(1.0, max(0.0, end_s - time.monotonic())))
    return None


def _limit_memory(pid: int) -> None:
    if sys.platform == "linux":
        import resource

        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


def _first_failure(output: IO[str]) -> str:
    output.seek(0)
    found = _FIRST_FAILURE.search(output.read())
    return found.group(1) if found else ""
