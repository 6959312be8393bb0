"""What devices can do, from their makers' data sheets: dense rates, no sparsity; bytes and operations are decimal."""

from collections.abc import Mapping
from dataclasses import dataclass

GB, TB, TERA = 10**9, 10**12, 10**12


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """A device as a roofline sees it (Williams, Waterman, Patterson 2009)."""

    name: str
    memory_bytes: int
    read_bytes_per_s: float
    operations_per_s: Mapping[str, float]
    """Multiplications and additions, by the type that is multiplied: `float32`, `bfloat16`, `int8`, `fp8`; `int8 twice`
    where activations of 16 bits are two of 8."""


def _gpu(
    name: str, memory_gb: float, read_gb: float, bfloat16: float, int8: float, fp8: float | None = None
) -> PlannedDevice:
    rates = {"bfloat16": bfloat16 * TERA, "int8": int8 * TERA, **({} if fp8 is None else {"fp8": fp8 * TERA})}
    return PlannedDevice(name, int(memory_gb * GB), read_gb * GB, rates)


DEVICES = {
    device.name: device
    for device in (
        _gpu("a100-40", 40, 1555, 312, 624),
        _gpu("a100-80", 80, 2039, 312, 624),
        _gpu("h100", 80, 3350, 989, 1979, 1979),
        _gpu("h200", 141, 4800, 989, 1979, 1979),
        _gpu("b200", 180, 8000, 2250, 4500, 4500),
        _gpu("l4", 24, 300, 121, 242, 242),
        _gpu("l40s", 48, 864, 362, 733, 733),
        _gpu("rtx-4090", 24, 1008, 165, 660, 330),
        _gpu("rtx-5090", 32, 1792, 209, 838, 419),
        _gpu("m2-ultra", 192, 800, 27, 27),
        _gpu("m4-max", 128, 546, 17, 17),
    )
}
"""By name. The A100-40 reads 1.56 TB/s; the A100-80 2.04. GeForce cards multiply bfloat16 at this rate with float32
accumulation. Apple's rates are those of the GPU in float16."""
