"""`quire bench kernels`: every operation and format beside what this machine allows."""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.bench.kernels import Case, Limits

EXAMPLES = """examples:
  quire bench kernels --only linear gated_linear int4 m1b
  quire bench kernels --rows 1 64 --json > rates.json

names for --only, of any number of kinds; of one kind any is meant:
  operations  linear gated_linear logits greedy attention add_rms_norm activation_multiply rope sample
  formats     bfloat16 int8 int8_w8a8 int4 float32
  models      m135 m1b 7b"""


def add(kinds: Any) -> None:
    """Its flags."""
    parser = kinds.add_parser(
        "kernels",
        help="each operation and format, beside the limits of this machine",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="operations, formats, models; all")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512], metavar="N")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="begin no case after this (default: 60)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="the physical cores that this process may use")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    """Measure the limits, the cases, the limits again; print.

    Raises:
        ConfigurationError: a name that is none, or nothing to measure.
    """
    import time

    from quire.bench import kernels, machine
    from quire.cli.kernel_cases import cases, measure_limits
    from quire.ops.cpu import CpuOps
    from quire.ops.select import select_ops

    if min(options.rows) < 1 or not options.seconds > 0:
        raise ConfigurationError("rows and seconds must be positive", field="rows")
    wanted = _chosen(options.only)
    ops, decisions = select_ops("cpu", options.threads)
    if not isinstance(ops, CpuOps):
        raise ConfigurationError("these measurements are for the CPU", field="device")
    before = measure_limits(ops, time.perf_counter)
    found, is_all = kernels.time_cases(_watched(cases(ops, wanted, options.rows)), options.seconds)
    limits = _best(before, measure_limits(ops, time.perf_counter))
    if not found:
        raise ConfigurationError("nothing is left to measure", field="only")
    rates = [kernels.rate(case, seconds, limits) for case, seconds in found]
    facts = machine.describe() | {item.name.replace("_", " "): item.value for item in decisions[1:]}
    if options.json:
        print(json.dumps(kernels.as_json(rates, limits, facts), indent=1))
    else:
        print(kernels.as_text(rates, limits, facts))
    if not is_all:
        print(f"quire: not all was measured within {options.seconds:g} s; --seconds and --only", file=sys.stderr)
    return 0


def _chosen(only: list[str]) -> Any:
    """`wanted(operation, format, model)` for the names that were given."""
    from quire.cli.kernel_cases import FORMATS, MODELS, OPERATIONS

    kinds = (OPERATIONS, (*FORMATS, "float32"), tuple(model.name for model in MODELS))
    for name in only:
        if not any(name in names for names in kinds):
            known = ", ".join(name for names in kinds for name in names)
            raise ConfigurationError(f"only: {name!r} is not one of {known}", field="only")
    chosen = [[name for name in names if name in only] or names for names in kinds]
    return lambda *case: all(name in names for name, names in zip(case, chosen, strict=True))


def _best(a: "Limits", b: "Limits") -> "Limits":
    from quire.bench.kernels import Limits

    rates = {unit: max(value, b.operations_per_s.get(unit, 0.0)) for unit, value in a.operations_per_s.items()}
    return Limits(max(a.read_bytes_per_s, b.read_bytes_per_s), rates)


def _watched(cases: "Iterable[Case]") -> "Iterable[Case]":
    """A line that is written over, where somebody looks."""
    for case in cases:
        if sys.stderr.isatty():
            print(
                f"\r{case.operation} {case.format} {case.model} {case.shape} {case.rows:<12}", end="", file=sys.stderr
            )
        yield case
    if sys.stderr.isatty():
        print("\r" + " " * 70, end="\r", file=sys.stderr)
