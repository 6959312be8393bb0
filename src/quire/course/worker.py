"""`python -m quire.course.worker SECTION FILE DESCRIPTOR TIMEOUT [RECORDING]`: the process that runs a file, no more.

It says lines of JSON on the descriptor: `{"begun": true}` when all but the file is loaded; `{"checks": [titles]}` when
the file is, or `{"failed": text}` where it cannot be; then for each check `{"passed": remark}` or `{"failed": text}`.
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from quire.course.checking import Check, Failed, said, title
from quire.course.exercises import Exercise, find

MEMORY_BYTES = 2**30
"""That a file may take beyond what Python and numpy take."""
PRINTED_BYTES = 2**20
"""That it may print, or write to any one file."""
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG, prctl(2)."""


def load(path: str) -> ModuleType:
    """The learner's file as a module."""
    spec = importlib.util.spec_from_file_location("learner", path)
    if spec is None or spec.loader is None:
        raise Failed("its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["learner"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def require_names(module: ModuleType, exercise: Exercise) -> None:
    """Raise `Failed` where what the exercise asks for is not defined."""
    missing = [name for name in exercise.wanted if not callable(getattr(module, name, None))]
    if missing:
        raise Failed(f"it does not define {', '.join(missing)}")


def end_with_parent() -> None:
    """Let the system end this process when the one that started it is gone, even if it was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def limit_process(cpu_s: int) -> None:
    """Bound what the process may take. Where the system does not count address space, memory has no bound.

    Args:
        cpu_s: seconds from here on, for when no `check` is left that looks at the clock.
    """
    used = 0
    with contextlib.suppress(OSError):
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    for limit, size in (
        (resource.RLIMIT_AS, used + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, PRINTED_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, math.ceil(time.process_time()) + cpu_s),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (size, size))


def main() -> None:
    """Load, check, tell."""
    end_with_parent()
    section, path, descriptor, timeout_s, *recorded = sys.argv[1:]
    exercise, told = find(section), int(descriptor)

    def tell(**words: Any) -> None:
        try:
            os.write(told, (json.dumps(words) + "\n").encode())
        except OSError:  # the file closed it, or the reader is gone
            _leave(1)

    known = import_module(f"quire.course.checks.{exercise.name}")
    checks: list[Check] = [*known.CHECKS, *(known.recorded(one) for one in recorded)]
    limit_process((1 + len(checks)) * (1 + math.ceil(float(timeout_s))))
    tell(begun=True)
    try:
        module = load(path)
        require_names(module, exercise)
    except BaseException as error:  # noqa: BLE001 - a learner's file may raise anything
        tell(failed=str(error) if isinstance(error, Failed) else said(error, path))
        _leave()
    tell(checks=[title(check) for check in checks])
    for check in checks:
        try:
            tell(passed=check(module) or "")
        except Failed as error:
            tell(failed=str(error))
        except BaseException as error:  # noqa: BLE001 - SystemExit, too
            tell(failed=said(error, path))
    _leave()


def _leave(code: int = 0) -> None:
    """At once, whatever threads the file has started."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
