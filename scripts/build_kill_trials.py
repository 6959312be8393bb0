"""Kill `quire build` at random moments, and see that nothing half-made is ever taken for an engine.

    python -m scripts.build_kill_trials [--trials 50] [--minutes 10] [--model MODEL] [--quantization int4] [--seed N]

A whole build is timed first, from its first file on; each trial kills one after a random share of that time. Then the
output is absent, or an engine that `quire verify` finds whole; the folder of the build is refused by name, whole, or
gone; and the next build, of which the next trial is the beginning, clears it. The last build is let run, and must be
whole. Exit 1 when any of that is not so.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from quire.cli.main import main as quire
from quire.errors import ModelFileError
from quire.weights.formats.engine_dir import read_manifest

LEAST_S = 0.005


def begin(model: str, output: Path, flags: list[str]) -> "subprocess.Popen[bytes]":
    """A build, at the moment when the folder is its own."""
    command = [sys.executable, "-m", "quire", "build", model, "-o", str(output), "--quiet", *flags]
    process = subprocess.Popen(command)
    while process.poll() is None and not output.exists() and _builder(output) != process.pid:
        time.sleep(0.0005)
    return process


def _builder(output: Path) -> int | None:
    """The process that writes there."""
    with suppress(OSError, ValueError):
        return int((place_of(output) / ".building").read_text())
    return None


def place_of(output: Path) -> Path:
    """Where a build works."""
    return output.parent / f".{output.name}.building"


def outcome(output: Path) -> str:
    """What a killed build left; what it must not leave begins with `WRONG`."""
    place = place_of(output)
    if output.exists():
        whole = quire(["verify", str(output)]) == 0
        shutil.rmtree(output)
        return "whole" if whole else "WRONG: an engine that is not whole"
    if not place.exists():
        return "nothing"
    try:
        read_manifest(place)
    except ModelFileError:
        return "refused, with its manifest" if (place / "engine.json").exists() else "refused"
    whole = quire(["verify", str(place)]) == 0  # between the last two steps: all is there but its name
    return "whole, not yet in its place" if whole else "WRONG: half an engine is taken for one"


def run(trials: int, minutes: float, model: str, flags: list[str], seed: int) -> Counter[str]:
    """Trials until there are enough or the time is over; how many ended in which way."""
    dice, found = random.Random(seed), Counter[str]()
    deadline_s = time.monotonic() + minutes * 60
    with tempfile.TemporaryDirectory(prefix="quire-kill-") as root:
        output = Path(root) / "engine"
        process = begin(model, output, flags)
        start_s = time.monotonic()
        if process.wait() != 0:
            raise SystemExit("the build that nothing disturbed failed")
        whole_s = time.monotonic() - start_s
        shutil.rmtree(output)
        while found.total() < trials and time.monotonic() < deadline_s:
            process = begin(model, output, flags)
            time.sleep(dice.uniform(LEAST_S, whole_s * 1.02))
            process.kill()
            process.wait()
            found[outcome(output)] += 1
        if begin(model, output, flags).wait() != 0 or quire(["verify", str(output)]) != 0 or place_of(output).exists():
            found["WRONG: the build after the last kill"] += 1
    return found


def main() -> int:
    """Run; one line for each way of ending."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default="quire-demo")
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.trials, options.minutes, options.model, ["--quantization", options.quantization], options.seed)
    for text, number in found.most_common():
        print(f"{number:4} {text}")
    return 1 if any(text.startswith("WRONG") for text in found) else 0


if __name__ == "__main__":
    sys.exit(main())
