"""Each pass: what it rewrites, what it must leave alone, and that results keep their bits."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.cpu_program import CpuProgram
from quire.ops.graph.fuse import add_to_residual, fuse, propagate_bf16_layout, select_output_tokens
from quire.ops.graph.operations import Activate, Add, Attention, Linear, Norm, trace
from quire.ops.graph.program import Program
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, WeightDtype

HIDDEN, WIDE, VOCABULARY = 40, 72, 11
"""No multiples of 16 or 32: amx_bf16 has padding."""


class Weights:
    """Of the provider, or only their shapes."""

    def __init__(self, ops: CpuOps | None = None, dtype: WeightDtype = "bfloat16", *, reads_amx_bf16: bool = True):
        self.ops, self.dtype, self.reads_amx_bf16 = ops, dtype, reads_amx_bf16
        self.rng = np.random.default_rng(3)
        self.table = self.linear(VOCABULARY, HIDDEN)
        self.up, self.down = self.linear(WIDE, HIDDEN), self.linear(HIDDEN, WIDE)
        self.gated, self.square = self.linear(2 * WIDE, HIDDEN, gated=True), self.linear(HIDDEN, HIDDEN)
        self.back = self.linear(HIDDEN, 24)
        self.ones, self.norm = np.ones(HIDDEN, np.float32), self.numbers(HIDDEN)

    def numbers(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def linear(self, out: int, inputs: int, *, gated: bool = False) -> Any:
        if self.ops is None:
            out_width = out // 2 if gated else out
            return SimpleNamespace(
                out_features=out, in_features=inputs, out_width=out_width, reads_amx_bf16=self.reads_amx_bf16
            )
        pack = self.ops.pack_gated if gated else self.ops.pack_linear
        return pack(self.numbers(out, inputs), self.numbers(out), self.dtype)


def chain(w: Weights) -> Any:
    """Both kinds of MLP, both kinds of norm, and a plain addition, each into the residual."""

    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        residual = ops.embed(token_ids, w.table)
        x = ops.rms_norm(residual, w.norm, 1e-5)
        x = ops.linear(ops.activation(ops.linear(x, w.up), "gelu"), w.down)
        x = ops.add_rms_norm(x, residual, w.norm, 1e-5)
        x = ops.linear(ops.gated_linear(x, w.gated, "silu"), w.down)
        residual += x
        x = ops.linear(ops.layer_norm(residual, w.norm, w.ones, 1e-5), w.square)
        return ops.add_rms_norm(x, residual, w.norm, 1e-5)

    return forward


def kinds(program: Program) -> list[str]:
    return [type(one).__name__ for one in program.instructions]


def test_results_of_gemms_are_added_where_they_are_made() -> None:
    program = trace(chain(Weights()))
    fused = add_to_residual(program)
    assert kinds(program).count("Add") == 1 and "Add" not in kinds(fused)
    adding = [one for one in fused.instructions if isinstance(one, Linear) and one.adds]
    assert len(adding) == 3 and {one.y.buffer for one in adding} == {0}
    norms = [one for one in fused.instructions if isinstance(one, Norm)]
    assert all(one.residual is None for one in norms) and [one.x.buffer for one in norms] == [0, 0, 0, 0]


def test_what_only_gemms_read_is_made_as_amx_bf16() -> None:
    fused = fuse(trace(chain(Weights())))
    tiles = {number for number, buffer in enumerate(fused.buffers) if buffer.layout == "amx_bf16"}
    made = {one.y.buffer: one for one in fused.instructions if not isinstance(one, Add)}
    assert sorted(type(made[number]).__name__ for number in tiles) == ["Activate", "Linear", "Norm", "Norm", "Norm"]
    assert fused.result.buffer not in tiles
    assert sum(buffer.floats for buffer in fused.buffers) < sum(
        buffer.floats for buffer in trace(chain(Weights())).buffers
    )
    assert "is amx_bf16" in str(fused)


def test_weights_that_read_floats_get_floats() -> None:
    assert all(one.layout == "float32" for one in fuse(trace(chain(Weights(reads_amx_bf16=False)))).buffers)


def left_alone(name: str) -> Any:
    """Forward functions in which the result x must stay as it is."""
    w = Weights()

    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        residual = ops.embed(token_ids, w.table)
        x = ops.linear(residual, w.square)
        if name == "the residual is read before the addition":
            other = ops.linear(residual, w.square)
            residual += x
            return ops.add_rms_norm(other, residual, w.norm, 1e-5)
        if name == "the result is read twice":
            residual += x
            return ops.add_rms_norm(ops.rms_norm(x, w.norm, 1e-5), residual, w.norm, 1e-5)
        return ops.rms_norm(x, w.norm, 1e-5)

    return forward


@pytest.mark.parametrize(
    "name", ["the residual is read before the addition", "the result is read twice", "it is not added"]
)
def test_a_gemm_that_is_more_than_an_addition_is_left_alone(name: str) -> None:
    first = next(one for one in add_to_residual(trace(left_alone(name))).instructions if isinstance(one, Linear))
    assert not first.adds


def test_what_something_else_reads_stays_float32() -> None:
    w = Weights()

    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        x = ops.rms_norm(ops.embed(token_ids, w.table), w.norm, 1e-5)
        return ops.add_rms_norm(ops.linear(x, w.square), x, w.norm, 1e-5)

    assert all(buffer.layout == "float32" for buffer in propagate_bf16_layout(trace(forward)).buffers)


def test_what_is_also_read_by_something_else_stays_float32() -> None:
    w = Weights()

    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        x = ops.rms_norm(ops.embed(token_ids, w.table), w.norm, 1e-5)
        y = ops.linear(x, w.square)
        y += ops.activation(x, "silu")
        return y

    assert all(buffer.layout == "float32" for buffer in propagate_bf16_layout(trace(forward)).buffers)


def attends_and_then(w: Weights, rest: Any) -> Any:
    """A forward function: a layer of attention over the embedding, and the rest."""

    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        residual = ops.embed(token_ids, w.table)
        heads = ops.linear(residual, w.square).reshape((-1, 5, 8))
        x = ops.attention(heads[:, :3], heads[:, 3:4], heads[:, 4:], cache, 0, batch, AttentionSpec(0.3))
        return rest(ops, residual, ops.linear(x, w.back), token_ids)

    return forward


def adds(ops: Any, residual: Any, x: Any, token_ids: Any) -> Any:
    residual += x
    return residual


def norms(w: Weights) -> Any:
    return lambda ops, residual, x, token_ids: ops.add_rms_norm(x, residual, w.norm, 1e-5)


def embeds(w: Weights) -> Any:
    """The tokens are read once more, all of them, after the last attention."""

    def rest(ops: Any, residual: Any, x: Any, token_ids: Any) -> Any:
        x += ops.embed(token_ids, w.table)
        return x

    return rest


@pytest.mark.parametrize(("name", "selects"), [("norms", True), ("adds", False), ("embeds", False)])
def test_output_tokens_are_selected_only_where_the_rest_is_of_them(name: str, selects: bool, cpu: CpuOps) -> None:
    w = Weights(cpu, "float32")
    forward = attends_and_then(w, {"norms": norms(w), "adds": adds, "embeds": embeds(w)}[name])
    program = select_output_tokens(trace(forward))
    assert any(one.selected for one in program.instructions if isinstance(one, Attention)) == selects
    ids, cache = np.arange(9, dtype=np.int32), cpu.make_cache(CacheShape(1, 2, 16, 1, 8, "float32"))
    ints = [np.array(one, np.int32) for one in ([0, 1, 2, 3, 4, 5, 0, 1, 2], [0, 6, 9], [0, 0], [[0], [1]])]
    batch, step = AttentionBatch(*ints), CpuProgram(cpu._native, fuse(trace(forward)))
    expected = forward(cpu, ids, batch, cache)
    assert np.array_equal(step(ids, batch, cache), expected)
    some = replace(batch, outputs=np.array([4, 5, 8], np.int32))
    if selects:
        assert np.array_equal(step(ids, some, cache), expected[some.outputs])
    else:
        with pytest.raises(ValueError, match="gives all of its tokens"):
            step(ids, some, cache)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_pass_keeps_the_bits(cpu: CpuOps, dtype: WeightDtype) -> None:
    forward = chain(Weights(cpu, dtype))
    program = trace(forward)
    assert any(isinstance(one, Activate) for one in program.instructions)
    cache = cpu.make_cache(_cache_shape())
    for tokens in (1, 3, 16, 17, 33, 2, 150):
        ids = np.arange(tokens, dtype=np.int32) % VOCABULARY
        batch = AttentionBatch(ids, np.array([0, tokens], np.int32), *_one_row(tokens))
        expected = forward(cpu, ids, batch, cache)
        for rewrite in (lambda one: one, add_to_residual, propagate_bf16_layout, fuse):
            step = CpuProgram(cpu._native, rewrite(program))
            assert np.array_equal(step(ids, batch, cache), expected)
            assert np.array_equal(step(ids, batch, cache), expected), "the second time"


def _cache_shape() -> Any:
    return CacheShape(1, 1, 16, 1, 16, "float32")


def _one_row(tokens: int) -> tuple[Any, Any]:
    return np.zeros(1, np.int32), np.zeros((1, -(-tokens // 16)), np.int32)
