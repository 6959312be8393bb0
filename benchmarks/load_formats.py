"""What a load takes in each format: seconds from the file to a model, peak memory of the process, and what stays.

    python benchmarks/load_formats.py MODEL... [--formats none int8 int8_w8a8 int4 int4_min fp8] [--rounds 3]

Each load is a process of its own that imports first and reads the file once before (a warm page cache); formats take
turns within a round; medians. A file that is quantised already, or an engine directory, is loaded as it is with `none`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict

LOAD = """
import gc, json, sys, time
from pathlib import Path
import quire.compose.core, quire.compose.served, quire.compose.text, quire.text.tokenizer
from quire.cli.arguments import model_argument
from quire.llm import LLM

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

gc.collect()
before = memory("VmRSS")
begun = time.perf_counter()
llm = LLM(
    model=model_argument(sys.argv[1]), quantization=json.loads(sys.argv[2]), max_num_seqs=1, max_model_len=256,
    block_size=16,
)
print(json.dumps([time.perf_counter() - begun, memory("VmHWM") - before, memory("VmRSS") - before]))
"""


def main() -> None:
    """Measure, and print a line for each model and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--formats", nargs="+", default="none int8 int8_w8a8 int4 int4_min fp8".split())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for round_number in range(options.rounds + 1):  # the first fills the page cache
        for model in options.models:
            for name in options.formats:
                value = json.dumps(None if name == "none" else name)
                command = [sys.executable, "-c", LOAD, model, value]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{model} as {name}: {done.stderr.strip().splitlines()[-1]}")
                if round_number:
                    found[model, name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'model':<40} {'format':<10} {'load, s':>8} {'least':>7} {'most':>7} {'peak, MiB':>10} {'stays, MiB':>11}")
    for (model, name), runs in found.items():
        seconds, peak, stays = (statistics.median(column) for column in zip(*runs, strict=True))
        least, most = min(run[0] for run in runs), max(run[0] for run in runs)
        print(f"{model[-40:]:<40} {name:<10} {seconds:8.2f} {least:7.2f} {most:7.2f} {peak:10,.0f} {stays:11,.0f}")


if __name__ == "__main__":
    main()
