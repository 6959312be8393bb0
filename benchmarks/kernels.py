"""The rate of each operation and format beside what this machine allows: streaming read, multiplications of its units.

    python benchmarks/kernels.py --only linear gated_linear int4 m1b
    python benchmarks/kernels.py --rows 1 64 --json > rates.json

Names for --only, of any number of kinds; of one kind any is meant:

    operations  linear gated_linear logits greedy attention add_rms_norm activation_multiply sample
    formats     bfloat16 int8 int8_w8a8 int4 float32
    models      m135 m1b 7b
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kernel_cases import FORMATS, MODELS, OPERATIONS, Case, cases

from quire.bench import machine
from quire.bench.roofline import Roofline, measure_roofline
from quire.errors import QuireError
from quire.ops.cpu import CpuOps
from quire.ops.select import select_ops

HOW = (
    "medians of single calls, each on another copy of weights and cache where these are small, so that they come from "
    "memory; limits: the best of several rounds with all threads, tiles or vectors loaded from the L1 and multiplied; "
    "of limit: the shortest time that bytes and operations allow, over the time taken"
)
CALL_SECONDS = 0.06
FEWEST_CALLS = 3


@dataclass(frozen=True, slots=True)
class Rate:
    """A case with its time."""

    operation: str
    format: str
    model: str
    shape: str
    rows: int
    seconds: float
    bytes_per_s: float
    operations_per_s: float
    limit_seconds: float
    """The shortest time that the limits allow."""
    bound: str
    """What sets it: memory, or the unit."""

    @property
    def of_limit(self) -> float:
        """1 is as fast as the machine can."""
        return self.limit_seconds / self.seconds


def time_case(case: Case) -> float:
    """Seconds of one call: a median, after a call that is not counted."""
    case.run(0)
    times: list[float] = []
    end = time.perf_counter() + CALL_SECONDS
    while len(times) < FEWEST_CALLS or time.perf_counter() < end:
        begun = time.perf_counter()
        case.run(len(times) + 1)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def rate(case: Case, seconds: float, limits: Roofline) -> Rate:
    """A time beside the limits."""
    memory_s = case.num_bytes / limits.read_bytes_per_s
    peak = limits.operations_per_s.get(case.unit) if case.unit is not None else None
    operations_s = case.num_operations / peak if peak else 0.0
    return Rate(
        operation=case.operation,
        format=case.format,
        model=case.model,
        shape=case.shape,
        rows=case.rows,
        seconds=seconds,
        bytes_per_s=case.num_bytes / seconds,
        operations_per_s=case.num_operations / seconds,
        limit_seconds=max(memory_s, operations_s),
        bound="memory" if memory_s >= operations_s else str(case.unit),
    )


def time_cases(cases: Iterable[Case], seconds: float) -> tuple[list[tuple[Case, float]], bool]:
    """Times of all cases, or of the first and those that were begun within `seconds`; whether these are all."""
    end = time.perf_counter() + seconds
    found: list[tuple[Case, float]] = []
    for case in cases:
        if found and time.perf_counter() > end:
            return found, False
        found.append((case, time_case(case)))
    return found, True


def as_text(rates: Sequence[Rate], limits: Roofline, machine: Mapping[str, str]) -> str:
    """A table for people."""
    lines = [f"{name}: {value}" for name, value in machine.items()]
    lines.append(f"limits: streaming read {limits.read_bytes_per_s / 1e9:.1f} GB/s" + "".join(
        f", {unit} {value / 1e12:.2f} TOP/s" for unit, value in limits.operations_per_s.items()))  # fmt: skip
    lines += [HOW, ""]
    head = f"{'operation':<16} {'format':<10} {'model':<6} {'shape':<16} {'rows':>5} {'us':>10}"
    lines.append(f"{head} {'GB/s':>7} {'TOP/s':>7}  of limit")
    for one in rates:
        tops = f"{one.operations_per_s / 1e12:7.3f}" if one.operations_per_s else f"{'-':>7}"
        lines.append(
            f"{one.operation:<16} {one.format:<10} {one.model:<6} {one.shape:<16} {one.rows:>5} "
            f"{one.seconds * 1e6:>10.1f} {one.bytes_per_s / 1e9:>7.2f} {tops}  {one.of_limit:6.0%} {one.bound}"
        )
    return "\n".join(lines)


def as_json(rates: Sequence[Rate], limits: Roofline, machine: Mapping[str, str]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "machine": dict(machine),
        "how": HOW,
        "limits": asdict(limits),
        "rates": [asdict(one) | {"of_limit": one.of_limit} for one in rates],
    }


def chosen(only: Sequence[str]) -> Callable[[str, str, str], bool]:
    """`wanted(operation, format, model)` for the names that were given."""
    kinds = (OPERATIONS, (*FORMATS, "float32"), tuple(model.name for model in MODELS))
    for name in only:
        if not any(name in names for names in kinds):
            sys.exit(f"only: {name!r} is not one of {', '.join(name for names in kinds for name in names)}")
    allowed = [[name for name in names if name in only] or names for names in kinds]
    return lambda *case: all(name in names for name, names in zip(case, allowed, strict=True))


def best(a: Roofline, b: Roofline) -> Roofline:
    """Of a measurement before and one after."""
    rates = {unit: max(value, b.operations_per_s.get(unit, 0.0)) for unit, value in a.operations_per_s.items()}
    return Roofline(max(a.read_bytes_per_s, b.read_bytes_per_s), rates)


def main() -> None:
    """Measure the limits, the cases, the limits again; print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="operations, formats, models; all")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512], metavar="N")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="begin no case after this")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the physical cores of this process")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args()
    if min(options.rows) < 1 or not options.seconds > 0:
        parser.error("rows and seconds must be positive")
    wanted = chosen(options.only)
    try:
        ops, decisions = select_ops("cpu", options.threads)
    except QuireError as error:
        parser.error(str(error))
    assert isinstance(ops, CpuOps)
    before = measure_roofline(ops.probe, time.perf_counter)
    found, is_all = time_cases(cases(ops, wanted, options.rows), options.seconds)
    limits = best(before, measure_roofline(ops.probe, time.perf_counter))
    if not found:
        sys.exit("nothing is left to measure")
    rates = [rate(case, seconds, limits) for case, seconds in found]
    facts = machine.describe() | {item.name.replace("_", " "): item.value for item in decisions[1:]}
    if options.json:
        print(json.dumps(as_json(rates, limits, facts), indent=1))
    else:
        print(as_text(rates, limits, facts))
    if not is_all:
        print(f"not all was measured within {options.seconds:g} s; --seconds and --only", file=sys.stderr)


if __name__ == "__main__":
    main()
