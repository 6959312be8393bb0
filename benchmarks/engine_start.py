"""An engine directory beside the model that it was built from: to build, to start, and to run twice.

    python benchmarks/engine_start.py MODEL [--quantization int4] [--runs 5] [--keep DIR]

Prints the seconds and the peak memory of `quire build`, the bytes of both, seconds from the command to the first text
of `quire generate` (model and engine in turns, warm page cache; medians), and what two processes that answered from one
engine hold: of its weights' file together (its pages count once) and apart.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from first_token import measure

from quire.cli.arguments import model_argument
from quire.compose.served import find_model
from quire.config import EngineArgs

PROMPT = "What is the KV cache?"
HOLD = """
import sys
from quire import LLM, SamplingParams
llm = LLM(model=sys.argv[1], max_num_seqs=1, max_model_len=256)
llm.generate(["hello"], SamplingParams(max_tokens=8), use_tqdm=False)
print("ready", flush=True)
sys.stdin.read()
"""


def build(model: str, output: Path, quantization: str | None) -> tuple[float, float]:
    """Seconds, and peak memory in MB."""
    flags = [] if quantization is None else ["--quantization", quantization]
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "quire", "build", model, "-o", str(output), "--quiet", *flags])
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit("the build failed")
    return time.perf_counter() - begun, usage.ru_maxrss / 1e3


def weights_held(engine: Path) -> tuple[float, float]:
    """MB of the weights' file in the memory of two processes: counted once where shared, and the sum of both."""
    command = [sys.executable, "-c", HOLD, str(engine)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shared = apart = 0
    for one in both:
        assert one.stdout is not None
        one.stdout.readline()
    for one in both:
        text = Path(f"/proc/{one.pid}/smaps").read_text()
        lines = text[text.index("weights.quire") :].split("VmFlags")[0].splitlines()
        shared += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        apart += next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    for one in both:
        one.communicate("")
    return shared / 1e3, apart / 1e3


def size_of(path: Path) -> int:
    """Bytes of a file, or of those of a directory."""
    return path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.iterdir() if one.is_file())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantization")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="build the engine there, and leave it")
    options = parser.parse_args()
    source = find_model(EngineArgs(model=model_argument(options.model)))
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory(prefix="quire-engine-") as folder:
        engine = options.keep or Path(folder) / "engine"
        seconds, peak = build(options.model, engine, options.quantization)
        print(f"build: {seconds:.1f} s, peak memory {peak:.0f} MB")
        print(f"bytes: model {size_of(source):,}, engine {size_of(engine):,}")
        base = [sys.executable, "-m", "quire", "generate", "--quiet", "--max-tokens", "4"]
        quantized = [] if options.quantization is None else ["--quantization", options.quantization]
        commands = {
            "model": [*base, "--model", options.model, *quantized, PROMPT],
            "engine": [*base, "--model", str(engine), PROMPT],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(options.runs + 1):
            for name, command in commands.items():
                found, _ = measure(command)
                times[name] += [found] if run else []
        for name, found in times.items():
            print(f"first text, {name}: {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})")
        together, apart = weights_held(engine)
        print(f"weights of two processes: {together:.0f} MB together, {apart:.0f} MB counted apart")
    print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
