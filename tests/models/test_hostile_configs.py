"""Configs that ask for more than there is: bounds come before the work, and everything is refused by name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.errors import ConfigurationError, ModelFileError
from quire.models import decoder
from quire.models.registry import load_spec
from quire.models.rope import rope_tables
from quire.models.spec import LinearScaling, RopeSpec
from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import Ops
from quire.weights.load import load_model
from tests.models.paged import PagedModel
from tests.models.test_published import LEFT_OUT, PUBLISHED, ROPES

Tiny = Callable[..., Path]
HOSTILE: list[Any] = [0, 1, -1, 2**24, 10**30, 1e-300, 1e29, 1.0, float("inf"), "x", [], {}, {"rope_type": "yarn"}]
CASES = {**PUBLISHED, **ROPES, "gemma 3, left out": LEFT_OUT["gemma 3"]}


def variants(config: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The config with one value replaced, in it or in an object in it."""
    for name, value in config.items():
        if name != "architectures":
            yield from ((name, hostile, config | {name: hostile}) for hostile in HOSTILE)
        if isinstance(value, dict):
            yield from ((inner, hostile, config | {name: other}) for inner, hostile, other in variants(value))


@pytest.mark.parametrize("case", CASES)
def test_every_value_of_every_key_is_taken_or_refused(case: str) -> None:
    for name, hostile, config in variants(CASES[case]):
        try:
            spec, _ = load_spec(config)
        except ConfigurationError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, (name, hostile)
            continue
        assert spec.max_position_embeddings <= 2**24 and spec.num_layers <= 1024, (name, hostile)
        for rope in {layer.rope for layer in spec.layers if layer.rope is not None}:
            tables = rope_tables(rope, 2, 2) if rope.rotary_dim <= 512 else ()
            assert all(table.shape == (2, rope.rotary_dim // 2) for table in tables), (name, hostile)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1.0}, r"rope_theta = 1\.0 is not supported: it must be above 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1}}, r"rope_parameters\.rope_theta = 1 "),
        ({"rope_scaling": {"type": "yarn", "factor": 1e6}}, r"factor = 1e\+06 makes .* at most 16777216"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1}},
            "original_max_position_embeddings must be above 1, got 1",
        ),
        ({"head_dim": 2**20}, "head_dim must be a whole number from 2 to 4096, got 1048576"),
        ({"partial_rotary_factor": 0.5}, r"config\.json: partial_rotary_factor = 0\.5 is not supported"),
    ],
)
def test_the_value_that_is_wrong_is_printed(changes: dict[str, Any], message: str) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 32768,
        **PUBLISHED["llama 1"],
        **changes,
    }
    with pytest.raises(ConfigurationError, match=message):
        load_spec(config)


def test_sliding_layers_without_a_window_are_named() -> None:
    layers = {"layer_types": ["sliding_attention"] * PUBLISHED["qwen2"]["num_hidden_layers"]}
    with pytest.raises(ConfigurationError, match=r"layer_types = .*\(sliding_window = 7, use_sliding_window = False\)"):
        load_spec(PUBLISHED["qwen2"] | layers | {"sliding_window": 7, "use_sliding_window": False})


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "LlamaForSequenceClassification", "Phi4ForCausalLM"])
def test_an_architecture_that_is_not_there_is_not_taken_for_another(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{name}' is not supported") as caught:
        load_spec({"architectures": [name]})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("scaling", [None, LinearScaling(2.0)], ids=str)
def test_a_row_of_a_table_does_not_depend_on_its_length(scaling: Any) -> None:
    rope = RopeSpec(10_000.0, 20, scaling)
    longest = rope_tables(rope, 5000, 5000)
    for length in (1, 7, 1023, 1024, 1025, 4097):
        assert all(
            np.array_equal(short, long[:length])
            for short, long in zip(rope_tables(rope, length, 5000), longest, strict=True)
        )


def with_positions(directory: Path, count: int, path: Path) -> Path:
    config = json.loads((directory / "config.json").read_text())
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": count}))
    (path / "model.safetensors").symlink_to(directory / "model.safetensors")
    return path


def table_bytes(model: Any) -> int:
    return sum(layer.attention.rope.cos.nbytes + layer.attention.rope.sin.nbytes for layer in model._layers[:1])


@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_tables_grow_with_the_positions_that_are_computed(
    provider: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^24 positions took gigabytes at the start."""
    ops: Ops = CpuOps(1, instruction_sets()[-1]) if provider == "cpu" else ReferenceOps(np)
    directory = with_positions(tiny("llama"), 2**24, tmp_path / "many")
    assert table_bytes(load_model(directory, ops, "float32")) <= 8192 * 24 * 4
    tokens = np.random.default_rng(0).integers(0, 320, 90).tolist()
    whole = PagedModel(load_model(directory, ops, "float32", 128), ops, num_blocks=8, block_size=16)
    expected = whole.all_logits(tokens, [16, 1, 30, 1, 42])
    monkeypatch.setattr(decoder, "FIRST_POSITIONS", 16)
    model = load_model(directory, ops, "float32", 128)
    assert model.spec.max_position_embeddings == 2**24
    paged = PagedModel(model, ops, num_blocks=8, block_size=16)
    assert np.array_equal(paged.all_logits(tokens, [16, 1, 30, 1, 42]), expected)
    assert model._num_positions == 128  # type: ignore[attr-defined]


def test_a_length_beyond_all_bounds_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="max_position_embeddings must be a whole number from 1 to 16777216"):
        load_model(with_positions(tiny("llama"), 2**24 + 1, tmp_path / "more"), ReferenceOps(np), "float32")
