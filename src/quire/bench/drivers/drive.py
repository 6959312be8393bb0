"""One engine in a process of its own, driven by lines of JSON: `python drive.py DRIVER.py`.

    in   {"model": ..., "dtype": ..., "threads": ..., ...}        once: the settings
    out  {"ready": {"versions": {...}, "settings": {...}, "kv_bytes": ..., "is_client": false}}
    in   {"run": [{"prompt_token_ids": [...], "num_output": ...}, ...]}
    out  {"ran": {"elapsed_s": ..., "ttfts_s": [...], "output_lens": [...], "token_ids": [...], ...}}

and so on until the input ends. What goes wrong is `{"error": text, "missing": true}`, where missing says that the
engine is not installed. This runs under the interpreter of the engine, where Quire need not be: no driver imports it.
"""

import ctypes
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol

DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG, prctl(2)."""


class Driver(Protocol):
    """What a driver's `start(settings)` returns."""

    facts: dict[str, Any]
    """What `ready` holds."""

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer requests that all come at once: what `ran` holds."""

    def close(self) -> None:
        """End what it started."""


def end_with_parent() -> None:
    """Let the system end this process when the one that started it is gone, even if it was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def keep_to(processors: list[int]) -> None:
    """Let this process and all that it starts run on these alone (where the system can); none: wherever they may."""
    if processors and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)


def starter(path: str) -> Callable[[dict[str, Any]], Driver]:
    """`start` of a driver's file, which is found by its path: its folder is no place to import from."""
    spec = importlib.util.spec_from_file_location("driver", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["driver"] = module
    spec.loader.exec_module(module)
    start: Callable[[dict[str, Any]], Driver] = module.start
    return start


def main() -> None:
    """Answer until the input ends. What libraries print goes to standard error."""
    end_with_parent()
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    driver: Driver | None = None
    try:
        settings = json.loads(sys.stdin.readline())
        keep_to(settings.get("processors", []))
        driver = starter(sys.argv[1])(settings)
        say(ready=driver.facts)
        for line in sys.stdin:
            say(ran=driver.run(json.loads(line)["run"]))
    except Exception as error:  # noqa: BLE001 -- sent to the one that drives, which shows it
        missing = isinstance(error, ModuleNotFoundError)
        text = " ".join((str(error) if missing else f"{type(error).__name__}: {error}").split())
        say(error=text[:500], missing=missing)
    finally:
        if driver is not None:
            driver.close()


if __name__ == "__main__":
    main()
