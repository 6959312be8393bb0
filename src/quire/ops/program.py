"""A model's step as data: instructions over numbered buffers.

`trace` runs a forward function once over symbols and writes down which operations it asks for. Every symbol is
`[tokens, ...]`: some consecutive floats of each row of a buffer, so slices of heads and reshapes cost nothing and no
number of tokens stands in the program.

::

    buffer 2, one row for each token:  | q: 9 heads of 64 | k: 3 heads of 64 | v: 3 heads of 64 |
    View(2, offset=576, groups=3, width=64)                ^^^^^^^^^^^^^^^^^
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast

from quire.ops.types import Activation, Array, AttentionBatch, AttentionSpec, Forward, Ops, RopeTables

Numbers = Literal["token_ids", "positions"]


class Packed(Protocol):
    """What the trace must know of a packed weight."""

    @property
    def out_features(self) -> int:
        """Rows of the weight, or of the table."""

    @property
    def in_features(self) -> int:
        """Columns of it."""

    @property
    def out_width(self) -> int:
        """The width of a product; half of the rows where gate and up are one weight."""

    @property
    def reads_tiles(self) -> bool:
        """Whether its inputs may be rows of bfloat16."""


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
class Embed:
    """`y = table[numbers] * scale`"""

    numbers: Numbers
    table: Packed
    scale: float
    y: View


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = x W^T + b`; `y += x W^T + b` where it `adds`; `y = kind(gate) * up` where the weight is gated."""

    x: View
    weight: Packed
    kind: Activation | None
    y: View
    adds: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """`residual += x`, then y is the norm of the residual; without one y is the norm of x. Each group of x has a
    norm of its own. `centre` subtracts the mean (layer_norm)."""

    x: View
    residual: View | None
    weight: Array
    bias: Array | None
    eps: float
    centre: bool
    y: View


@dataclass(frozen=True, slots=True)
class Add:
    """`y += x`"""

    x: View
    y: View


@dataclass(frozen=True, slots=True)
class Attention:
    """Write k and v to the cache, attend with q; with `rope` tables q and k are rotated on the way. Where it `narrows`,
    only the outputs of the step attend and go on: their rows of these buffers move up."""

    q: View
    k: View
    v: View
    layer: int
    spec: AttentionSpec
    rope: RopeTables | None
    y: View
    narrows: tuple[View, ...] = ()


@dataclass(frozen=True, slots=True)
class Activate:
    """`y = kind(x)`; where it `multiplies`, x is a gate and a factor side by side and `y = kind(gate) * factor`."""

    x: View
    kind: Activation
    multiplies: bool
    y: View


Instruction = Embed | Linear | Norm | Add | Attention | Activate


def reads(instruction: Instruction) -> tuple[View, ...]:
    """What an instruction reads, what it changes in place included."""
    match instruction:
        case Embed():
            return ()
        case Linear(x=x, y=y, adds=adds):
            return (x, y) if adds else (x,)
        case Norm(x=x, residual=residual):
            return (x,) if residual is None else (x, residual)
        case Add(x=x, y=y):
            return (x, y)
        case Attention(q=q, k=k, v=v, narrows=narrows):
            return (q, k, v, *narrows)
        case Activate(x=x):
            return (x,)


def writes(instruction: Instruction) -> tuple[View, ...]:
    """What an instruction writes, in place or not."""
    if isinstance(instruction, Norm) and instruction.residual is not None:
        return (instruction.residual, instruction.y)
    if isinstance(instruction, Attention):
        return (instruction.y, *instruction.narrows)
    return (instruction.y,)


@dataclass(frozen=True, slots=True)
class Buffer:
    """What each token has in it: `width` floats, or as many bfloat16 in the order of AMX tiles, padded to 32."""

    width: int
    form: Literal["float32", "tiles"] = "float32"

    @property
    def floats(self) -> int:
        """The memory of one token, in units of a float."""
        return self.width if self.form == "float32" else -(-self.width // 32) * 16


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions in order, and the buffers that their views count; `result` is all of its buffer."""

    instructions: tuple[Instruction, ...]
    buffers: tuple[Buffer, ...]
    result: View

    def __str__(self) -> str:
        forms = [f"%{number} is of {one.form}" for number, one in enumerate(self.buffers) if one.form != "float32"]
        return "\n".join([*forms, *map(_line, self.instructions), f"return {self.result}"])


def _line(instruction: Instruction) -> str:
    outs = ", ".join(map(str, writes(instruction)))
    ins = ", ".join(map(str, reads(instruction)))
    details: tuple[object, ...] = ()
    match instruction:
        case Embed(numbers=numbers, table=table):
            details = (numbers, f"{table.out_features}x{table.in_features}")
        case Linear(weight=weight, kind=kind, adds=adds):
            shape = f"{weight.out_features}x{weight.in_features}"
            details = (shape, *([kind] if kind is not None else []), *(["adds"] if adds else []))
        case Attention(layer=layer, rope=rope):
            details = (f"layer {layer}", *(["rope"] if rope is not None else []))
        case Activate(kind=kind):
            details = (kind,)
        case _:
            pass
    name = type(instruction).__name__.lower()
    return f"{outs} = {name}({', '.join([ins, *map(str, details)] if ins else map(str, details))})"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each buffer begins, in floats for each token, in one of two memories.

    What lies between two attentions is a stage, whose tokens may be computed in any order. A buffer that *passes* is
    used in one stage only; all others are kept for the tokens of a whole step.
    """

    offsets: tuple[int, ...]
    passes: tuple[bool, ...]
    kept: int
    """Floats of each token of a step."""
    passing: int
    """Floats of each token that is in work."""


def place(program: Program) -> Placement:
    """Two buffers that pass share memory if one is last used before the other is first written; two that are kept, if
    one's last stage ends before the other's first begins. The buffer of the result lies outside, at 0."""
    first = dict.fromkeys(range(len(program.buffers)), (0, 0))  # stage and instruction, from 1; 0 where it is unused
    last = first.copy()
    stage = 0
    for index, instruction in enumerate(program.instructions, 1):
        stage += isinstance(instruction, Attention)
        for view in (*reads(instruction), *writes(instruction)):
            if last[view.buffer] == (0, 0):
                first[view.buffer] = stage, index
            last[view.buffer] = stage, index
        stage += isinstance(instruction, Attention)
    del first[program.result.buffer]
    passes = [number in first and first[number][0] == last[number][0] for number in last]
    offsets = [0] * len(passes)
    floats = [
        _pack(program, {one: (first[one][which], last[one][which]) for one in first if passes[one] == which}, offsets)
        for which in (False, True)
    ]
    return Placement(tuple(offsets), tuple(passes), *floats)


def _pack(program: Program, spans: dict[int, tuple[int, int]], offsets: list[int]) -> int:
    """Sets the offsets of buffers that are alive from one moment to another; returns the memory they need."""
    sizes = [buffer.floats for buffer in program.buffers]
    placed: list[int] = []
    for buffer in sorted(spans, key=lambda one: spans[one][0]):
        for other in sorted(placed, key=lambda one: offsets[one]):
            alive = spans[other][1] >= spans[buffer][0]
            ends_before = offsets[buffer] + sizes[buffer] <= offsets[other]
            if alive and not ends_before and offsets[buffer] < offsets[other] + sizes[other]:
                offsets[buffer] = offsets[other] + sizes[other]
        placed.append(buffer)
    return max((offsets[one] + sizes[one] for one in placed), default=0)


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
        """To `(-1, size)`, `(-1, width)` or `(-1, groups, width)`."""
        tail = shape[1:]
        width = tail[-1]
        right = shape[0] == -1 and len(tail) in (1, 2) and self.view.size % width == 0
        groups = self.view.size // width
        if not right or (len(tail) == 2 and tail[0] != groups):
            raise ValueError(f"a program cannot reshape {self.view} to {shape}")
        whole = self.view.size == self.trace.widths[self.view.buffer]
        return replace(self, view=replace(self.view, groups=groups, width=width), shape_tail=tail, in_place=whole)

    def __getitem__(self, key: tuple[slice, slice]) -> "Symbol":
        """`x[:, a:b]` of `[tokens, groups, width]`."""
        tokens, groups = key
        start, stop, step = groups.indices(self.view.groups)
        if tokens != slice(None) or step != 1 or len(self.shape_tail) != 2 or start >= stop:
            raise ValueError(f"a program cannot take {key} of {self.view}")
        view = replace(self.view, offset=self.view.offset + start * self.view.width, groups=stop - start)
        return replace(self, view=view, shape_tail=(stop - start, self.view.width))

    def __iadd__(self, x: "Symbol") -> "Symbol":
        self.trace.require(self.in_place and x.view.size == self.view.size, "+=", self, x)
        self.trace.instructions.append(Add(x.view, self.view))
        return self


@dataclass(frozen=True, slots=True)
class Integers:
    """Stands for the token ids or the positions of a step."""

    name: Numbers


class Trace:
    """The operations that a forward function may use, over symbols. They compute nothing and write down everything."""

    name = "trace"

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.widths: list[int] = []

    def require(self, holds: bool, operation: str, *symbols: Symbol) -> None:
        """Raise ValueError with the shapes."""
        if not holds:
            raise ValueError(f"{operation} of {', '.join(str(symbol.view) for symbol in symbols)}: shapes do not fit")

    def _new(self, *tail: int, like: Symbol | None = None) -> Symbol:
        groups, width = (1, tail[0]) if like is None else (like.view.groups, like.view.width)
        self.widths.append(groups * width)
        return Symbol(self, View(len(self.widths) - 1, 0, groups, width), tail)

    def embed(self, token_ids: Integers, packed: Packed, scale: float = 1.0) -> Symbol:
        y = self._new(packed.in_features)
        self.instructions.append(Embed(token_ids.name, packed, scale, y.view))
        return y

    def linear(self, x: Symbol, packed: Packed) -> Symbol:
        self.require(x.view.groups == 1 and x.view.width == packed.in_features, "linear", x)
        y = self._new(packed.out_features)
        self.instructions.append(Linear(x.view, packed, None, y.view))
        return y

    def gated_linear(self, x: Symbol, packed: Packed, kind: Activation) -> Symbol:
        self.require(x.view.groups == 1 and x.view.width == packed.in_features, "gated_linear", x)
        y = self._new(packed.out_width)
        self.instructions.append(Linear(x.view, packed, kind, y.view))
        return y

    def rms_norm(self, x: Symbol, weight: Array, eps: float) -> Symbol:
        return self._norm(x, None, weight, None, eps, False)

    def add_rms_norm(self, x: Symbol, residual: Symbol, weight: Array, eps: float) -> Symbol:
        return self._norm(x, residual, weight, None, eps, False)

    def layer_norm(self, x: Symbol, weight: Array, bias: Array | None, eps: float) -> Symbol:
        return self._norm(x, None, weight, bias, eps, True)

    def _norm(
        self, x: Symbol, residual: Symbol | None, weight: Array, bias: Array | None, eps: float, centre: bool
    ) -> Symbol:
        self.require(x.view.width == weight.shape[0], "norm", x)
        if residual is not None:
            self.require(residual.view.size == x.view.size == x.view.width, "norm", x, residual)
        y = self._new(*x.shape_tail, like=x)
        into = None if residual is None else residual.view
        self.instructions.append(Norm(x.view, into, weight, bias, eps, centre, y.view))
        return y

    def attention(
        self,
        q: Symbol,
        k: Symbol,
        v: Symbol,
        cache: None,
        layer: int,
        batch: AttentionBatch,
        spec: AttentionSpec,
        rope: RopeTables | None = None,
    ) -> Symbol:
        self.require(q.view.width == k.view.width == v.view.width, "attention", q, k, v)
        self.require(rope is None or 2 * rope.cos.shape[1] <= q.view.width, "rope", q, k)
        self.require(k.view.groups == v.view.groups and q.view.groups % k.view.groups == 0, "attention", q, k, v)
        y = self._new(q.view.size)
        self.instructions.append(Attention(q.view, k.view, v.view, layer, spec, rope, y.view))
        return y

    def activation(self, x: Symbol, kind: Activation) -> Symbol:
        y = self._new(*x.shape_tail, like=x)
        self.instructions.append(Activate(x.view, kind, False, y.view))
        return y

    def activation_multiply(self, gate_up: Symbol, kind: Activation) -> Symbol:
        self.require(gate_up.view.groups == 1 and gate_up.view.width % 2 == 0, "activation_multiply", gate_up)
        y = self._new(gate_up.view.width // 2)
        self.instructions.append(Activate(gate_up.view, kind, True, y.view))
        return y


def trace(forward: Forward) -> Program:
    """The program of `forward(ops, token_ids, batch, cache)`.

    Raises:
        ValueError: shapes that do not fit, or a view that a program cannot have.
    """
    ops = Trace()
    batch = AttentionBatch(Integers("positions"), None, None, None)
    result: Symbol = forward(cast(Ops, ops), Integers("token_ids"), batch, None)
    ops.require(result.view.groups == 1 and result.view.size == ops.widths[result.view.buffer], "the result", result)
    return Program(tuple(ops.instructions), tuple(map(Buffer, ops.widths)), result.view)
