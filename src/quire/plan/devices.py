"""What devices can do. Rates are those of their makers' data sheets: dense, no sparsity, decimal. Memory is what the
driver reports (`nvidia-smi`, in MiB): a card that is sold as 40 GB has 40 GiB, others have a little less than that."""

from collections.abc import Mapping
from dataclasses import dataclass

MIB, GB, TERA = 2**20, 10**9, 10**12


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
    name: str, memory_mib: int, read_gb: float, bfloat16: float, int8: float, fp8: float | None = None
) -> PlannedDevice:
    rates = {"bfloat16": bfloat16 * TERA, "int8": int8 * TERA, **({} if fp8 is None else {"fp8": fp8 * TERA})}
    return PlannedDevice(name, memory_mib * MIB, read_gb * GB, rates)


DEVICES = {
    device.name: device
    for device in (
        _gpu("a100-40", 40960, 1555, 312, 624),
        _gpu("a100-80", 81920, 2039, 312, 624),
        _gpu("h100", 81559, 3350, 989, 1979, 1979),
        _gpu("h200", 143771, 4800, 989, 1979, 1979),
        _gpu("b200", 183359, 8000, 2250, 4500, 4500),
        _gpu("l4", 23034, 300, 121, 242, 242),
        _gpu("l40s", 46068, 864, 362, 733, 733),
        _gpu("rtx-4090", 24564, 1008, 165, 660, 330),
        _gpu("rtx-5090", 32607, 1792, 209, 838, 419),
        _gpu("m2-ultra", 192 * 1024, 800, 27, 27),
        _gpu("m4-max", 128 * 1024, 546, 17, 17),
    )
}
"""By name. The A100-40 reads 1.56 TB/s; the A100-80 2.04. GeForce cards multiply bfloat16 at this rate with float32
accumulation. Apple's rates are those of the GPU in float16."""
