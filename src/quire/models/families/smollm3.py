"""SmolLM3 (Hugging Face, 2025): Llama with every fourth layer without rotary positions (arXiv 2501.18795)."""

from dataclasses import replace

from quire.models.families.llama import llama_like, num_layers_of
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.rope_config import RopeDefaults
from quire.models.spec import DecoderSpec


def smollm3(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """SmolLM3ForCausalLM. If it uses windows, the layers without rotary positions slide."""
    num_layers = num_layers_of(config)
    interval = config.integer("no_rope_layer_interval", 4)
    has_rope = config.flags("no_rope_layers", num_layers)
    if has_rope is None:
        has_rope = tuple((i + 1) % interval != 0 for i in range(num_layers))
    window = config.optional_integer("sliding_window")
    if not config.boolean("use_sliding_window", False):
        window = None
    windows = config.windows(num_layers, window, [window is not None and not rope for rope in has_rope])
    spec = llama_like(config, rope=RopeDefaults(2_000_000.0), windows=windows, num_kv_heads=4, tied_head=True)
    layers = (layer if rope else replace(layer, rope=None) for layer, rope in zip(spec.layers, has_rope, strict=True))
    bias = config.boolean("attention_bias", False)
    return replace(
        spec, layers=tuple(layers), qkv_bias=bias, o_bias=bias, mlp_bias=config.boolean("mlp_bias", False)
    ), NameMap()
