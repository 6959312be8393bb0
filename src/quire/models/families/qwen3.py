"""Qwen 3 (arXiv 2505.09388): an RMS norm over each head of q and k, no biases."""

from dataclasses import replace

from quire.models.families.llama import llama_like
from quire.models.families.qwen2 import qwen_windows
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec


def qwen3(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Qwen3ForCausalLM."""
    bias = config.boolean("attention_bias", False)
    spec = llama_like(config, head_dim=128, windows=qwen_windows(config), num_kv_heads=32)
    return replace(spec, qk_norm="head", qkv_bias=bias, o_bias=bias), NameMap()
