"""`quire bench startup`: seconds until an `LLM` is there, cold and warm, each time in a new process."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quire.cli import engines, model_path
from quire.cli.arguments import add_engine, engine_values
from quire.cli.bench_offline import PERCENTS, check_folder, counted, within, write
from quire.config import EngineArgs
from quire.errors import QuireError

EXAMPLES = """examples:
  quire bench startup --model DIR
  quire bench startup --model DIR --num-iters-cold 5 --num-iters-warm 10 --output-json startup.json

The flags and the names of the figures are those of `vllm bench startup`. startup: seconds that LLM(...) takes in a new
process. first_token: from the start of that process to its first token, imports included. cold: without Python's byte
code and compiled kernels of before, and with the model's files out of the system's cache, if it lets go of them."""
CODE = """
import json, sys, time
begun = time.perf_counter()
from quire import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(**json.loads(sys.argv[1]))
ready = time.perf_counter()
llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), use_tqdm=False)
print(json.dumps({"startup": ready - imported, "at": time.time()}), flush=True)
llm.close()
"""


def add(kinds: Any) -> None:
    """Its flags."""
    parser = kinds.add_parser(
        "startup",
        help="seconds until a model is ready, cold and warm",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--num-iters-cold", type=int, default=3, metavar="N", help="cold starts (default: 3)")
    flag("--num-iters-warmup", type=int, default=1, metavar="N", help="starts that are not counted (default: 1)")
    flag("--num-iters-warm", type=int, default=3, metavar="N", help="warm starts (default: 3)")
    flag("--output-json", type=Path, metavar="FILE", help="write the figures there")
    engines.add_quiet(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Start, print, write."""
    from quire.compose.served import find_model

    within(options, 1, "num_iters_cold", "num_iters_warm")
    within(options, 0, "num_iters_warmup")
    check_folder(options.output_json)
    values = engine_values(options)
    args = EngineArgs.from_mapping(values)
    model_path.check(args.model)
    files = find_model(args)
    phases: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in counted(options.num_iters_cold, "cold", options):
        forget(files)
        with tempfile.TemporaryDirectory(prefix="quire-cold-") as folder:
            fresh = {"PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "TRITON_CACHE_DIR": f"{folder}/triton"}
            phases["cold"].append(start(values, fresh))
    for _ in counted(options.num_iters_warmup, "warm-up", options):
        start(values, {})
    phases["warm"] = [start(values, {}) for _ in counted(options.num_iters_warm, "warm", options)]
    found = result(phases)
    for phase in phases:
        for kind, text in (("startup", "LLM(...)"), ("first_token", "process to first token")):
            times = found[f"{phase}_{kind}_times"]
            shown = f"{statistics.median(times):.3f} s, median ({min(times):.3f} to {max(times):.3f})"
            print(f"{phase}, {text}: {shown}")
    write(options.output_json, found)
    return 0


def start(values: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds of one start in a process of its own.

    Raises:
        QuireError: it failed; its last line.
    """
    begun_s = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(dict(values))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise QuireError(f"the engine did not start: {said[-1][:500]}")
    told = json.loads(lines[-1])
    return {"startup": told["startup"], "first_token": told["at"] - begun_s}


def forget(files: Path) -> None:
    """Let the system's cache go of a model's files, where it can."""
    for path in [files] if files.is_file() else sorted(files.iterdir()):
        with suppress(OSError, AttributeError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def result(phases: Mapping[str, Iterable[Mapping[str, float]]]) -> dict[str, Any]:
    """The figures under vLLM's names, and as many of the first token."""
    from quire.bench.serving import percentile

    found: dict[str, Any] = {}
    for phase, runs in phases.items():
        for kind in ("startup", "first_token"):
            times = [one[kind] for one in runs]
            found[f"avg_{phase}_{kind}_time"] = statistics.fmean(times)
            found[f"{phase}_{kind}_times"] = times
            found[f"{phase}_{kind}_percentiles"] = {str(percent): percentile(times, percent) for percent in PERCENTS}
    return found
