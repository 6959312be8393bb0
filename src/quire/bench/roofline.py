"""The roofline of this machine: what memory and the processors' units do at best. `quire doctor` and benchmarks put
measured rates beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

READ_BYTES = 2**28
"""What the streaming read reads: more than any cache holds."""
ROUNDS = 8
UNITS = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "bfloat16_four_tiles"),
    "int8": ("int8", "int8_four_tiles"),
}
"""Each with its probes: which way of using AMX is the faster depends on what else keeps the core busy."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the machine can do, all threads together."""

    read_bytes_per_s: float
    operations_per_s: Mapping[str, float]
    """Multiplications and additions by unit; one that the processor has not is absent."""


def measure_roofline(probe: Callable[[str, Any], int], clock: Callable[[], float]) -> Roofline:
    """The best of several rounds of each probe.

    Args:
        probe: `CpuOps.probe`: runs the probe of that name over the bytes and returns how many bytes it read or how many
            operations it did, 0 where the processor lacks the instructions.
        clock: seconds.
    """

    data = np.ones(READ_BYTES, np.uint8)
    return Roofline(_best(probe, clock, "read", data), measure_units(probe, clock))


def measure_units(probe: Callable[[str, Any], int], clock: Callable[[], float]) -> Mapping[str, float]:
    """`Roofline.operations_per_s`. Args as for `measure_roofline`."""
    nothing = np.ones(0, np.uint8)
    rates = {unit: max(_best(probe, clock, name, nothing) for name in names) for unit, names in UNITS.items()}
    rates = {unit: value for unit, value in rates.items() if value}
    if "int8" in rates:  # an activation of sixteen bits is two bytes
        rates["int8 twice"] = rates["int8"] / 2
    return rates


def _best(probe: Callable[[str, Any], int], clock: Callable[[], float], kind: str, data: Any) -> float:
    rates = []
    for _ in range(ROUNDS):
        begun = clock()
        rates.append(probe(kind, data) / (clock() - begun))
    return max(rates)
