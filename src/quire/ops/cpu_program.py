"""A program in native code: all of a model's step in one call (`docs/design/program.md`)."""

from typing import Any

import numpy as np

from quire.ops import _native
from quire.ops.program import (
    Activate,
    Add,
    Attention,
    Embed,
    Instruction,
    Linear,
    Norm,
    Program,
    View,
    place,
)
from quire.ops.types import Array, AttentionBatch, Opaque

ACTIVATION = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # enum Activation in native/kernels.h
NO_WINDOW = 2**63 - 1


class CpuProgram:
    """Computes what `program` says; shapes and numbers of a step are checked once, before anything runs.

    Buffers are kept from step to step, as large as the largest one so far. Steps of one provider run one after
    another, whoever calls.
    """

    def __init__(self, runtime: _native.Runtime, program: Program) -> None:
        self.program = program
        where = place(program)
        buffers = [
            (offset, buffer.width, buffer.form == "tiles", passes)
            for offset, passes, buffer in zip(where.offsets, where.passes, program.buffers, strict=True)
        ]
        self._width = program.result.size
        self._native = runtime.program(buffers, where.kept, where.passing, program.result.buffer)
        for instruction in program.instructions:
            _append(self._native, instruction)

    def __call__(self, token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Any:
        """Raises ValueError as the single operations do."""
        outputs = batch.outputs
        out = np.empty((token_ids.shape[0] if outputs is None else len(outputs), self._width), np.float32)
        tables = batch.block_tables
        self._native.run(token_ids, batch.positions, batch.query_starts, batch.starts, tables, outputs, cache, out)
        return out


def _append(native: _native.Program, instruction: Instruction) -> None:
    match instruction:
        case Embed(numbers, table, scale, y):
            native.embed(numbers == "positions", _packed(table), scale, _numbers(y))
        case Linear(x, weight, kind, y, adds):
            native.linear(_numbers(x), _packed(weight), adds, ACTIVATION[kind or "silu"], _numbers(y))
        case Norm(x, residual, weight, bias, eps, centre, y):
            into = None if residual is None else _numbers(residual)
            native.norm(_numbers(x), into, weight, bias, eps, centre, _numbers(y))
        case Add(x, y):
            native.add(_numbers(x), _numbers(y))
        case Attention(q, k, v, layer, spec, rope, y, narrows):
            window = NO_WINDOW if spec.window is None else spec.window
            softcap = spec.softcap or 0.0
            qkv = _numbers(q), _numbers(k), _numbers(v)
            cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
            kept = [view.buffer for view in narrows]
            native.attention(qkv, layer, spec.scale, window, softcap, spec.sinks, cos, sin, kept, _numbers(y))
        case Activate(x, kind, multiplies, y):
            native.activation(_numbers(x), ACTIVATION[kind], multiplies, _numbers(y))


def _numbers(view: View) -> tuple[int, int, int, int]:
    return view.buffer, view.offset, view.groups, view.width


def _packed(weight: Any) -> _native.PackedLinear:
    # To the trace a weight is whatever has a shape; it came out of this provider's `pack_linear`.
    assert isinstance(weight, _native.PackedLinear)
    return weight
