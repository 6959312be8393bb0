"""Seconds from the command to its first byte of answer, and the peak memory of the process: medians.

    python benchmarks/first_token.py [RUNS] [-- COMMAND ...]

The command is `quire generate --quiet "What is the KV cache?"` with this interpreter unless another is named.
"""

import os
import statistics
import subprocess
import sys
import time

DEFAULT = [sys.executable, "-m", "quire", "generate", "--quiet", "What is the KV cache?"]


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds to the first byte, and peak resident memory in MB."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not first or process.returncode:
        sys.exit(f"the command gave no answer (exit {process.returncode})")
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Warm up once, then measure."""
    own, _, other = " ".join(sys.argv[1:]).partition("--")
    runs, command = int(own or 7), other.split() or DEFAULT
    measure(command)
    found = [measure(command) for _ in range(runs)]
    times = [seconds for seconds, _ in found]
    print(f"first token: {statistics.median(times):.3f} s (from {min(times):.3f} to {max(times):.3f}, {runs} runs)")
    print(f"peak memory: {statistics.median(memory for _, memory in found):.0f} MB")


if __name__ == "__main__":
    main()
