"""`quire rm`: remove a model from the hub's cache on this machine."""

import argparse

from quire.cli.list import size_of

EXAMPLES = """examples:
  quire rm owner/name
  quire rm owner/name:v2"""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    text = "a model of `quire list`; with :revision (a branch, a tag, the beginning of a commit) that one alone"
    parser.add_argument("name", metavar="NAME", help=text)


def run(options: argparse.Namespace) -> int:
    """Remove, and say what is free."""
    from quire.weights.local_models import LocalModels

    print(f"removed {options.name}: {size_of(LocalModels().remove(options.name))} are free")
    return 0
