"""Llama 2, 3, 3.1, 3.2 (arXiv 2302.13971, 2407.21783), and the shape that most families start from."""

from collections.abc import Sequence
from dataclasses import replace

from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.rope_config import RopeDefaults, extended_positions, read_rope
from quire.models.spec import DecoderSpec, LayerSpec, NormSpec, RopeSpec

MAX_LAYERS = 1024
MAX_HEAD_DIM = 4096


def num_layers_of(config: ConfigReader) -> int:
    """The field `num_hidden_layers`, at most 1,024."""
    return config.integer("num_hidden_layers", at_most=MAX_LAYERS)


def same_window(config: ConfigReader, if_absent: int | None = None) -> list[int | None]:
    """The same `sliding_window` in every layer; null is none."""
    return [config.optional_integer("sliding_window", if_absent=if_absent)] * num_layers_of(config)


def llama(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """Read the configuration of a LlamaForCausalLM."""
    bias = config.boolean("attention_bias", False)
    mlp_bias = config.boolean("mlp_bias", False)
    return replace(llama_like(config), qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias), NameMap()


def llama_like(
    config: ConfigReader,
    *,
    rope: RopeSpec | RopeDefaults = RopeDefaults(),  # noqa: B008  (frozen)
    head_dim: int | None = None,
    windows: Sequence[int | None] | None = None,
    num_kv_heads: int | None = None,
    tied_head: bool = False,
    norm_eps: float = 1e-6,
) -> DecoderSpec:
    """Pre-norm RMS norms, rotary positions, grouped-query attention, gated SiLU MLP, no biases.

    The keywords are what an absent key means to a family; `rope` may also be what it read itself.

    Raises:
        UnsupportedModelError, ModelFileError: as `ConfigReader`.
    """
    hidden_size = config.integer("hidden_size")
    num_layers = num_layers_of(config)
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.optional_integer("num_key_value_heads", if_absent=num_kv_heads) or num_heads
    head_dim = config.integer("head_dim", head_dim or hidden_size // num_heads, at_least=2, at_most=MAX_HEAD_DIM)
    if num_heads % num_kv_heads:
        raise config.unsupported("num_key_value_heads", f"it must divide the {num_heads} heads")
    rope_spec = rope if isinstance(rope, RopeSpec) else read_rope(config, head_dim, rope)
    layer_windows = windows if windows is not None else [None] * num_layers
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=extended_positions(rope_spec, config.integer("max_position_embeddings")),
        layers=tuple(LayerSpec(head_dim**-0.5, window, rope_spec) for window in layer_windows),
        norm=NormSpec(config.number("rms_norm_eps", norm_eps)),
        activation=config.activation("hidden_act", "silu"),
        tied_head=config.boolean("tie_word_embeddings", tied_head),
    )
