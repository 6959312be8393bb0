"""What a forward function computes with while it is traced: arrays that have shapes and no values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quire.ops.graph.program import Instruction, Numbers, View


@dataclass(frozen=True, slots=True)
class Symbol:
    """Stands for an array: the part of numpy's manners that forward functions use."""

    trace: "Trace"
    view: View
    shape_tail: tuple[int, ...]
    """The shape after the first dimension, which is the tokens, or tokens times groups."""
    in_place: bool = True
    """Whether numpy, too, would change the original through this view."""

    def reshape(self, shape: tuple[int, ...]) -> "Symbol":
        """To `(-1, size)`, `(-1, width)` or `(-1, groups, width)`. ValueError for another shape."""
        tail = shape[1:]
        width = tail[-1]
        right = shape[0] == -1 and len(tail) in (1, 2) and self.view.size % width == 0
        groups = self.view.size // width
        if not right or (len(tail) == 2 and tail[0] != groups):
            raise ValueError(f"a program cannot reshape {self.view} to {shape}")
        whole = self.view.size == self.trace.widths[self.view.buffer]
        return replace(self, view=replace(self.view, groups=groups, width=width), shape_tail=tail, in_place=whole)

    def __getitem__(self, key: tuple[slice, slice]) -> "Symbol":
        """`x[:, a:b]` of `[tokens, groups, width]`. ValueError for another part."""
        tokens, groups = key
        start, stop, step = groups.indices(self.view.groups)
        if tokens != slice(None) or step != 1 or len(self.shape_tail) != 2 or start >= stop:
            raise ValueError(f"a program cannot take {key} of {self.view}")
        view = replace(self.view, offset=self.view.offset + start * self.view.width, groups=stop - start)
        return replace(self, view=view, shape_tail=(stop - start, self.view.width))

    def __iadd__(self, x: "Symbol") -> "Symbol":
        self.trace.add(self, x)
        return self


@dataclass(frozen=True, slots=True)
class Integers:
    """Stands for the token ids or the positions of a step."""

    name: Numbers


class Trace:
    """Stands for `Ops`: each operation computes nothing and is written down.

    Args:
        operations: by name, functions that take this trace and what the operation takes.
    """

    def __init__(self, operations: Mapping[str, Callable[..., Any]]) -> None:
        self._operations = operations
        self.instructions: list[Instruction] = []
        self.widths: list[int] = []
        """Of the buffers so far."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self._operations:
            raise AttributeError(f"a program has no operation {name!r}")
        return partial(self._operations[name], self)

    def require(self, holds: bool, operation: str, *symbols: Symbol) -> None:
        """ValueError, with the shapes, where it does not hold."""
        if not holds:
            raise ValueError(f"{operation} of {', '.join(str(symbol.view) for symbol in symbols)}: shapes do not fit")

    def new(self, *tail: int, like: Symbol | None = None) -> Symbol:
        """An array `[tokens, *tail]`, or of the shape of another one, in a buffer of its own."""
        groups, width = (1, tail[0]) if like is None else (like.view.groups, like.view.width)
        self.widths.append(groups * width)
        return Symbol(self, View(len(self.widths) - 1, 0, groups, width), tail if like is None else like.shape_tail)

    def append(self, instruction: Instruction, y: Symbol) -> Symbol:
        """Write an instruction down; gives `y`, which it makes."""
        self.instructions.append(instruction)
        return y
