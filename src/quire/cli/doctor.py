"""`quire doctor`: what this machine and this installation offer, and what would be decided."""

import argparse
import sys
import time
from typing import Any

from quire.cli import banner
from quire.errors import QuireError

EXAMPLES = """example:
  quire doctor"""
PACKAGES = tuple(
    "numpy ml_dtypes safetensors tokenizers jinja2 starlette uvicorn huggingface_hub torch transformers".split()
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
    _section("limits", {"control group memory": "none" if limit is None else f"{limit / 2**30:.1f} GiB"})
    print("operations")
    for line in _operations():
        print(f"  {line}")
    _section("versions", {name: _version(name) for name in PACKAGES})
    threads = machine.usable_processors()
    rate = read_bandwidth(threads)
    _section("memory", {"streaming read": f"{rate / 1e9:.1f} GB/s with {threads} threads (numpy)"})
    return _embedded()


def _section(title: str, items: dict[str, str]) -> None:
    print(title)
    width = max(map(len, items), default=0)
    for name, value in items.items():
        print(f"  {name:<{width}}  {value}")


def _operations() -> list[str]:
    """Provider, instruction set and threads with their reasons; what was passed over; or why none loads."""
    try:
        from quire.ops.select import select_ops

        _, decisions = select_ops("auto", None)
    except (ImportError, QuireError) as error:
        return [f"native operations do not load: {error}"]
    rejected = [f"not {line}" for decision in decisions for line in decision.rejected]
    return [*banner.lines(decisions), *rejected]


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
