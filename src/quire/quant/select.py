"""From the names of the engine's arguments to a scheme."""

from quire.config import FOUR_BITS, KV_CACHE_DTYPES, QUANTIZATIONS
from quire.errors import ConfigurationError
from quire.ops.types import CacheDtype, Ops
from quire.quant.formats import DEFAULT_GROUP_SIZE, FP8, FP8_WEIGHTS, INT8, INT8_W8A8, four_bits, int8
from quire.quant.types import Scheme


def select_scheme(name: str | None, group_size: int | None) -> Scheme | None:
    """The scheme of the arguments `quantization` and `quantization_group_size`; None where nothing is quantised.

    Raises:
        ConfigurationError: a group size for a scheme that has none.
    """
    for one in FOUR_BITS:
        if name == one:
            return four_bits(one, DEFAULT_GROUP_SIZE if group_size is None else group_size)
    if name == "int8" and group_size is not None:
        return int8(group_size)
    if group_size is not None:
        raise ConfigurationError(
            f"quantization_group_size is for quantization 'int4', 'int4_min' and 'int8'; here it is {name!r}",
            field="quantization_group_size",
        )
    return None if name is None else {scheme.name: scheme for scheme in (INT8, INT8_W8A8, FP8)}[name]


def scheme_for(scheme: Scheme | None, ops: Ops) -> Scheme | None:
    """The scheme as `ops` multiplies it: `fp8` with inputs of its own where it has no GEMM of two e4m3. Refuses, before
    anything is loaded, one whose GEMMs it lacks.

    Raises:
        ConfigurationError: it names those that `ops` has.
    """
    if scheme is None or scheme.linear.format in ops.formats:
        return scheme
    if scheme == FP8 and FP8_WEIGHTS.linear.format in ops.formats:
        return FP8_WEIGHTS
    if scheme.linear.format == "int8_groups":
        raise ConfigurationError(
            f"quantization 'int8' in groups needs the CPU; {ops.name} has it without them",
            field="quantization_group_size",
        )
    if scheme.linear.format == "int4_min":
        text = f"quantization 'int4_min' needs the CPU; {ops.name} has int4, without minima"
        raise ConfigurationError(text, field="quantization")
    raise ConfigurationError(
        f"quantization {scheme.name!r} needs an NVIDIA GPU of compute capability 8.9 or newer; "
        f"{ops.name} has {', '.join(name for name in QUANTIZATIONS if name in ops.formats)}",
        field="quantization",
    )


def select_cache_dtype(name: str, ops: Ops) -> CacheDtype | None:
    """The type of keys and values by the argument `kv_cache_dtype`; None is that of the weights.

    Raises:
        ConfigurationError: `ops` has no attention over such a cache; it names those that there are.
    """
    asked = KV_CACHE_DTYPES[name]
    if asked == "auto":
        return None
    for dtype in ops.cache_dtypes:
        if dtype == asked:
            return dtype
    known = ", ".join(ops.cache_dtypes)
    raise ConfigurationError(
        f"kv_cache_dtype {name!r} needs device 'cpu'; {ops.name} has {known}", field="kv_cache_dtype"
    )
