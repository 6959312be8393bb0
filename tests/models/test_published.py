"""Checkpoints as the hub has them: what a config leaves out or says in an older form means what transformers takes.

Each case is a published config (`published.py`), or one with keys left out, renamed or set as other published ones
have them. transformers builds its model from the same `config.json`; the logits must be equal.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quire.errors import UnsupportedModelError
from quire.models.registry import load_spec
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.ops.types import Ops
from quire.weights.load import load_model
from tests.models.paged import PagedModel
from tests.models.published import (
    GEMMA_2,
    GEMMA_3_1B,
    GPT_2,
    GRANITE_3,
    LLAMA_1,
    LLAMA_3_1,
    LONGEST,
    MISTRAL_01,
    OLMO_2,
    PHI_3_128K,
    PHI_4_MINI,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STARCODER2,
    Config,
    config_of_transformers,
    without,
    write_checkpoint,
)
from tests.models.test_parity import assert_close, transformers_logits

TOKENS = np.random.default_rng(0).integers(0, 160, LONGEST).tolist()

LINEAR = {"type": "linear", "factor": 8.0}
LLAMA3 = LLAMA_3_1["rope_scaling"]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = PHI_3_128K["rope_scaling"]
# With these the borders of YaRN's ramp lie between dimensions of a head.
RAMP = YARN | {"beta_fast": 2.0, "beta_slow": 1.0}
QWEN2_RAMP = QWEN2 | {"rope_theta": 100.0}

PUBLISHED: dict[str, Config] = {
    "llama 1": LLAMA_1,
    "llama 3.1": LLAMA_3_1,
    "mistral 0.1": MISTRAL_01,
    "mistral 0.2, no window": MISTRAL_01 | {"sliding_window": None},
    "mistral nemo, heads of their own size": MISTRAL_01 | {"head_dim": 12},
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi-3-mini-4k": PHI_3_128K | {"rope_scaling": None, "sliding_window": 9, "original_max_position_embeddings": 128},
    "gemma 2": GEMMA_2,
    "gemma 3": GEMMA_3_1B,
    "olmo 2": OLMO_2,
    "granite 3": GRANITE_3,
    "smollm3": SMOLLM3,
    "starcoder2": STARCODER2,
    "gpt-2": GPT_2,
    "codeparrot, scores divided by layer": GPT_2 | {"scale_attn_by_inverse_layer_idx": True},
}

LEFT_OUT: dict[str, Config] = {
    "llama": without(LLAMA_1, "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    "llama, null": LLAMA_1 | {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None},
    "mistral": without(MISTRAL_01, "rope_theta", "tie_word_embeddings", "rms_norm_eps", "hidden_act"),
    "mistral, key-value heads": without(MISTRAL_01, "num_key_value_heads") | {"num_attention_heads": 16},
    "mistral, null": MISTRAL_01 | {"head_dim": None},
    "qwen2": without(QWEN2, "use_sliding_window", "tie_word_embeddings", "rope_theta", "rms_norm_eps"),
    "qwen2, key-value heads": without(QWEN2, "num_key_value_heads") | {"num_attention_heads": 32},
    "qwen2, null": QWEN2 | {"num_key_value_heads": None},
    "qwen3": without(QWEN3, "tie_word_embeddings", "rope_theta", "rms_norm_eps", "attention_bias", "hidden_act"),
    "qwen3, size of heads": without(QWEN3, "head_dim"),
    "qwen3, key-value heads": without(QWEN3, "num_key_value_heads") | {"num_attention_heads": 32},
    "phi-3": without(
        PHI_3_128K, "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings"
    ),
    "phi-3, window": without(PHI_3_128K, "sliding_window"),
    "gemma 2": without(
        GEMMA_2, "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "rms_norm_eps", "rope_theta",
        "hidden_activation", "hidden_act", "attention_bias",
    ) | {"num_attention_heads": 8},
    "gemma 2, the older name of the activation": without(GEMMA_2, "hidden_activation") | {"hidden_act": "silu"},
    "gemma 2, null": GEMMA_2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma 3": without(
        GEMMA_3_1B, "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "rms_norm_eps", "rope_theta",
        "hidden_activation", "rope_local_base_freq", "attention_bias", "sliding_window_pattern",
    ) | {"num_attention_heads": 8, "num_hidden_layers": 7},
    "olmo 2": without(
        OLMO_2, "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "attention_bias"
    ),
    "granite": without(
        GRANITE_3, "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "attention_bias",
        "mlp_bias", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    ),
    "granite, all but the residual's multiplier": without(
        GRANITE_3, "attention_multiplier", "embedding_multiplier", "logits_scaling"
    ),
    "smollm3": without(
        SMOLLM3, "num_key_value_heads", "rms_norm_eps", "rope_theta", "attention_bias", "mlp_bias",
        "no_rope_layer_interval", "use_sliding_window", "sliding_window",
    ) | {"num_attention_heads": 8},
    "starcoder2": without(
        STARCODER2, "num_key_value_heads", "norm_epsilon", "rope_theta", "use_bias", "sliding_window", "hidden_act"
    ),
    "gpt-2": without(GPT_2, "activation_function", "layer_norm_epsilon") | {"n_inner": None},
}  # fmt: skip

SET: dict[str, Config] = {
    "llama, biases": LLAMA_1 | {"attention_bias": True, "mlp_bias": True},
    "llama, tied": LLAMA_1 | {"tie_word_embeddings": True},
    "llama, swish": LLAMA_1 | {"hidden_act": "swish"},
    "llama, gelu": LLAMA_1 | {"hidden_act": "gelu"},
    "llama, gelu_new": LLAMA_1 | {"hidden_act": "gelu_new"},
    "qwen2, windows from layer 2": QWEN2 | {"use_sliding_window": True},
    "qwen2, windows in the last layer": QWEN2 | {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2, windows everywhere": QWEN2 | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen2, windows from layer 28": without(QWEN2, "max_window_layers") | {"use_sliding_window": True},
    "qwen2, windows that are null": QWEN2 | {"use_sliding_window": True, "sliding_window": None},
    "qwen2, layer_types before max_window_layers": QWEN2
    | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3, windows from layer 1": QWEN3 | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3, biases": QWEN3 | {"attention_bias": True},
    "gemma 2, biases": GEMMA_2 | {"attention_bias": True},
    "gemma 2, layer_types": GEMMA_2 | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "gemma 3, layer_types before the pattern": GEMMA_3_1B
    | {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "gemma 3, soft cap": GEMMA_3_1B | {"final_logit_softcapping": 1.5},
    "olmo 2, grouped, biases, eps": OLMO_2 | {"num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-3},
    "granite, eps beside a residual that is divided": GRANITE_3 | {"rms_norm_eps": 1e-3, "residual_multiplier": 0.1},
    "granite, biases": GRANITE_3 | {"attention_bias": True, "mlp_bias": True},
    "smollm3, the list before the interval": SMOLLM3 | {"no_rope_layers": [1, 0, 0, 1]},
    "smollm3, windows": SMOLLM3 | {"use_sliding_window": True, "sliding_window": 9},
    "smollm3, a window that is not used": SMOLLM3 | {"sliding_window": 9},
    "smollm3, biases, a head of its own": SMOLLM3
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "starcoder2, no biases, eps": STARCODER2
    | {"use_bias": False, "norm_epsilon": 1e-3, "tie_word_embeddings": False, "sliding_window": None},
    "gpt-2, inner size, eps": GPT_2 | {"n_inner": 100, "layer_norm_epsilon": 1e-3},
    "gpt-2, scores not divided": GPT_2 | {"scale_attn_weights": False},
    "gpt-2, a head of its own": GPT_2 | {"tie_word_embeddings": False},
}

ROPES: dict[str, Config] = {
    "type alone, as Vicuna": LLAMA_1 | {"rope_scaling": LINEAR},
    "type and rope_type": LLAMA_1 | {"rope_scaling": LINEAR | {"rope_type": "linear"}},
    "theta in rope_scaling": LLAMA_1 | {"rope_theta": 10.0, "rope_scaling": LINEAR | {"rope_theta": 100.0}},
    "theta beside rope_parameters": LLAMA_1 | {"rope_theta": 10.0, "rope_parameters": LINEAR},
    "theta in both": LLAMA_1 | {"rope_theta": 10.0, "rope_parameters": {"rope_type": "default", "rope_theta": 99.0}},
    "rope_scaling beside rope_parameters": LLAMA_3_1 | {"rope_parameters": LINEAR | {"rope_theta": 100.0}},
    "rope_scaling without a theta beside rope_parameters": without(LLAMA_3_1, "rope_theta")
    | {"rope_parameters": LINEAR | {"rope_theta": 100.0}},
    "an empty rope_scaling beside rope_parameters": LLAMA_3_1 | {"rope_scaling": {}, "rope_parameters": LINEAR},
    "a null rope_scaling beside rope_parameters": LLAMA_3_1 | {"rope_scaling": None, "rope_parameters": LINEAR},
    "llama3, original length left out": LLAMA_3_1
    | {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")},
    "llama3, original length beside": LLAMA_3_1 | {"original_max_position_embeddings": 48},
    "yarn": QWEN2 | {"rope_scaling": YARN},
    "yarn, wide heads": QWEN3 | {"rope_scaling": YARN},
    "yarn, finetuned": LLAMA_1 | {"rope_scaling": YARN | {"finetuned": True}},
    "yarn, attention_factor": QWEN2 | {"rope_scaling": YARN | {"attention_factor": 0.7}},
    "yarn, attention_factor before mscale": QWEN2
    | {"rope_scaling": YARN | {"attention_factor": 0.7, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, mscale and mscale_all_dim": QWEN2 | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3}},
    "yarn, mscale alone": QWEN2 | {"rope_scaling": YARN | {"mscale": 3.0}},
    "yarn, mscale_all_dim alone": QWEN2 | {"rope_scaling": YARN | {"mscale_all_dim": 3.0}},
    "yarn, a ramp": QWEN2_RAMP | {"rope_scaling": RAMP},
    "yarn, truncate": QWEN2_RAMP | {"rope_scaling": RAMP | {"truncate": True}},
    "yarn, no truncate": QWEN2_RAMP | {"rope_scaling": RAMP | {"truncate": False}},
    "yarn, betas left out": QWEN2_RAMP | {"rope_scaling": YARN | {"original_max_position_embeddings": 1024}},
    "yarn, no room for a ramp": QWEN2_RAMP | {"rope_scaling": YARN | {"original_max_position_embeddings": 4}},
    "yarn, original length left out": QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, original length beside": QWEN2 | {"rope_scaling": YARN, "original_max_position_embeddings": 100},
    "yarn, factor below one": QWEN2 | {"rope_scaling": YARN | {"factor": 0.5}},
    "yarn, factor null": QWEN2 | {"rope_scaling": YARN | {"factor": None}},
    "longrope": PHI_3_128K,
    "longrope, the name yarn": PHI_3_128K | {"rope_scaling": LONGROPE | {"type": "yarn"}},
    "longrope, attention_factor": PHI_3_128K | {"rope_scaling": LONGROPE | {"attention_factor": 0.6}},
    "longrope, factor": PHI_3_128K | {"rope_scaling": LONGROPE | {"factor": 3.0}},
    "longrope, half lengths": PHI_3_128K | {"original_max_position_embeddings": 47},
    "longrope, part of a head": PHI_4_MINI,
    "part of a head": PHI_4_MINI | {"rope_scaling": None},
    "gemma 3, linear": GEMMA_3_1B | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "gemma 3, rope_scaling beside rope_parameters": GEMMA_3_1B
    | {
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gemma 3, thetas beside rope_parameters": GEMMA_3_1B
    | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3.0}}},
}

CASES = {
    f"{group}: {name}": config
    for group, configs in (("published", PUBLISHED), ("left out", LEFT_OUT), ("set", SET), ("rope", ROPES))
    for name, config in configs.items()
}


@pytest.fixture(scope="module")
def ops() -> Ops:
    return CpuOps(1, instruction_sets()[-1])


def our_logits(directory: Path, ops: Ops, tokens: list[int], max_model_len: int | None = None) -> Any:
    model = load_model(directory, ops, "float32", max_model_len)
    return PagedModel(model, ops, num_blocks=4, block_size=16).all_logits(tokens, [len(tokens)])


def their_logits(model: Any, tokens: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_a_config_means_what_transformers_takes_it_for(case: str, ops: Ops, tmp_path: Path) -> None:
    theirs = write_checkpoint(CASES[case], tmp_path)
    assert_close(our_logits(tmp_path, ops, TOKENS), their_logits(theirs, TOKENS))


WINDOWED = {
    "mistral": without(MISTRAL_01, "sliding_window"),
    "qwen2": without(QWEN2, "sliding_window") | {"use_sliding_window": True},
    "qwen3": without(QWEN3, "sliding_window") | {"use_sliding_window": True, "max_window_layers": 1},
    "gemma 2": without(GEMMA_2, "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma 3": without(GEMMA_3_1B, "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
}


@pytest.mark.parametrize("family", WINDOWED)
def test_defaults_too_large_for_a_short_sequence(family: str) -> None:
    spec, _ = load_spec(WINDOWED[family])
    theirs = config_of_transformers(WINDOWED[family])
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * spec.num_layers
    windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert [layer.window for layer in spec.layers] == windows
    assert spec.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert spec.logits_softcap == getattr(theirs, "final_logit_softcapping", None)


@pytest.mark.parametrize("config", [PHI_3_128K, PHI_4_MINI], ids=["phi-3-mini-128k", "phi-4-mini"])
@pytest.mark.parametrize(("length", "max_model_len"), [(20, 24), (24, 24), (40, 128)])
def test_longrope_takes_the_set_of_its_length(
    config: Config, length: int, max_model_len: int, ops: Ops, tmp_path: Path
) -> None:
    theirs = write_checkpoint(config, tmp_path)
    assert_close(our_logits(tmp_path, ops, TOKENS[:length], max_model_len), their_logits(theirs, TOKENS[:length]))


@pytest.mark.parametrize(
    "scaling", [LONGROPE, LONGROPE | {"original_max_position_embeddings": 24}], ids=["no", "other"]
)
def test_phi_3_was_trained_on_4096_positions_where_its_config_does_not_say(
    scaling: Config, ops: Ops, tmp_path: Path
) -> None:
    config = without(PHI_3_128K, "original_max_position_embeddings") | {"max_position_embeddings": 8192}
    theirs = write_checkpoint(config | {"rope_scaling": scaling}, tmp_path)
    assert_close(our_logits(tmp_path, ops, TOKENS, 4096), their_logits(theirs, TOKENS))


def test_su_is_the_first_name_of_longrope(ops: Ops, tmp_path: Path) -> None:
    """transformers 5 does not read it any more; its weights are those of the same config with the later name."""
    theirs = write_checkpoint(PHI_3_128K, tmp_path)
    first = PHI_3_128K | {"rope_scaling": LONGROPE | {"type": "su"}}
    (tmp_path / "config.json").write_text(json.dumps(first))
    assert_close(our_logits(tmp_path, ops, TOKENS), their_logits(theirs, TOKENS))
    with pytest.raises(UnsupportedModelError, match="type = 'su'"):
        load_spec(LLAMA_1 | {"rope_scaling": LONGROPE | {"type": "su"}})


def rewritten(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


TIED = {
    "llama": LLAMA_1 | {"tie_word_embeddings": True},
    "granite": GRANITE_3,
    "smollm3, by default": SMOLLM3,
    "starcoder2, by default": STARCODER2,
}


@pytest.mark.parametrize("family", TIED)
def test_a_head_that_differs_from_the_embedding_is_not_tied(family: str, ops: Ops, tmp_path: Path) -> None:
    """A fine-tuned model may have a head of its own beside a config that says, or means by default, tied."""
    write_checkpoint(TIED[family], tmp_path)
    head = np.random.default_rng(1).standard_normal((160, 64), dtype=np.float32) * 0.1
    rewritten(tmp_path, lambda tensors: tensors | {"lm_head.weight": head})
    assert_close(our_logits(tmp_path, ops, TOKENS), transformers_logits(tmp_path, [TOKENS])[0])


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_gemma_3_with_a_vision_part_under_both_names(
    prefix: str, ops: Ops, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    directory = tiny("gemma3-vision")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    renamed = {name.replace("language_model.model.", prefix, 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    tokens = [token % 300 for token in TOKENS]
    assert_close(our_logits(tmp_path, ops, tokens), transformers_logits(directory, [tokens])[0])


@pytest.mark.parametrize(
    ("keys", "storage"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "float64"}, "float32"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_the_storage_is_what_the_config_states_under_either_name(
    keys: Config, storage: str, ops: Ops, published: Path
) -> None:
    """The tensors of this checkpoint are float32."""
    (published / "config.json").write_text(json.dumps(without(LLAMA_1, "torch_dtype") | keys))
    assert load_model(published, ops).cache_shape(1, 16).dtype == storage


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("published")
    write_checkpoint(LLAMA_1, directory)
    yield directory
