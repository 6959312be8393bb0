"""Loading: strict about tensors, honest about types; generation defaults."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quire.errors import ConfigurationError, ModelFileError
from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import Ops
from quire.quant.select import select_scheme
from quire.weights.generation_config import load_generation_defaults
from quire.weights.json_file import read_json_object
from quire.weights.load import load_model, read_model_config
from tests.models.paged import PagedModel
from tests.tiny.checkpoints import make_tiny


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("load")
    return {
        "llama": make_tiny("llama", root / "llama", num_hidden_layers=2),
        "tied": make_tiny("llama", root / "tied", num_hidden_layers=1, tie_word_embeddings=True, dtype="float16"),
        "gpt2": make_tiny("gpt2", root / "gpt2", n_layer=1),
    }


def changed(source: Path, directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, directory, dirs_exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"lacks lm_head\.weight"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), r"does not: extra"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}),
            r"does not: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)}),
            r"model\.norm\.weight has the shape \[63\]; the config asks for \[64\]",
        ),
        (lambda t: t.clear(), r"lacks model\.embed_tokens\.weight, .* and \d+ more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Any]], None], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_model(changed(checkpoints["llama"], tmp_path, change), ReferenceOps(np))


def embedded(directory: Path) -> Any:
    ops = ReferenceOps(np)
    model = load_model(directory, ops)
    return model.logits(np.ones((1, model.spec.hidden_size), np.float32))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})),
        ("tied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})),
        ("gpt2", lambda t: t.update({"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8)})),
        ("gpt2", lambda t: [rename(old, old.removeprefix("transformer."))(t) for old in list(t)]),
    ],
    ids=["inv_freq", "tied head twice", "gpt2 mask", "gpt2 without prefix"],
)
def test_what_checkpoints_are_known_to_carry_changes_nothing(
    name: str, change: Callable[[dict[str, Any]], None], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    other = changed(checkpoints[name], tmp_path, change)
    assert np.array_equal(embedded(checkpoints[name]), embedded(other))


@pytest.mark.parametrize(
    ("name", "dtype", "storage"),
    [
        ("llama", "auto", "float32"),
        ("tied", "auto", "float16"),
        ("llama", "bfloat16", "bfloat16"),
        ("tied", "float32", "float32"),
    ],
)
def test_dtype_auto_is_the_checkpoints_own(name: str, dtype: str, storage: str, checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints[name], ReferenceOps(np), dtype)
    assert model.cache_shape(4, 16).dtype == storage


def test_without_a_stated_dtype_the_tensors_decide(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["tied"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path, ReferenceOps(np)).cache_shape(4, 16).dtype == "float16"


def test_sizes_and_progress(checkpoints: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    model = load_model(
        checkpoints["tied"], ReferenceOps(np), max_model_len=100, progress=lambda *step: seen.append(step)
    )
    assert model.max_model_len == 100
    file_bytes = sum(
        math.prod(tensor.shape) * 2 for tensor in load_file(checkpoints["tied"] / "model.safetensors").values()
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (file_bytes, file_bytes)
    matrices = 320 * 64 + 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96
    assert model.weight_bytes == 2 * matrices + 4 * 3 * 64
    shape = model.cache_shape(5, 16)
    assert (shape.num_layers, shape.num_blocks, shape.block_size) == (1, 5, 16)
    assert (shape.num_kv_heads, shape.head_dim) == (2, 16)


@pytest.mark.parametrize("max_model_len", [0, -1, 513])
def test_max_model_len_is_at_most_the_models(max_model_len: int, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match="the model has 512 positions") as caught:
        load_model(checkpoints["llama"], ReferenceOps(np), max_model_len=max_model_len)
    assert caught.value.field == "max_model_len"


def test_an_unknown_dtype_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match="dtype must be one of auto"):
        load_model(checkpoints["llama"], ReferenceOps(np), "int8")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "{}", '{"architectures": [1]}']
)
def test_a_damaged_config_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        read_model_config(tmp_path)


SHRINKS = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def in_two_files(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """One matrix has a file of its own."""
    shutil.copytree(checkpoints["llama"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    weight_map = {name: "one.safetensors" if name == SHRINKS else "rest.safetensors" for name in tensors}
    save_file({SHRINKS: tensors.pop(SHRINKS)}, tmp_path / "one.safetensors")
    save_file(tensors, tmp_path / "rest.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("provider", ["reference", "native"])
def test_a_file_that_shrinks_while_it_is_loaded_is_noticed(
    provider: str, quantization: str | None, dtype: str, in_two_files: Path
) -> None:
    """The native provider reads a matrix while it packs it, unless its type changes; others read it before."""
    ops: Ops = ReferenceOps(np) if provider == "reference" else CpuOps(2, instruction_sets()[-1])
    file = in_two_files / "one.safetensors"
    size = file.stat().st_size
    packs_from_file = provider == "native" and (quantization is not None or dtype == "float32")
    why = ".*its file ended or could not be read" if packs_from_file else r"one\.safetensors: truncated while"
    load_model(in_two_files, ops, dtype, scheme=select_scheme(quantization, None))
    with pytest.raises(ModelFileError, match=rf"^{SHRINKS} cannot be packed: {why}"):
        load_model(
            in_two_files,
            ops,
            dtype,
            progress=lambda *_: os.truncate(file, size - 1),
            scheme=select_scheme(quantization, None),
        )


def test_matrices_of_several_types_are_joined_by_value(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """What the native provider packs from the file, rows of one type, is not the case here."""
    names = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    changed(
        checkpoints["llama"], plain, lambda t: t.update({n: t[n].astype(np.float16).astype(np.float32) for n in names})
    )
    changed(checkpoints["llama"], mixed, lambda t: t.update({n: t[n].astype(np.float16) for n in names}))
    ops = CpuOps(1, instruction_sets()[-1])
    tokens = list(range(20))
    results = [
        PagedModel(load_model(directory, ops, "float32"), ops, num_blocks=4, block_size=16).all_logits(tokens, [20])
        for directory in (plain, mixed, checkpoints["llama"])
    ]
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


def test_json_larger_than_its_bound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "config.json", 8) == {"a": 1}
    with pytest.raises(ModelFileError, match=r"^config\.json: larger than 7 bytes$"):
        read_json_object(tmp_path / "config.json", 7)


def write(directory: Path, **files: Any) -> Path:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def test_generation_defaults_come_under_vllm_names(tmp_path: Path) -> None:
    generation = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "min_p": None,
        "do_sample": True,
        "eos_token_id": [7, 9],
        "bos_token_id": 1,
    }
    defaults = load_generation_defaults(write(tmp_path, config={"eos_token_id": 3}, generation_config=generation))
    assert defaults.eos_token_ids == (7, 9)
    assert defaults.sampling == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("top_k", 2.5), ("min_p", 2),
        ("repetition_penalty", 0), ("max_new_tokens", 0), ("max_new_tokens", True), ("top_k", [50]),
    ],
)  # fmt: skip
def test_generation_defaults_that_no_request_may_have_are_refused_with_their_file(
    name: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=rf"^generation_config\.json: {name}"):
        load_generation_defaults(write(tmp_path, config={}, generation_config={name: value}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_git_lfs_pointer_is_called_one(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["llama"], tmp_path, dirs_exist_ok=True)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ModelFileError, match=f"^{name}: a Git LFS pointer"):
        load_generation_defaults(tmp_path)
        load_model(tmp_path, ReferenceOps(np))


def test_a_stated_no_to_sampling_is_greedy(tmp_path: Path) -> None:
    generation = {"do_sample": False, "temperature": 0.7}
    assert load_generation_defaults(write(tmp_path, config={}, generation_config=generation)).sampling == {
        "temperature": 0.0
    }


def test_config_stands_in_for_a_missing_generation_config(tmp_path: Path) -> None:
    defaults = load_generation_defaults(write(tmp_path, config={"eos_token_id": 3, "bos_token_id": None}))
    assert (defaults.eos_token_ids, dict(defaults.sampling)) == ((3,), {})


def test_the_text_part_says_where_answers_end_if_nothing_else_does(tmp_path: Path) -> None:
    config: dict[str, Any] = {"text_config": {"eos_token_id": [1, 106]}}
    assert load_generation_defaults(write(tmp_path, config=config)).eos_token_ids == (1, 106)
    assert load_generation_defaults(write(tmp_path, config=config | {"eos_token_id": 3})).eos_token_ids == (3,)


@pytest.mark.parametrize("bad", [{"eos_token_id": "x"}, {"eos_token_id": [-1]}, {"top_p": "0.9"}, {"top_k": True}])
def test_generation_defaults_of_a_wrong_type_are_named(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=next(iter(bad))):
        load_generation_defaults(write(tmp_path, config={}, generation_config=bad))
