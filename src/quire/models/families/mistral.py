"""Mistral (arXiv 2310.06825): Llama with a sliding window in every layer."""

from quire.models.families.llama import llama_like, same_window
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec


def mistral(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """MistralForCausalLM."""
    windows = same_window(config, if_absent=4096)
    return llama_like(config, windows=windows, num_kv_heads=8), NameMap()
