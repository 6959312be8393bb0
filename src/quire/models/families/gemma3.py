"""Gemma 3 text (arXiv 2503.19786): Gemma 2 with norms of q and k, and another theta in sliding layers."""

from dataclasses import replace

from quire.models.families.gemma2 import GEMMA_NAMES, HEAD_DIM, gemma_like
from quire.models.families.llama import num_layers_of
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.rope_config import RopeDefaults, parse_rope
from quire.models.spec import DecoderSpec, RopeSpec

_TEXT_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}
"""What the published configs with a vision tower leave out of their `text_config`."""


def gemma3(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Gemma3ForCausalLM."""
    num_layers = num_layers_of(config)
    pattern = config.integer("sliding_window_pattern", 6)
    window = config.optional_integer("sliding_window", if_absent=4096)
    windows = config.windows(num_layers, window, [(i + 1) % pattern != 0 for i in range(num_layers)])
    full, sliding = _ropes(config, config.integer("head_dim", HEAD_DIM))
    spec = gemma_like(config, windows, full)
    layers = (replace(layer, rope=full if layer.window is None else sliding) for layer in spec.layers)
    logits_softcap = config.optional_number("final_logit_softcapping")
    spec = replace(spec, layers=tuple(layers), qk_norm="head", logits_softcap=logits_softcap)
    return spec, GEMMA_NAMES


def gemma3_text_of(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """The text model of Gemma3ForConditionalGeneration; its vision tower stays on the disk."""
    text = config.nested("text_config")
    if text is None:
        raise config.unsupported("text_config", "it must be there")
    text = text.over(ConfigReader(_TEXT_DEFAULTS))
    spec, names = gemma3(text)
    text.refuse_unread()
    if not config.boolean("tie_word_embeddings", True):
        raise config.unsupported("tie_word_embeddings", "this family has no head of its own")
    return spec, replace(
        names,
        prefix="language_model.model.",
        other_prefixes=("model.language_model.",),
        head="language_model.lm_head",
        unused=("*vision_tower.*", "*multi_modal_projector.*", "lm_head.weight"),
    )


def _ropes(config: ConfigReader, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Of full and of sliding layers. v4: `rope_theta`, `rope_scaling` and `rope_local_base_freq`."""
    empty = ConfigReader({}, "rope_parameters.")
    parameters, scaling = config.nested("rope_parameters") or empty, config.nested("rope_scaling")
    full = parameters.nested("full_attention") or empty
    sliding = parameters.nested("sliding_attention") or empty
    full_theta = RopeDefaults(config.number("rope_theta", 1_000_000.0))
    sliding_theta = RopeDefaults(config.number("rope_local_base_freq", 10_000.0))
    return (
        parse_rope(config, scaling.over(full) if scaling else full, head_dim, full_theta),
        parse_rope(config, sliding, head_dim, sliding_theta),
    )
