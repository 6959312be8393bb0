"""Reading `config.json`: both of transformers' styles, and refusals by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigurationError, ModelFileError, UnsupportedModelError
from quire.models.registry import FAMILIES, load_spec
from quire.models.spec import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling
from tests.tiny import checkpoints

LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

Tiny = Callable[..., Path]


def test_a_real_config_gives_the_spec_that_its_card_states() -> None:
    spec, names = load_spec(LLAMA_32_1B)
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers) == (128256, 2048, 16)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (32, 8, 64)
    assert spec.tied_head and not spec.qkv_bias and spec.max_position_embeddings == 131072
    rope = spec.layers[0].rope
    assert rope is not None and rope.theta == 500000.0
    assert rope.scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert names.prefix == "model."


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_configs_of_transformers_v4_mean_the_same(family: str, tiny: Tiny) -> None:
    config = json.loads((tiny(family) / "config.json").read_text())
    old = dict(config, torch_dtype=config["dtype"])
    del old["dtype"]
    rope = old.pop("rope_parameters", None)
    if rope is not None:
        full = rope.get("full_attention", rope)
        old["rope_theta"] = full["rope_theta"]
        if full["rope_type"] != "default":
            scaling = {key: full[key] for key in full if key not in ("rope_type", "rope_theta")}
            old["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", 1.0)
            old["rope_scaling"] = scaling | {"type": full["rope_type"]}
        if "sliding_attention" in rope:
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    assert load_spec(old) == load_spec(config)


def test_yarn_and_longrope_say_how_far_they_reach() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    spec, _ = load_spec(LLAMA_32_1B | {"rope_scaling": yarn, "max_position_embeddings": 32768})
    rope = spec.layers[0].rope
    assert rope is not None and isinstance(rope.scaling, YarnScaling)
    assert spec.max_position_embeddings == 131072
    long = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    spec, _ = load_spec(LLAMA_32_1B | {"rope_scaling": long, "original_max_position_embeddings": 4096})
    rope = spec.layers[0].rope
    assert rope is not None and isinstance(rope.scaling, LongRopeScaling)
    assert rope.scaling.original_max_positions == 4096


def test_what_published_gemma3_configs_leave_out_is_known() -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    spec, _ = load_spec({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (spec.vocab_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (262208, 8, 4, 256)
    assert [i for i, layer in enumerate(spec.layers) if layer.window is None] == [5, 11, 17, 23, 29]
    ropes = [layer.rope for layer in spec.layers[4:6]]
    assert ropes == [RopeSpec(10_000.0, 256), RopeSpec(1_000_000.0, 256, LinearScaling(8.0))]
    assert spec.tied_head and spec.max_position_embeddings == 131072


def test_an_unknown_architecture_names_the_nearest_and_lists_all() -> None:
    with pytest.raises(UnsupportedModelError, match="did you mean 'LlamaForCausalLM'") as caught:
        load_spec({"architectures": ["LLamaForCausalLM"]})
    assert all(name in str(caught.value) for name in FAMILIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"sliding_window": 4096},
        {"layer_types": ["sliding_attention"] * 16},
        {"layer_types": ["full_attention"] * 15 + ["sliding_attention"]},
        {"clip_qkv": 8.0},
        {"alibi": True},
        {"qk_layernorm": True},
        {"use_qk_norm": True},
        {"query_pre_attn_scalar": 224},
        {"attention_multiplier": 0.0078125},
        {"embedding_multiplier": 12.0},
        {"rope_local_base_freq": 10000.0},
        {"scale_attn_by_inverse_layer_idx": True},
        {"use_bias": True},
        {"use_sliding_window": True},
        {"position_embedding_type": "relative_key"},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"residual_multiplier": 0.22},
        {"logits_scaling": 8},
        {"num_local_experts": 8},
        {"no_rope_layers": [1, 1, 1, 0] * 4},
        {"use_bidirectional_attention": True},
        {"partial_rotary_factor": 0.5},
        {"hidden_act": "swiglu_oai"},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_result_is_refused_by_name(changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(UnsupportedModelError, match=name):
        load_spec(LLAMA_32_1B | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "2048"},
        {"hidden_size": 2048.0},
        {"hidden_size": True},
        {"hidden_size": -1},
        {"hidden_size": 10**30},
        {"hidden_size": None},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 5},
        {"vocab_size": [128256]},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1e-5},
        {"rope_theta": float("inf")},
        {"rope_scaling": "llama3"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"tie_word_embeddings": "yes"},
        {"max_position_embeddings": 10**12},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1] * 17},
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1] * 15},
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [2] * 16},
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": 4},
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(changes: dict[str, Any]) -> None:
    name = list(changes)[-1].rstrip("s")
    with pytest.raises(ConfigurationError, match=name):
        load_spec(LLAMA_32_1B | changes)


def test_keys_that_are_neutral_or_of_other_tools_are_no_obstacle() -> None:
    extra = {"sliding_window": None, "logits_scaling": 1, "unsloth_version": "2025.1", "auto_map": {"AutoModel": "x"}}
    assert load_spec(LLAMA_32_1B | extra) == load_spec(LLAMA_32_1B)


def test_a_missing_size_is_named() -> None:
    config = dict(LLAMA_32_1B)
    del config["hidden_size"]
    with pytest.raises(ModelFileError, match=r"no hidden_size"):
        load_spec(config)
