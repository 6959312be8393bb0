"""Gemma 2 (arXiv 2408.00118): norms before and after each sublayer, soft caps, every other layer slides."""

from dataclasses import replace

from quire.models.families.llama import llama_like, num_layers_of
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.rope_config import RopeDefaults
from quire.models.spec import DecoderSpec, RopeSpec

HEAD_DIM = 256
GEMMA_NAMES = NameMap(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def gemma2(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Gemma2ForCausalLM."""
    num_layers = num_layers_of(config)
    window = config.optional_integer("sliding_window", if_absent=4096)
    spec = gemma_like(config, config.windows(num_layers, window, [i % 2 == 0 for i in range(num_layers)]))
    attention_softcap = config.optional_number("attn_logit_softcapping", if_absent=50.0)
    logits_softcap = config.optional_number("final_logit_softcapping", if_absent=30.0)
    return replace(spec, attention_softcap=attention_softcap, logits_softcap=logits_softcap), GEMMA_NAMES


def gemma_like(
    config: ConfigReader,
    windows: list[int | None],
    rope: RopeSpec | RopeDefaults = RopeDefaults(),  # noqa: B008  (frozen)
) -> DecoderSpec:
    """What Gemma 2 and 3 share. The embedding scale is exact: transformers rounds it to the weights' type."""
    spec = llama_like(config, rope=rope, head_dim=HEAD_DIM, windows=windows, num_kv_heads=4, tied_head=True)
    scale = config.number("query_pre_attn_scalar", 256.0) ** -0.5
    bias = config.boolean("attention_bias", False)
    return replace(
        spec,
        layers=tuple(replace(layer, attention_scale=scale) for layer in spec.layers),
        norm=replace(spec.norm, weight_offset=1.0),
        norm_places="sandwich",
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        o_bias=bias,
        embedding_scale=spec.hidden_size**0.5,
    )
