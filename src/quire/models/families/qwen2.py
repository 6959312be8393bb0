"""Qwen 2 and 2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on q, k, v."""

from dataclasses import replace

from quire.models.families.llama import llama_like, num_layers_of
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec


def qwen2(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Qwen2ForCausalLM."""
    return replace(llama_like(config, windows=qwen_windows(config), num_kv_heads=32), qkv_bias=True), NameMap()


def qwen_windows(config: ConfigReader) -> list[int | None]:
    """Layers from `max_window_layers` on slide, if the model uses windows at all."""
    num_layers = num_layers_of(config)
    window = config.optional_integer("sliding_window", if_absent=4096)
    first = config.integer("max_window_layers", 28, at_least=0)
    if not config.boolean("use_sliding_window", False):
        window = None
    return config.windows(num_layers, window, [window is not None and i >= first for i in range(num_layers)])
