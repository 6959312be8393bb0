"""The figures of a model on a GPU, one process after another, and a table of what came out.

    python benchmarks/cuda_table.py [--shape 7b] [--results FILE] [--seconds 500] [--device cpu --shape tiny --scale 64]

Each configuration is a process of its own (`cuda_model.py`, `cuda_peers.py`); its JSON goes into the results file. One
that is there already is not run again, so a call that ran out of time is continued by the next. Exit 1 where one
failed or is missing. Columns: output tokens per second of 1, 32 and 256 sequences (and the share of the floor),
milliseconds to the first token of prompts, and W2's lengths for 256 requests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def jobs(directory: Path) -> dict[str, list[str]]:
    """By name, most wanted first. The first of all finds no compiled kernels, the second all of them."""
    model, peers = "cuda_model.py", "cuda_peers.py"
    return {
        "bfloat16, cold kernels": [model, str(directory), "--parts"],
        "bfloat16": [model, str(directory)],
        "transformers, static": [peers, str(directory), "static"],
        "transformers, continuous": [peers, str(directory), "continuous"],
        "fp8": [model, str(directory), "--quantization", "fp8"],
        "int4": [model, str(directory), "--quantization", "int4"],
        "bfloat16, cuBLAS": [model, str(directory), "--variant", "--parts", "decode", "mixed"],
    }


def run(command: list[str], seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """The JSON object of one process, or what went wrong."""
    try:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", str(HERE / command[0]), *command[1:]],
            capture_output=True, text=True, timeout=seconds, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if ran.returncode != 0 or not ran.stdout.strip():
        return {"error": (ran.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """For people."""
    lines = []
    for name, found in results.items():
        if "error" in found:
            lines.append(f"{name:26} failed: {found['error']}")
            continue
        cells = [f"start {found['start_s']:.1f} s"] if "start_s" in found else []
        for key, value in found.items():
            if key.startswith("decode_"):
                cells.append(f"{key[7:]} seq {value['output_tokens_per_s']:,.0f} tok/s ({value['floor_fraction']:.0%})")
            elif key.startswith("ttft_"):
                cells.append(f"ttft {key[5:-3]} {value:.1f} ms")
            elif key == "mixed":
                memory = "" if value["memory_in_use"] is None else f", memory {value['memory_in_use']:.1%}"
                cells.append(f"mixed {value['tokens_per_s']:,.0f} tok/s, ttft {value['ttft_median_s']:.3f} s{memory}")
        lines.append(f"{name:26} {'; '.join(cells)}")
        if "budget" in found:
            lines.append(f"{'':26} {found['budget']}")
    static = results.get("transformers, static", {}).get("mixed")
    ours = results.get("bfloat16", {}).get("mixed")
    if static and ours:
        lines.append(
            f"over plain transformers: {ours['tokens_per_s'] / static['tokens_per_s']:.1f} times the throughput, first"
            f" tokens {static['ttft_median_s'] / ours['ttft_median_s']:.1f} times as soon (aims: 15 and 5)"
        )
    return "\n".join(lines)


def main() -> int:
    """Run what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--results", type=Path, default=Path("build/gpu/results.json"))
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--only", nargs="*", help="names of configurations")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    directory = arguments.results.parent / f"checkpoint-{arguments.shape}"
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.json").exists():
        making = [sys.executable, str(HERE / "make_checkpoint.py"), arguments.shape, str(directory)]
        subprocess.run(making, check=True, timeout=arguments.seconds, stdout=subprocess.DEVNULL)
    results: dict[str, dict[str, Any]] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    wanted = {name: job for name, job in jobs(directory).items() if not arguments.only or name in arguments.only}
    options = ["--device", arguments.device, "--scale", str(arguments.scale)]
    for name, command in wanted.items():
        left_s = deadline - time.monotonic()
        if left_s < 10 or "error" not in results.get(name, {"error": "missing"}):
            continue
        with tempfile.TemporaryDirectory() as cold:
            environment = dict(os.environ) | ({"TRITON_CACHE_DIR": cold} if "cold" in name else {})
            arranged = [command[0], *command[1:2], *options, *command[2:]]
            results[name] = run(arranged, left_s, environment)
        arguments.results.write_text(json.dumps(results, indent=1))
    print(table({name: results[name] for name in wanted if name in results}))
    missing = [name for name in wanted if "error" in results.get(name, {"error": "missing"})]
    if missing:
        print("missing or failed, the next call tries again:", ", ".join(missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
