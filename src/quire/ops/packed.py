"""Packed weights outside a provider: what it takes to write them to a file, and to use them from there uncopied.

`packed_state` gives a header of plain values and the bytes; `map_packed` makes a packed weight over such bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np

Buffer = Any
"""An array or a memoryview of bytes, contiguous; a provider may take tensors of its device too."""

DTYPES = ("bfloat16", "float16", "float32")
VERSION = 1
"""Of the layouts of all providers. A change of any of them, or of what a field means, raises it."""
ALIGNMENT = 64
"""Bytes that the beginning of every buffer is a multiple of: a cache line, and a register of AVX-512."""


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """What a packed weight is. Plain values: any serialiser of dataclasses writes and reads it."""

    version: int
    provider: Literal["reference", "cpu", "cuda"]
    layout: str
    """The provider's order of the bytes; instruction sets that share one can share the file. The CPU has `panels`
    (float16, float32, and bfloat16 where no unit multiplies it), `amx_bf16` and `integers` (all that are quantised)."""
    format: str
    """`bfloat16`, `float16`, `float32`, or a `QuantizedFormat`."""
    dtype: str
    """Of the weights, or with a `QuantizedFormat` of the activations: a `WeightDtype`."""
    out_features: int
    in_features: int
    group_size: int
    """Inputs that share a scale; 0 where the weight is not quantised."""
    gated: bool
    """Packed by `pack_gated`: the outputs are those of gate, then those of up."""
    has_bias: bool
    scale_dtype: str = "float32"
    """Of scales and minima where the weight is quantised: `float32`, or `float16`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type if isinstance(field.type, type) else str
            if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**31):
                raise ValueError(f"packed weight: {field.name} is {value!r}, out of range or of another type")
        if self.scale_dtype not in ("float32", "float16"):
            raise ValueError(f"packed weight: scale_dtype is {self.scale_dtype!r}, not float32 or float16")
        if self.dtype not in DTYPES:
            raise ValueError(f"packed weight: dtype is {self.dtype!r}, not one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class PackedState:
    """A header and its buffers, in the provider's order."""

    header: PackedHeader
    buffers: tuple[Buffer, ...]


class PackedStore(Protocol):
    """What a provider does with packed weights besides computing with them."""

    def packed_state(self, packed: Any) -> PackedState:
        """The header and the bytes of what a `pack_*` operation made. The buffers are views where the host can read the
        memory, and valid as long as they live."""

    def map_packed(self, header: PackedHeader, buffers: Sequence[Buffer]) -> Any:
        """A packed weight over `buffers`, with the bits of the one that they came from. Memory of the provider's own
        device is not copied, not written and kept alive; it may be a file that is mapped for reading.

        Raises:
            ValueError: a field of the header, or the number, the size or the alignment of a buffer, is not what this
                provider and this instruction set read; it names the field.
        """


def require_field(name: str, value: Any, expected: Any) -> None:
    """ValueError, which names the field, unless it has the value expected."""
    if value != expected:
        raise ValueError(f"packed weight: {name} is {value!r}, not {expected!r}")


def check_header(header: PackedHeader, provider: str, **expected: Any) -> None:
    """ValueError, which names the field, unless the header is of this version and provider and as expected."""
    for name, value in {"version": VERSION, "provider": provider, **expected}.items():
        require_field(name, getattr(header, name), value)


def check_group_size(header: PackedHeader) -> None:
    """ValueError, which names the field, unless the format has groups of that size."""
    from quire.ops.types import FORMATS  # which imports this module

    sizes: tuple[int, ...] = (0,)
    if header.format not in DTYPES:
        stated = next((one for name, one in FORMATS.items() if name == header.format), None)
        sizes = (header.in_features,) if stated is None or not stated.group_sizes else stated.group_sizes
    if header.group_size not in sizes:
        raise ValueError(f"packed weight: group_size is {header.group_size}, not one of {sizes}")


def byte_views(buffers: Sequence[Buffer], number: int) -> list[memoryview]:
    """The bytes of each buffer. ValueError for another number of them, or one that is not contiguous memory."""
    require_field("number of buffers", len(buffers), number)
    try:
        return [memoryview(buffer).cast("B") for buffer in buffers]
    except (BufferError, TypeError, ValueError) as error:
        raise ValueError("packed weight: a buffer is not contiguous memory") from error


def checked_buffers(buffers: Sequence[Buffer], sizes: Sequence[int]) -> list[Any]:
    """`byte_views` as read-only arrays, uint8 `[size]`; ValueError, too, for another size or alignment of one."""
    views = []
    for i, (buffer, size) in enumerate(zip(byte_views(buffers, len(sizes)), sizes, strict=True)):
        view = np.frombuffer(buffer, np.uint8)
        require_field(f"size of buffer {i}", view.size, size)
        if view.size and view.ctypes.data % ALIGNMENT:
            raise ValueError(f"packed weight: alignment of buffer {i} is not {ALIGNMENT} bytes")
        view.flags.writeable = False
        views.append(view)
    return views
