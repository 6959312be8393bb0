"""Each pass: what it rewrites, what it must leave alone, and that results keep their bits."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.cpu_program import CpuProgram
from quire.ops.fuse import add_to_residual, fuse, hand_on_tiles
from quire.ops.program import Activate, Add, Linear, Norm, Program, trace
from quire.ops.types import AttentionBatch, StorageType

HIDDEN, WIDE, VOCABULARY = 40, 72, 11
"""No multiples of 16 or 32: tiles have padding."""


class Weights:
    """Of the provider, or only their shapes."""

    def __init__(self, ops: CpuOps | None = None, storage: StorageType = "bfloat16", *, reads_tiles: bool = True):
        self.ops, self.storage, self.reads_tiles = ops, storage, reads_tiles
        self.rng = np.random.default_rng(3)
        self.table = self.linear(VOCABULARY, HIDDEN)
        self.up, self.down = self.linear(WIDE, HIDDEN), self.linear(HIDDEN, WIDE)
        self.gated, self.square = self.linear(2 * WIDE, HIDDEN, gated=True), self.linear(HIDDEN, HIDDEN)
        self.ones, self.norm = np.ones(HIDDEN, np.float32), self.numbers(HIDDEN)

    def numbers(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def linear(self, out: int, inputs: int, *, gated: bool = False) -> Any:
        if self.ops is None:
            products = out // 2 if gated else out
            return SimpleNamespace(
                out_features=out, in_features=inputs, products=products, reads_tiles=self.reads_tiles
            )
        pack = self.ops.pack_gated if gated else self.ops.pack_linear
        return pack(self.numbers(out, inputs), self.numbers(out), self.storage)


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


def test_products_are_added_where_they_are_made() -> None:
    program = trace(chain(Weights()))
    fused = add_to_residual(program)
    assert kinds(program).count("Add") == 1 and "Add" not in kinds(fused)
    adding = [one for one in fused.instructions if isinstance(one, Linear) and one.adds]
    assert len(adding) == 3 and {one.y.buffer for one in adding} == {0}
    norms = [one for one in fused.instructions if isinstance(one, Norm)]
    assert all(one.residual is None for one in norms) and [one.x.buffer for one in norms] == [0, 0, 0, 0]


def test_what_only_products_read_is_handed_on_as_tiles() -> None:
    fused = fuse(trace(chain(Weights())))
    tiles = {number for number, buffer in enumerate(fused.buffers) if buffer.form == "tiles"}
    made = {one.y.buffer: one for one in fused.instructions if not isinstance(one, Add)}
    assert sorted(type(made[number]).__name__ for number in tiles) == ["Activate", "Linear", "Norm", "Norm", "Norm"]
    assert fused.result.buffer not in tiles
    assert sum(buffer.floats for buffer in fused.buffers) < sum(
        buffer.floats for buffer in trace(chain(Weights())).buffers
    )
    assert "is of tiles" in str(fused)


def test_weights_that_read_floats_get_floats() -> None:
    assert all(one.form == "float32" for one in fuse(trace(chain(Weights(reads_tiles=False)))).buffers)


def left_alone(name: str) -> Any:
    """Forward functions in which the product x must stay as it is."""
    w = Weights()

    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        residual = ops.embed(token_ids, w.table)
        x = ops.linear(residual, w.square)
        if name == "the residual is read before the addition":
            other = ops.linear(residual, w.square)
            residual += x
            return ops.add_rms_norm(other, residual, w.norm, 1e-5)
        if name == "the product is read twice":
            residual += x
            return ops.add_rms_norm(ops.rms_norm(x, w.norm, 1e-5), residual, w.norm, 1e-5)
        return ops.rms_norm(x, w.norm, 1e-5)

    return forward


@pytest.mark.parametrize(
    "name", ["the residual is read before the addition", "the product is read twice", "it is not added"]
)
def test_a_product_that_is_more_than_an_addition_is_left_alone(name: str) -> None:
    first = next(one for one in add_to_residual(trace(left_alone(name))).instructions if isinstance(one, Linear))
    assert not first.adds


def test_what_something_else_reads_stays_float32() -> None:
    w = Weights()

    def forward(ops: Any, token_ids: Any, batch: Any, cache: Any) -> Any:
        x = ops.rms_norm(ops.embed(token_ids, w.table), w.norm, 1e-5)
        return ops.add_rms_norm(ops.linear(x, w.square), x, w.norm, 1e-5)

    assert all(buffer.form == "float32" for buffer in hand_on_tiles(trace(forward)).buffers)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_each_pass_keeps_the_bits(cpu: CpuOps, storage: StorageType) -> None:
    forward = chain(Weights(cpu, storage))
    program = trace(forward)
    assert any(isinstance(one, Activate) for one in program.instructions)
    cache = cpu.make_cache(_cache_shape())
    for tokens in (1, 3, 16, 17, 33, 2, 150):
        ids = np.arange(tokens, dtype=np.int32) % VOCABULARY
        batch = AttentionBatch(ids, np.array([0, tokens], np.int32), *_one_row(tokens))
        expected = forward(cpu, ids, batch, cache)
        for rewrite in (lambda one: one, add_to_residual, hand_on_tiles, fuse):
            step = CpuProgram(cpu._native, rewrite(program))
            assert np.array_equal(step(ids, batch, cache), expected)
            assert np.array_equal(step(ids, batch, cache), expected), "the second time"


def _cache_shape() -> Any:
    from quire.ops.types import CacheShape

    return CacheShape(1, 1, 16, 1, 16, "float32")


def _one_row(tokens: int) -> tuple[Any, Any]:
    return np.zeros(1, np.int32), np.zeros((1, -(-tokens // 16)), np.int32)
