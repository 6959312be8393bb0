"""Phi-3 and Phi-4-mini (arXiv 2404.14219): fused projections, LongRoPE, rotation of a part of each head."""

from quire.models.families.llama import llama_like, same_window
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.rope_config import RopeDefaults
from quire.models.spec import DecoderSpec


def phi3(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Phi3ForCausalLM."""
    windows = same_window(config)
    rope = RopeDefaults(can_be_partial=True, longrope_names=("longrope", "su", "yarn"), original_positions=4096)
    spec = llama_like(config, rope=rope, windows=windows, norm_eps=1e-5)
    return spec, NameMap(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
