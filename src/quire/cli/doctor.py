"""`quire doctor`: what this machine and this installation offer, and what would be decided."""

import argparse
import sys
import time
from typing import Any

from quire.cli import banner

EXAMPLES = """example:
  quire doctor"""
PACKAGES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "jinja2",
    "fastapi",
    "uvicorn",
    "huggingface_hub",
    "torch",
    "transformers",
)
CHUNK_BYTES = 2**25
BANDWIDTH_SECONDS = 1.0


def add(parser: argparse.ArgumentParser) -> None:
    """No flags."""


def run(options: argparse.Namespace) -> int:
    """Print everything; 1 if the embedded model cannot be run."""
    from quire.bench import machine

    _section("machine", machine.describe())
    limit = machine.memory_limit_bytes()
    native, threads = _native()
    _section(
        "limits",
        {"control group memory": "none" if limit is None else f"{limit / 2**30:.1f} GiB", "threads": threads[1]},
    )
    _section("native operations", native)
    _section("versions", {name: _version(name) for name in PACKAGES})
    rate = read_bandwidth(threads[0])
    _section("memory", {"streaming read": f"{rate / 1e9:.1f} GB/s with {threads[0]} threads (numpy)"})
    return _embedded()


def _section(title: str, items: dict[str, str]) -> None:
    print(title)
    width = max(map(len, items), default=0)
    for name, value in items.items():
        print(f"  {name:<{width}}  {value}")


def _native() -> tuple[dict[str, str], tuple[int, str]]:
    """Whether the extension loads, its instruction sets with the reason of each, and the threads."""
    from quire.bench.machine import usable_processors

    try:
        from quire.ops import _native
        from quire.ops.select import available_cores
    except ImportError as error:
        return {"loads": f"no: {error.name or error}"}, (usable_processors(), "all usable processors")
    found = {"loads": "yes"}
    for name, runs, reason in _native.instruction_sets():
        found[name] = f"{'yes' if runs else 'no'}: {reason}"
    count, reason = available_cores()
    return found, (count, f"{count} ({reason})")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def read_bandwidth(threads: int, seconds: float = BANDWIDTH_SECONDS) -> float:
    """Bytes a second that `threads` threads read together, each from its own 32 MiB, the best of several rounds."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    arrays: list[Any] = [np.ones(CHUNK_BYTES // 8, np.int64) for _ in range(4 * threads)]
    best, end = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < end:
            begun = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, CHUNK_BYTES * len(arrays) / (time.perf_counter() - begun))
    return best


def _embedded() -> int:
    """Load the embedded model, say what was decided, generate one token."""
    from quire.llm import LLM
    from quire.sampling_params import SamplingParams

    print("embedded model")
    begun = time.perf_counter()
    try:
        with LLM() as llm:
            loaded = time.perf_counter()
            llm.generate("Hello", SamplingParams(max_tokens=1), use_tqdm=False)
            done = time.perf_counter()
            for line in banner.lines(llm.decisions):
                print(f"  {line}")
            print(f"  loads in {(loaded - begun) * 1e3:.0f} ms, one token in {(done - loaded) * 1e3:.0f} ms more")
    except Exception as error:  # noqa: BLE001 -- a doctor reports, and goes on
        print(f"  cannot run: {' '.join(str(error).split())}")
        print("quire: the embedded model cannot be run", file=sys.stderr)
        return 1
    return 0
