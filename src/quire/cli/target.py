"""What an engine is built for: `--target`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quire.errors import ConfigurationError
from quire.outputs import Decision

if TYPE_CHECKING:
    from quire.build.builder import Target

HELP = "auto (this machine's best), or cpu- and an instruction set: cpu-amx, cpu-avx512, cpu-avx2, cpu-portable ..."
PREFIX = "cpu-"
ALIASES = {"cpu-portable": "cpu-baseline"}
"""What runs on every processor of an architecture."""


def instruction_set_of(decisions: "list[Decision]") -> str:
    """The one that was chosen."""
    return next(one.value for one in decisions if one.name == "instruction_set")


@contextmanager
def building_for(name: str) -> "Iterator[Target]":
    """The target of that name. While it is built for, its instruction set is the one that everything here takes, if
    this machine runs it.

    Raises:
        ConfigurationError: there is no such target, or none that can be built without the device.
    """
    from quire.ops.select import instruction_sets

    here, wanted = instruction_sets(), _instruction_set(name)
    with _forced(wanted if wanted in here else None):
        yield _target(wanted, here)


def _instruction_set(name: str) -> str | None:
    """By its own name; None: this machine's best."""
    from quire.ops.select import compiled_instruction_sets

    known = [PREFIX + one for one in compiled_instruction_sets()]
    if name == "auto":
        return None
    if name.startswith("cuda"):
        text = f"target {name[:40]!r}: kernels for a GPU are compiled and timed on the device that runs them, which no "
        text += f"build of this version does; targets are {', '.join(known)}"
        raise ConfigurationError(text, field="target")
    if ALIASES.get(name, name) not in known:
        text = f"target must be auto or one of {', '.join((*known, *ALIASES))}, got {name[:40]!r}"
        raise ConfigurationError(text, field="target")
    return ALIASES.get(name, name).removeprefix(PREFIX)


def _target(wanted: str | None, here: list[str]) -> "Target":
    from quire.build.builder import Target
    from quire.ops.cpu_layouts import bfloat16_layout
    from quire.ops.select import select_ops

    ops, decisions = select_ops("cpu", None)
    chosen = instruction_set_of(decisions)
    name = wanted or chosen
    if name in here:
        if wanted is not None:
            asked = Decision("instruction_set", name, "as asked")
            decisions = [asked if one.name == asked.name else one for one in decisions]
        return Target(ops, name, decisions, bfloat16_layout(name))
    reason = f"as asked; this machine has {chosen}: the golden prompts were not asked"
    kept = [one for one in decisions if one.name == "operations"]
    return Target(ops, name, [*kept, Decision("instruction_set", name, reason)], bfloat16_layout(name), runs_here=False)


@contextmanager
def _forced(instruction_set: str | None) -> Iterator[None]:
    before = os.environ.get("QUIRE_ISA")
    if instruction_set is not None:
        os.environ["QUIRE_ISA"] = instruction_set
    try:
        yield
    finally:
        os.environ.pop("QUIRE_ISA", None)
        if before is not None:
            os.environ["QUIRE_ISA"] = before
