"""OLMo 2 (arXiv 2501.00656): norms only after each sublayer, and norms of the whole projections of q and k."""

from dataclasses import replace

from quire.models.families.llama import llama_like
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec


def olmo2(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Olmo2ForCausalLM."""
    bias = config.boolean("attention_bias", False)
    spec = llama_like(config, norm_eps=1e-5)
    return replace(spec, norm_places="post", qk_norm="projection", qkv_bias=bias, o_bias=bias), NameMap()
