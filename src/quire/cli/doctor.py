"""`quire doctor`: what this machine and this installation offer, and what would be decided."""

import argparse
import sys
import time

from quire.cli import banner
from quire.errors import QuireError

EXAMPLES = """example:
  quire doctor"""
PACKAGES = tuple(
    "numpy ml_dtypes safetensors tokenizers jinja2 starlette uvicorn huggingface_hub torch transformers".split()
)


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
    _section("rates of all threads together", _rates())
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


def _rates() -> dict[str, str]:
    """What memory and the processors' units do at best; nothing where the native operations do not load."""
    try:
        from quire.bench.roofline import measure_roofline
        from quire.ops.cpu import CpuOps
        from quire.ops.select import select_ops

        ops, _ = select_ops("cpu", None)
    except (ImportError, QuireError):
        return {}
    assert isinstance(ops, CpuOps)
    roofline = measure_roofline(ops.probe, time.perf_counter)
    peaks = {f"peak, {unit}": f"{value / 1e12:.2f} TOP/s" for unit, value in roofline.operations_per_s.items()}
    return {"streaming read": f"{roofline.read_bytes_per_s / 1e9:.1f} GB/s", **peaks}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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
