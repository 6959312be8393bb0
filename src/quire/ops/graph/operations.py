"""The operations that a step may have, each registered once.

An instruction's fields say what it reads and writes and which arguments it has, in the order in which native code
(`native/program/operations.cpp`) takes them; tracing, passes, memory, print and the native program all follow from
that. Below each stand the operations of `Ops` that are traced to it: what shapes they need, and what they make.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, cast

from quire.ops.graph.program import (
    READ,
    UPDATE,
    WRITE,
    Buffer,
    Instruction,
    Numbers,
    Packed,
    Program,
    Role,
    View,
)
from quire.ops.graph.symbols import Integers, Symbol, Trace
from quire.ops.types import Activation, Array, AttentionBatch, AttentionSpec, Forward, Ops, RopeTables


@dataclass(frozen=True, slots=True)
class Embed(Instruction):
    """`y = table[numbers] * scale`"""

    name: ClassVar[str] = "embed"
    numbers: Numbers
    table: Packed
    scale: float
    y: Annotated[View, WRITE]


def embed(trace: Trace, token_ids: Integers, packed: Packed, scale: float = 1.0) -> Symbol:
    y = trace.new(packed.in_features)
    return trace.append(Embed(token_ids.name, packed, scale, y.view), y)


@dataclass(frozen=True, slots=True)
class Linear(Instruction):
    """`y = x W^T + b`; `y += x W^T + b` where it `adds`; `y = kind(gate) * up` where the weight is gated."""

    name: ClassVar[str] = "linear"
    x: Annotated[View, Role(reads=True, amx_bf16_by="weight")]
    weight: Packed
    kind: Activation | None
    y: Annotated[View, Role(writes=True, amx_bf16=True, updated_if="adds")]
    adds: bool = False


def linear(trace: Trace, x: Symbol, packed: Packed) -> Symbol:
    return _linear(trace, x, packed, packed.out_features, None)


def gated_linear(trace: Trace, x: Symbol, packed: Packed, kind: Activation) -> Symbol:
    return _linear(trace, x, packed, packed.out_width, kind)


def _linear(trace: Trace, x: Symbol, packed: Packed, width: int, kind: Activation | None) -> Symbol:
    trace.require(x.view.groups == 1 and x.view.width == packed.in_features, "linear", x)
    y = trace.new(width)
    return trace.append(Linear(x.view, packed, kind, y.view), y)


@dataclass(frozen=True, slots=True)
class Norm(Instruction):
    """`residual += x`, then y is the norm of the residual; without one y is the norm of x. Each group of x has a
    norm of its own. `centre` subtracts the mean (layer_norm)."""

    name: ClassVar[str] = "norm"
    x: Annotated[View, READ]
    residual: Annotated[View | None, UPDATE]
    weight: Array
    bias: Array | None
    eps: float
    centre: bool
    y: Annotated[View, Role(writes=True, amx_bf16=True)]


def rms_norm(trace: Trace, x: Symbol, weight: Array, eps: float) -> Symbol:
    return _norm(trace, x, None, weight, None, eps, False)


def add_rms_norm(trace: Trace, x: Symbol, residual: Symbol, weight: Array, eps: float) -> Symbol:
    trace.require(residual.view.size == x.view.size == x.view.width, "norm", x, residual)
    return _norm(trace, x, residual.view, weight, None, eps, False)


def layer_norm(trace: Trace, x: Symbol, weight: Array, bias: Array | None, eps: float) -> Symbol:
    return _norm(trace, x, None, weight, bias, eps, True)


def _norm(
    trace: Trace, x: Symbol, residual: View | None, weight: Array, bias: Array | None, eps: float, centre: bool
) -> Symbol:
    trace.require(x.view.width == weight.shape[0], "norm", x)
    y = trace.new(like=x)
    return trace.append(Norm(x.view, residual, weight, bias, eps, centre, y.view), y)


@dataclass(frozen=True, slots=True)
class Add(Instruction):
    """`y += x`"""

    name: ClassVar[str] = "add"
    x: Annotated[View, READ]
    y: Annotated[View, UPDATE]


def add(trace: Trace, y: Symbol, x: Symbol) -> Symbol:
    trace.require(y.in_place and x.view.size == y.view.size, "+=", y, x)
    return trace.append(Add(x.view, y.view), y)


@dataclass(frozen=True, slots=True)
class Attention(Instruction):
    """Write k and v to the cache, attend with q; with `rope` tables q and k are rotated on the way. Where buffers are
    `selected`, only the output tokens of the step attend and go on: their rows of those buffers move up."""

    name: ClassVar[str] = "attention"
    ends_segment: ClassVar[bool] = True
    q: Annotated[View, READ]
    k: Annotated[View, READ]
    v: Annotated[View, READ]
    layer: int
    spec: AttentionSpec
    rope: RopeTables | None
    y: Annotated[View, WRITE]
    selected: Annotated[tuple[View, ...], UPDATE] = ()


def attention(
    trace: Trace,
    q: Symbol,
    k: Symbol,
    v: Symbol,
    cache: None,
    layer: int,
    batch: AttentionBatch,
    spec: AttentionSpec,
    rope: RopeTables | None = None,
) -> Symbol:
    trace.require(q.view.width == k.view.width == v.view.width, "attention", q, k, v)
    trace.require(rope is None or 2 * rope.cos.shape[1] <= q.view.width, "rope", q, k)
    trace.require(k.view.groups == v.view.groups and q.view.groups % k.view.groups == 0, "attention", q, k, v)
    y = trace.new(q.view.size)
    return trace.append(Attention(q.view, k.view, v.view, layer, spec, rope, y.view), y)


@dataclass(frozen=True, slots=True)
class Activate(Instruction):
    """`y = kind(x)`"""

    name: ClassVar[str] = "activation"
    x: Annotated[View, READ]
    kind: Activation
    y: Annotated[View, Role(writes=True, amx_bf16=True)]


def activation(trace: Trace, x: Symbol, kind: Activation) -> Symbol:
    y = trace.new(like=x)
    return trace.append(Activate(x.view, kind, y.view), y)


OPERATIONS: Mapping[str, Callable[..., Symbol]] = MappingProxyType(
    {
        one.__name__: one
        for one in (
            embed,
            linear,
            gated_linear,
            rms_norm,
            add_rms_norm,
            layer_norm,
            add,
            attention,
            activation,
        )
    }
)
"""What a forward function may use, by the names of `Ops` (and `add`, which is `+=`)."""


def trace(forward: Forward) -> Program:
    """The program of `forward(ops, token_ids, batch, cache)`, which is run once, over symbols.

    Raises:
        ValueError: shapes that do not fit, or a view that a program cannot have.
        AttributeError: an operation that is not registered here.
    """
    ops = Trace(OPERATIONS)
    batch = AttentionBatch(cast(Any, Integers("positions")), *cast(Any, (None, None, None)))
    result = cast(Symbol, forward(cast(Ops, ops), cast(Any, Integers("token_ids")), batch, None))
    ops.require(result.view.groups == 1 and result.view.size == ops.widths[result.view.buffer], "the result", result)
    return Program(tuple(ops.instructions), tuple(map(Buffer, ops.widths)), result.view)
