"""A program in native code: all of a model's step in one call (`docs/design/program.md`)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from quire.ops import _native
from quire.ops.graph.plan import plan_memory
from quire.ops.graph.program import Instruction, Numbers, Packed, Program, View, fields_of
from quire.ops.types import Activation, Array, AttentionBatch, AttentionSpec, Opaque, RopeTables

ACTIVATION = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # enum Activation in native/kernels.h
NO_WINDOW = 2**63 - 1


class CpuProgram:
    """Computes what `program` says; shapes and numbers of a step are checked once, before anything runs.

    Buffers are kept from step to step, as large as the largest one so far. Steps of one provider run one after
    another, whichever thread calls.
    """

    def __init__(self, runtime: _native.Runtime, program: Program) -> None:
        self.program = program
        plan = plan_memory(program)
        buffers = [
            (offset, buffer.width, buffer.layout == "amx_bf16", is_local)
            for offset, is_local, buffer in zip(plan.offsets, plan.is_local, program.buffers, strict=True)
        ]
        self._width = program.result.size
        self._native = runtime.program(buffers, plan.persistent_floats, plan.local_floats, program.result.buffer)
        for instruction in program.instructions:
            getattr(self._native, instruction.name)(*native_arguments(instruction))

    def __call__(self, token_ids: Array, batch: AttentionBatch, cache: Opaque) -> Any:
        """Hidden states `[outputs, hidden]` float32 of the batch's outputs. ValueError as the single operations."""
        outputs = batch.outputs
        out = np.empty((token_ids.shape[0] if outputs is None else len(outputs), self._width), np.float32)
        tables = batch.block_tables
        self._native.run(token_ids, batch.positions, batch.query_starts, batch.starts, tables, outputs, cache, out)
        return out


def tokens_in_work(num_tokens: int, threads: int, segment_bytes: int) -> int:
    """Tokens of a step whose local buffers are there at once (`Program::token_tile_size` in `native/program`).

    Args:
        segment_bytes: of the largest segment's weights.
    """
    least, most, most_bytes = _native.Program.token_tile
    is_tiled = num_tokens >= threads * least and segment_bytes <= most_bytes
    return min(num_tokens, threads * most) if is_tiled else num_tokens


def native_arguments(instruction: Instruction) -> list[Any]:
    """The fields of an instruction as native code takes them: in order, each by its declared type."""
    found: list[Any] = []
    for one in fields_of(instruction):
        value = getattr(instruction, one.name)
        convert = _CONVERSIONS.get(one.type)
        found += [value] if convert is None else convert(value)
    return found


def _view(view: View | None) -> list[Any]:
    return [None if view is None else (view.buffer, view.offset, view.groups, view.width)]


def _spec(spec: AttentionSpec) -> list[Any]:
    window = NO_WINDOW if spec.window is None else spec.window
    return [spec.scale, window, spec.softcap or 0.0, spec.sinks]


def _packed(weight: Any) -> list[Any]:
    # To the trace a weight is whatever has a shape; it came out of this provider's `pack_linear`.
    assert isinstance(weight, _native.PackedLinear)
    return [weight]


_CONVERSIONS: Mapping[Any, Callable[[Any], list[Any]]] = MappingProxyType(
    {
        View: _view,
        View | None: _view,
        tuple[View, ...]: lambda views: [[view.buffer for view in views]],
        Packed: _packed,
        Numbers: lambda numbers: [numbers == "positions"],
        Activation: lambda kind: [ACTIVATION[kind]],
        Activation | None: lambda kind: [ACTIVATION[kind or "silu"]],
        AttentionSpec: _spec,
        RopeTables | None: lambda rope: [None, None] if rope is None else [rope.cos, rope.sin],
    }
)
