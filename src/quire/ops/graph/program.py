"""A program: instructions over numbered buffers.

Every buffer is `[tokens, width]`, and an instruction names consecutive floats of each row of it, so slices of heads and
reshapes cost nothing and no number of tokens stands in the program.

::

    buffer 2, one row for each token:  | q: 9 heads of 64 | k: 3 heads of 64 | v: 3 heads of 64 |
    View(2, offset=576, groups=3, width=64)                ^^^^^^^^^^^^^^^^^

What an instruction reads, what it writes and how it is printed follow from the fields of its class: `operations.py`.
"""

import dataclasses
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    cast,
    get_args,
    get_origin,
    runtime_checkable,
)

from quire.ops.types import RopeTables

Numbers = Literal["token_ids", "positions"]
"""The integers of a step, one for each token."""


@runtime_checkable
class Packed(Protocol):
    """What a program must know of a packed weight."""

    @property
    def out_features(self) -> int:
        """Rows of the weight, or of the table."""

    @property
    def in_features(self) -> int:
        """Columns of it."""

    @property
    def out_width(self) -> int:
        """The width of a GEMM's result: half of the rows where gate and up are one weight."""

    @property
    def reads_amx_bf16(self) -> bool:
        """Whether its inputs may have the layout `amx_bf16`."""


@dataclass(frozen=True, slots=True)
class View:
    """`groups` times `width` consecutive floats of each row of a buffer; they begin at `offset`."""

    buffer: int
    offset: int
    groups: int
    width: int

    @property
    def size(self) -> int:
        """Floats for each token."""
        return self.groups * self.width

    def __str__(self) -> str:
        heads = f"{self.groups}x" if self.groups > 1 else ""
        return f"%{self.buffer}[{self.offset}: {heads}{self.width}]"


@dataclass(frozen=True, slots=True)
class Role:
    """What an instruction does with one of its views."""

    reads: bool = False
    writes: bool = False
    amx_bf16: bool = False
    """It may write the view in the layout `amx_bf16`."""
    amx_bf16_by: str | None = None
    """It may read the view in that layout where the weight in the field of this name does."""
    updated_if: str | None = None
    """Where the field of this name is true, it reads what it writes, and both are float32."""


READ = Role(reads=True)
WRITE = Role(writes=True)
UPDATE = Role(reads=True, writes=True)
"""Changed in place."""


class Field(NamedTuple):
    """One field of an instruction's class: a view, with a role, or an argument."""

    name: str
    type: Any
    role: Role | None


def fields_of(instruction: "Instruction") -> tuple[Field, ...]:
    """The fields of an instruction, in their order. A view is `Annotated` with its role."""
    return _fields(cast(Hashable, type(instruction)))


@cache
def _fields(kind: Hashable) -> tuple[Field, ...]:
    found = []
    for one in dataclasses.fields(cast(Any, kind)):
        base, *roles = get_args(one.type) if get_origin(one.type) is Annotated else (one.type,)
        found.append(Field(one.name, base, roles[0] if roles else None))
    return tuple(found)


class Instruction:
    """One operation of a program. A subclass is a frozen dataclass whose fields are views, each with its role, and
    arguments, in the order in which native code takes them."""

    __slots__ = ()
    name: ClassVar[str]
    """What it is called in print and in native code."""
    ends_segment: ClassVar[bool] = False
    """Whether rows of it depend on other rows: what lies between two such instructions is a segment."""

    def _views(self) -> Iterator[tuple[View, Role]]:
        for name, _, role in fields_of(self):
            if role is not None:
                value = getattr(self, name)
                for view in value if isinstance(value, tuple) else () if value is None else (value,):
                    yield view, role

    def _updates(self, role: Role) -> bool:
        return role.updated_if is not None and bool(getattr(self, role.updated_if))

    def reads(self) -> tuple[View, ...]:
        """What it reads, what it changes in place included."""
        return tuple(view for view, role in self._views() if role.reads or self._updates(role))

    def writes(self) -> tuple[View, ...]:
        """What it writes, in place or not."""
        return tuple(view for view, role in self._views() if role.writes)

    def touches(self) -> tuple[View, ...]:
        """Both."""
        return *self.reads(), *self.writes()

    def reads_numbers(self) -> bool:
        """Whether it reads integers of the step, which are there for every token of it."""
        return any(one.type == Numbers for one in fields_of(self))

    def amx_bf16_inputs(self) -> tuple[View, ...]:
        """What it reads and can read in the layout `amx_bf16`."""
        return tuple(
            view
            for view, role in self._views()
            if role.amx_bf16_by is not None and getattr(self, role.amx_bf16_by).reads_amx_bf16
        )

    def amx_bf16_outputs(self) -> tuple[View, ...]:
        """What it writes and can write in the layout `amx_bf16`."""
        return tuple(view for view, role in self._views() if role.amx_bf16 and not self._updates(role))

    def __str__(self) -> str:
        details = [_detail(one.name, getattr(self, one.name)) for one in fields_of(self)]
        ins = [*map(str, self.reads()), *(one for one in details if one)]
        return f"{', '.join(map(str, self.writes()))} = {self.name}({', '.join(ins)})"


def _detail(name: str, value: object) -> str:
    """An argument in print; empty for what would only fill the line."""
    match value:
        case bool():
            return name if value else ""
        case str():
            return value
        case int():
            return f"{name} {value}"
        case RopeTables():
            return name
        case Packed():
            return f"{value.out_features}x{value.in_features}"
        case _:
            return ""


@dataclass(frozen=True, slots=True)
class Buffer:
    """What each token has in it: `width` floats, or as many bfloat16 in the order of AMX tiles, padded to 32."""

    width: int
    layout: Literal["float32", "amx_bf16"] = "float32"

    @property
    def floats(self) -> int:
        """The memory of one token, in units of a float."""
        return self.width if self.layout == "float32" else -(-self.width // 32) * 16


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions in order, and the buffers that their views count; `result` is all of its buffer."""

    instructions: tuple[Instruction, ...]
    buffers: tuple[Buffer, ...]
    result: View

    def __str__(self) -> str:
        layouts = [f"%{number} is {one.layout}" for number, one in enumerate(self.buffers) if one.layout != "float32"]
        return "\n".join([*layouts, *map(str, self.instructions), f"return {self.result}"])
