"""`quire list`: the models in the hub's cache on this machine."""

import argparse
import json
import sys
import time

EXAMPLES = """examples:
  quire list
  quire list --json"""
HEAD = ("NAME", "REVISION", "COMMIT", "SIZE", "CHANGED")


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--json", action="store_true", help="one JSON list")


def run(options: argparse.Namespace) -> int:
    """Print a line a revision."""
    from quire.weights.local_models import LocalModels

    found = LocalModels().all()
    if options.json:
        keys = ("id", "commit", "revisions", "size_bytes", "modified_s")
        print(json.dumps([{key: getattr(one, key) for key in keys} for one in found]))
        return 0
    if not found:
        print("none: quire pull NAME downloads one (smollm2 and quire-demo are not of the hub)", file=sys.stderr)
    rows = [HEAD]
    for one in found:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.modified_s))
        rows.append((one.id, one.revision, one.commit[:12], size_of(one.size_bytes), changed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def size_of(num_bytes: int) -> str:
    """A size for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
