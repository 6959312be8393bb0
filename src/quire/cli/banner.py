"""A few lines on standard error: what was decided, and why."""

import sys
from collections.abc import Iterable

import quire
from quire.outputs import Decision


def show(model: str, decisions: Iterable[Decision], *, quiet: bool) -> None:
    """Print the banner, unless it is not wanted."""
    if quiet:
        return
    print(f"quire {quire.__version__}  {model}", file=sys.stderr)
    for line in lines(decisions):
        print(f"  {line}", file=sys.stderr)


def lines(decisions: Iterable[Decision]) -> list[str]:
    """`name  value  (reason)`, names in one column."""
    found = list(decisions)
    width = max((len(item.name) for item in found), default=0)
    return [f"{item.name:<{width}}  {item.value}" + (f"  ({item.reason})" if item.reason else "") for item in found]
