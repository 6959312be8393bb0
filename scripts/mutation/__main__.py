"""scripts/mutants: put each fault of the lists into a copy of the tree and run the tests that must fail.

Exit status 0 when every fault that was run was killed or is argued for; 1 when one survived, or when tests that are
named do not pass without a fault; 2 for a wrong argument.
"""

import argparse
import random
import signal
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from scripts.house.tree import ROOT
from scripts.mutation.campaign import Campaign, Verdict
from scripts.mutation.faults import Fault, list_problems, read_faults
from scripts.mutation.report import FAILURES, line_of, record_of, summary_of
from scripts.mutation.tree_copy import native_extension


def main() -> int:
    """Run the chosen faults; all of them when none is named."""
    options = _options()
    faults = read_faults(ROOT)
    problems = list_problems(ROOT, faults)
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    faults = _chosen(faults, options.names)
    if options.seed is not None:
        random.Random(options.seed).shuffle(faults)
    if options.list:
        for fault in faults:
            argued = " (argued)" if fault.survives else ""
            print(f"{fault.area:14}{fault.id}{argued}  {fault.file}  {' '.join(fault.tests)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    verdicts = _run(faults, options)
    print(*summary_of(verdicts), sep="\n")
    return int(any(verdict.outcome in FAILURES for verdict in verdicts))


def _run(faults: list[Fault], options: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    campaign = Campaign(ROOT, options.seconds, options.jobs, native_extension())
    with ExitStack() as stack:
        out = stack.enter_context(options.out.open("w", encoding="utf-8")) if options.out else None
        for verdict in stack.enter_context(closing(campaign.run(faults))):
            verdicts.append(verdict)
            print(line_of(verdict), flush=True)
            if out is not None:
                print(record_of(verdict), file=out, flush=True)
    return verdicts


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/mutants", description="Do the tests see plausible faults?")
    parser.add_argument("names", nargs="*", metavar="NAME", help="areas or ids of faults; default: all")
    parser.add_argument("--seconds", type=float, default=1200.0, help="start no fault later (default: 1200)")
    parser.add_argument("--jobs", type=int, default=1, help="faults at one time (default: 1)")
    parser.add_argument("--seed", type=int, help="shuffle, so that bounded runs see different faults")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write one line of JSON for each fault")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def _chosen(faults: list[Fault], names: list[str]) -> list[Fault]:
    unknown = set(names) - {name for fault in faults for name in (fault.id, fault.area)}
    if unknown:
        print(f"scripts/mutants: no area or fault is called {', '.join(sorted(unknown))}", file=sys.stderr)
        raise SystemExit(2)
    return [fault for fault in faults if not names or fault.id in names or fault.area in names]


if __name__ == "__main__":
    sys.exit(main())
