"""A compiled step gives the bits of the same step operation by operation, for every family and instruction set."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quire.models.decoder import Decoder
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.ops.types import AttentionBatch
from quire.weights.load import load_model
from tests.models.paged import PagedModel, Row
from tests.tiny.checkpoints import FAMILIES, VOCAB_SIZE

Tiny = Callable[..., Path]
MAX_MODEL_LEN = 256
COUNTS = [[37, 1, 5], [1, 1, 1], [1, 16, 2], [140, 1, 120], [1, 1, 1], [70, 200, 5]]
"""Tokens of each of three rows in steps that grow, shrink and grow again. From 256 on two threads take token tiles."""


def load(directory: Path, threads: int = 2, isa: str = "baseline", dtype: str = "bfloat16") -> tuple[Decoder, CpuOps]:
    ops = CpuOps(threads, isa)
    model = load_model(directory, ops, dtype, MAX_MODEL_LEN)
    assert isinstance(model, Decoder)
    return model, ops


def uncompiled(model: Decoder, ops: CpuOps) -> Any:
    """The same model, operation by operation."""
    return SimpleNamespace(
        cache_shape=model.cache_shape,
        logits=model.logits,
        forward=lambda token_ids, batch, cache: model.compute(ops, token_ids, batch, cache),
    )


def run(model: Any, ops: CpuOps) -> list[Any]:
    tokens = np.random.default_rng(5).integers(0, VOCAB_SIZE, (3, MAX_MODEL_LEN)).tolist()
    paged = PagedModel(model, ops, num_blocks=48, block_size=16)
    rows = [Row(one) for one in tokens]
    return [logits for counts in COUNTS for logits in paged.step(rows, counts)]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_program_gives_the_bits_of_its_operations(family: str, isa: str, tiny: Tiny) -> None:
    for dtype in ("bfloat16", "float32"):
        model, ops = load(tiny(family), 2, isa, dtype)
        for ours, expected in zip(run(model, ops), run(uncompiled(model, ops), ops), strict=True):
            assert np.array_equal(ours, expected)


OUTPUTS = [[1, 1, 0], [1, 0, 1], [0, 0, 0], [139, 0, 120], [0, 0, 1], [1, 9, 0]]
"""Of `COUNTS`, those whose hidden states are wanted."""


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_have_the_bits_of_the_whole_step_and_the_cache_is_the_same(family: str, isa: str, tiny: Tiny) -> None:
    model, ops = load(tiny(family), 2, isa)
    tokens = np.random.default_rng(5).integers(0, VOCAB_SIZE, (3, MAX_MODEL_LEN)).tolist()
    paged = PagedModel(model, ops, num_blocks=48, block_size=16)
    rows = [Row(one) for one in tokens]
    some = [
        logits for counts, outputs in zip(COUNTS, OUTPUTS, strict=True) for logits in paged.step(rows, counts, outputs)
    ]
    for ours, expected, count in zip(some, run(model, ops), np.ravel(OUTPUTS), strict=True):
        assert np.array_equal(ours, expected[len(expected) - count :])


@pytest.mark.parametrize("outputs", [[0], [0, 2], [2, 1], [3], [-1], [2, 2], [[2]], [2, 3]], ids=str)
def test_outputs_that_are_not_the_last_of_their_rows_are_refused(outputs: list[int], tiny: Tiny) -> None:
    model, ops = load(tiny("llama"))
    assert step_of(model, ops, outputs=[2]).shape == (1, 64)
    with pytest.raises(ValueError, match="outputs"):
        step_of(model, ops, outputs=outputs)


@pytest.mark.parametrize("isa", instruction_sets())
def test_threads_change_no_bit(isa: str, tiny: Tiny) -> None:
    expected = run(*load(tiny("gemma3"), 1, isa))
    for threads in range(2, 9):
        assert all(map(np.array_equal, run(*load(tiny("gemma3"), threads, isa)), expected))


def step_of(model: Decoder, ops: CpuOps, **changes: Any) -> Any:
    """One step of one row of three tokens, with the given arguments changed."""
    values: dict[str, Any] = {
        "token_ids": [1, 2, 3], "positions": [0, 1, 2], "query_starts": [0, 3], "starts": [0], "tables": [[1]],
    }  # fmt: skip
    shape = replace(model.cache_shape(2, 16), **{name: changes.pop(name) for name in list(changes) if name in CACHE})
    arrays = {name: np.array(value, np.int32) for name, value in (values | changes).items()}
    token_ids, positions = arrays["token_ids"], arrays["positions"]
    batch = AttentionBatch(positions, arrays["query_starts"], arrays["starts"], arrays["tables"], arrays.get("outputs"))
    return model.forward(token_ids, batch, ops.make_cache(shape))


CACHE = ("num_layers", "num_kv_heads", "head_dim")


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [1, 2, VOCAB_SIZE]},
        {"token_ids": [1, 2, -1]},
        {"token_ids": [1, 2]},
        {"token_ids": [[1, 2, 3]]},
        {"positions": [0, 1]},
        {"query_starts": [0, 2]},
        {"query_starts": [0, 3, 3]},
        {"starts": [-1]},
        {"starts": [14]},
        {"starts": [MAX_MODEL_LEN - 2], "tables": [[0] * 20]},
        {"starts": [2**31 - 1]},
        {"tables": [[2]]},
        {"tables": [[-1]]},
        {"tables": [[]]},
        {"tables": [0]},
        {"num_layers": 1},
        {"num_kv_heads": 4},
        {"head_dim": 32},
    ],
    ids=str,
)
def test_a_step_that_does_not_fit_is_refused_before_it_runs(changes: dict[str, Any], tiny: Tiny) -> None:
    model, ops = load(tiny("llama"))
    assert step_of(model, ops).shape == (3, 64)
    with pytest.raises(ValueError, match=r"\w"):
        step_of(model, ops, **changes)


@pytest.mark.parametrize("position", [-1, 512])
def test_a_learned_position_outside_the_table_is_refused(position: int, tiny: Tiny) -> None:
    model, ops = load(tiny("gpt2"))
    with pytest.raises(ValueError, match="position"):
        step_of(model, ops, positions=[0, 1, position])


def test_integers_of_another_width_are_refused(tiny: Tiny) -> None:
    model, ops = load(tiny("llama"))
    one = np.zeros(1, np.int32)
    batch = AttentionBatch(one, np.array([0, 1], np.int32), one, np.array([[0]], np.int32))
    cache = ops.make_cache(model.cache_shape(2, 16))
    with pytest.raises(ValueError, match="token_ids is not int32"):
        model.forward(one.astype(np.int64), batch, cache)


def test_no_tokens_are_no_work(tiny: Tiny) -> None:
    model, ops = load(tiny("gpt2"))
    none = step_of(model, ops, token_ids=[], positions=[], query_starts=[0], starts=[], tables=np.zeros((0, 0)))
    assert none.shape == (0, 64)


def test_a_program_keeps_its_weights_and_lets_them_go(tiny: Tiny) -> None:
    import gc
    import weakref

    model, ops = load(tiny("llama"))
    held = weakref.ref(model)
    step = model._compute
    del model
    gc.disable()
    try:
        assert held() is None, "the program must not hold the model"
    finally:
        gc.enable()
    one = np.zeros(1, np.int32)
    batch = AttentionBatch(one, np.array([0, 1], np.int32), one, np.array([[0]], np.int32))
    shape = load(tiny("llama"))[0].cache_shape(2, 16)
    assert np.isfinite(step(one, batch, ops.make_cache(shape))).all()
