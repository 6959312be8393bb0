"""Tracing: what is written down, what is refused, and how buffers share memory."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quire.ops.graph.fuse import fuse
from quire.ops.graph.operations import Activate, Add, Attention, Embed, Linear, Norm, trace
from quire.ops.graph.plan import plan_memory
from quire.ops.graph.program import Program, View
from quire.ops.types import AttentionSpec, RopeTables

WEIGHT = np.ones(8, np.float32)
ROPE = RopeTables(np.zeros((16, 2), np.float32), np.zeros((16, 2), np.float32))
SPEC = AttentionSpec(0.5)


def packed(out: int, inputs: int, *, gated: bool = False, reads_amx_bf16: bool = False) -> Any:
    return SimpleNamespace(
        out_features=out, in_features=inputs, out_width=out // 2 if gated else out, reads_amx_bf16=reads_amx_bf16
    )


TABLE = packed(10, 8)


def small(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
    """One layer: two heads and one key-value head of 4."""
    residual = ops.embed(token_ids, TABLE, 2.0)
    x = ops.rms_norm(residual, WEIGHT, 1e-5)
    heads = ops.linear(x, packed(16, 8)).reshape((-1, 4, 4))
    x = ops.attention(heads[:, :2], heads[:, 2:3], heads[:, 3:], cache, 0, batch, SPEC, ROPE)
    x = ops.add_rms_norm(ops.linear(x, packed(8, 8)), residual, WEIGHT, 1e-5)
    x = ops.linear(ops.activation(ops.linear(x, packed(12, 8)), "silu"), packed(8, 12))
    residual += x
    return ops.layer_norm(residual, WEIGHT, None, 1e-5)


def layers(count: int) -> Any:
    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        residual = ops.embed(token_ids, TABLE, 2.0)
        for layer in range(count):
            heads = ops.linear(ops.rms_norm(residual, WEIGHT, 1e-5), packed(16, 8)).reshape((-1, 4, 4))
            x = ops.attention(heads[:, :2], heads[:, 2:3], heads[:, 3:], cache, layer, batch, SPEC, ROPE)
            residual += ops.linear(x, packed(8, 8))
        return ops.layer_norm(residual, WEIGHT, None, 1e-5)

    return forward


def test_a_program_says_what_the_function_computes() -> None:
    program = trace(small)
    assert [type(one) for one in program.instructions] == [
        Embed, Norm, Linear, Attention, Linear, Norm, Linear, Activate, Linear, Add, Norm,
    ]  # fmt: skip
    attention = program.instructions[3]
    assert isinstance(attention, Attention)
    assert (attention.q, attention.k, attention.v) == (View(2, 0, 2, 4), View(2, 8, 1, 4), View(2, 12, 1, 4))
    assert program.result == View(program.result.buffer, 0, 1, 8)


def test_a_program_is_printed_a_line_for_each_instruction() -> None:
    lines = str(trace(small)).splitlines()
    assert len(lines) == 12
    assert lines[0] == "%0[0: 8] = embed(token_ids, 10x8)"
    assert lines[3] == "%3[0: 8] = attention(%2[0: 2x4], %2[8: 4], %2[12: 4], layer 0, rope)"
    assert lines[5] == "%0[0: 8], %5[0: 8] = norm(%4[0: 8], %0[0: 8])"
    assert re.fullmatch(r"return %\d+\[0: 8\]", lines[-1])


def test_what_is_changed_in_place_is_read_and_written() -> None:
    x, y, z = View(0, 0, 1, 8), View(1, 0, 1, 8), View(2, 0, 1, 8)
    weight = packed(8, 8)
    whole = View(3, 0, 1, 24)
    attention = Attention(x, y, z, 0, SPEC, None, View(4, 0, 1, 8), (whole,))
    for instruction, read, written in (
        (Embed("token_ids", weight, 1.0, y), (), (y,)),
        (Linear(x, weight, None, y), (x,), (y,)),
        (Linear(x, weight, None, y, adds=True), (x, y), (y,)),
        (Norm(x, None, WEIGHT, None, 1e-5, False, y), (x,), (y,)),
        (Norm(x, z, WEIGHT, None, 1e-5, False, y), (x, z), (z, y)),
        (Add(x, y), (x, y), (y,)),
        (attention, (x, y, z, whole), (attention.y, whole)),
        (Activate(x, "silu", y), (x,), (y,)),
    ):
        assert (instruction.reads(), instruction.writes()) == (read, written)


def live(program: Program) -> dict[int, tuple[int, int]]:
    """Buffer -> first and last instruction that touches it."""
    found: dict[int, tuple[int, int]] = {}
    for index, one in enumerate(program.instructions):
        for view in one.touches():
            found[view.buffer] = found.get(view.buffer, (index, index))[0], index
    return found


def test_buffers_share_memory_only_when_they_are_not_alive_together() -> None:
    program = trace(small)
    plan = plan_memory(program)
    offsets, is_local = plan.offsets, plan.is_local
    ends = [offset + buffer.floats for offset, buffer in zip(offsets, program.buffers, strict=True)]
    spans = {buffer: span for buffer, span in live(program).items() if buffer != program.result.buffer}
    for a, (first_a, last_a) in spans.items():
        assert ends[a] <= (plan.local_floats if is_local[a] else plan.persistent_floats)
        for b, (first_b, last_b) in spans.items():
            overlap = is_local[a] == is_local[b] and offsets[a] < ends[b] and offsets[b] < ends[a]
            if a != b and overlap:
                assert last_a < first_b or last_b < first_a
    assert plan.persistent_floats + plan.local_floats < sum(buffer.floats for buffer in program.buffers), (
        "nothing is shared"
    )


def test_buffers_that_fusing_leaves_unused_take_no_memory() -> None:
    """Each layer's result is added to the residual by the GEMM: many layers take no more than three."""
    few, many = (plan_memory(fuse(trace(layers(count)))) for count in (3, 30))
    assert (many.persistent_floats, many.local_floats) == (few.persistent_floats, few.local_floats)


def test_what_a_segment_hands_on_is_persistent() -> None:
    program = trace(layers(2))
    plan = plan_memory(program)
    segment = 0
    segments_of: dict[int, set[int]] = {}
    for one in program.instructions:
        segment += isinstance(one, Attention)
        for view in one.touches():
            segments_of.setdefault(view.buffer, set()).add(segment)
        segment += isinstance(one, Attention)
    for a, seen in segments_of.items():
        if a == program.result.buffer:
            continue
        assert plan.is_local[a] == (len(seen) == 1)
        for b, others in segments_of.items():
            if a != b and not plan.is_local[a] and not plan.is_local[b] and b != program.result.buffer:
                apart = (
                    plan.offsets[a] + program.buffers[a].floats <= plan.offsets[b]
                    or plan.offsets[b] + program.buffers[b].floats <= plan.offsets[a]
                )
                assert apart or max(seen) < min(others) or max(others) < min(seen)


def refuses(forward: Any) -> None:
    with pytest.raises(ValueError, match=r"shapes do not fit|a program cannot"):
        trace(forward)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ops, x, batch: ops.linear(x, packed(8, 9)),
        lambda ops, x, batch: ops.linear(x.reshape((-1, 4)), packed(8, 4)),
        lambda ops, x, batch: ops.rms_norm(x, np.ones(9, np.float32), 1e-5),
        lambda ops, x, batch: ops.add_rms_norm(x, ops.linear(x, packed(9, 8)), WEIGHT, 1e-5),
        lambda ops, x, batch: ops.gated_linear(x, packed(8, 9, gated=True), "silu"),
        lambda ops, x, batch: x.reshape((-1, 3)),
        lambda ops, x, batch: x.reshape((-1, 3, 4)),
        lambda ops, x, batch: x.reshape((2, 4)),
        lambda ops, x, batch: x.reshape((-1, 2, 4))[1:, :],
        lambda ops, x, batch: x.reshape((-1, 2, 4))[:, ::2],
        lambda ops, x, batch: x[:, :4],
        lambda ops, x, batch: x.__iadd__(ops.linear(x, packed(9, 8))),
        # numpy would copy what reshape is given here, and change the copy
        lambda ops, x, batch: x.reshape((-1, 4, 2))[:, :2].reshape((-1, 4)).__iadd__(ops.linear(x, packed(4, 8))),
        lambda ops, x, batch: ops.attention(
            x.reshape((-1, 8, 1))[:, :3], x.reshape((-1, 8, 1))[:, 3:5], x.reshape((-1, 8, 1))[:, 5:7],
            None, 0, batch, SPEC,
        ),
        lambda ops, x, batch: ops.attention(*[x.reshape((-1, 4, 2))[:, :2]] * 3, None, 0, batch, SPEC, ROPE),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_when_traced(wrong: Any) -> None:
    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        x = ops.embed(token_ids, TABLE)
        wrong(ops, x, batch)
        return x

    refuses(forward)


def test_the_result_is_a_whole_buffer() -> None:
    refuses(lambda ops, token_ids, batch, cache: ops.embed(token_ids, TABLE).reshape((-1, 2, 4))[:, :1])
