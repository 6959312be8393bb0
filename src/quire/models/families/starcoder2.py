"""StarCoder2 (arXiv 2402.19173): layer norms, biases, a plain GELU MLP, a sliding window."""

from dataclasses import replace

from quire.models.families.llama import llama_like, same_window
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec, NormSpec


def starcoder2(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Starcoder2ForCausalLM."""
    windows = same_window(config)
    bias = config.boolean("use_bias", True)
    spec = replace(
        llama_like(config, windows=windows, num_kv_heads=2, tied_head=True),
        norm=NormSpec(config.number("norm_epsilon", 1e-5), kind="layer"),
        activation=config.activation("hidden_act", "gelu_pytorch_tanh"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )
    return spec, NameMap(up="mlp.c_fc", down="mlp.c_proj")
