"""`quire replay`: a recording of a scheduler, played again."""

import argparse
import json
import time

EXAMPLES = """examples:
  quire replay night.jsonl

A recording is what quire serve --record FILE leaves. The scheduler of this installation is asked what the recorded one
was asked, without a model, and its plans are compared with the recorded ones. Exit code 1: one differs."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("recording", metavar="FILE", help="of --record")
    parser.add_argument("--json", action="store_true", help="print one object")


def run(options: argparse.Namespace) -> int:
    """Play, and say what is equal."""
    from quire.observe.replay import replay

    begun_s = time.perf_counter()
    found = replay(options.recording)
    first = found.first_difference
    if options.json:
        difference = None if first is None else {name: getattr(first, name) for name in first.__slots__}
        counts = {name: getattr(found, name) for name in found.__slots__ if name != "first_difference"}
        print(json.dumps({**counts, "first_difference": difference}))
        return int(first is not None)
    spent_s = time.perf_counter() - begun_s
    print(
        f"{found.num_equal} of {found.num_plans} plans are equal: {found.num_requests} requests, "
        f"{found.num_sessions} {'start' if found.num_sessions == 1 else 'starts'} of a core, {spent_s:.1f} s"
    )
    if first is not None:
        print(f"the first that differs is step {first.step_id} after start {first.session + 1}")
        for name, event in (("recorded", first.recorded), ("replayed", first.replayed)):
            print(f"  {name}: removed, new, scheduled = {json.dumps(event)[:2000]}")
    return int(first is not None)
