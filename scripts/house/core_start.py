"""What importing the scheduler loads, and how long it takes, in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

from scripts.house.tree import Report

SCRIPT = """
import sys, time
start = time.perf_counter()
import quire.core.scheduler
elapsed_s = time.perf_counter() - start
print(round(1000 * elapsed_s, 1), *sorted({name.split(".")[0] for name in sys.modules} & {heavy}))
"""
HEAVY = {"numpy", "torch", "transformers", "asyncio", "socket", "starlette", "tokenizers"}
AIM_MS = 50


def check_core_start(root: Path) -> Report:
    """Heavy modules are a breach; the time (best of three) is only reported: it depends on the machine."""
    if not (root / "src/quire/core/scheduler.py").exists():
        return Report("src/quire/core/scheduler.py does not exist yet")
    runs = [_run(root) for _ in range(3)]
    best_ms = min(milliseconds for milliseconds, _ in runs)
    loaded = runs[0][1]
    breaches = [f"import quire.core.scheduler loads {name}" for name in loaded]
    return Report(f"quire.core.scheduler imports in {best_ms:.0f} ms (aim: {AIM_MS} ms)", breaches)


def _run(root: Path) -> tuple[float, list[str]]:
    code = SCRIPT.replace("{heavy}", repr(HEAVY))
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(root / "src"), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    milliseconds, *loaded = done.stdout.split()
    return float(milliseconds), loaded
