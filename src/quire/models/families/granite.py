"""Granite 3 (IBM, 2024): Llama with multipliers on embedding, attention, residual and logits."""

from dataclasses import replace

from quire.models.families.llama import llama
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec, NormSpec


def granite(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """GraniteForCausalLM.

    Every sublayer adds `m * x` to the residual. All that is read of the residual are its RMS norms, which do not
    change when it is divided by m, if eps is divided by m squared; so the decoder keeps `residual / m`, and
    adds plain x to it. Then only the embedding is scaled.
    """
    spec, names = llama(config)
    multiplier = config.number("residual_multiplier", 1.0)
    scale = config.number("attention_multiplier", 1.0)
    return replace(
        spec,
        layers=tuple(replace(layer, attention_scale=scale) for layer in spec.layers),
        norm=NormSpec(spec.norm.eps / multiplier**2),
        embedding_scale=config.number("embedding_multiplier", 1.0) / multiplier,
        logits_scale=1.0 / config.number("logits_scaling", 1.0),
    ), names
