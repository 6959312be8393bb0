"""GPT-2 (Radford et al., 2019): learned positions, layer norms, biases, Conv1D weights."""

from quire.models.families.llama import MAX_LAYERS
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec, LayerSpec, NormSpec

GPT2_NAMES = NameMap(
    prefix="transformer.",
    embedding="wte",
    final_norm="ln_f",
    layer="h.{i}.",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    transposed=True,
    unused=("*.attn.bias", "*.attn.masked_bias"),
)


def gpt2(config: ConfigReader) -> tuple[DecoderSpec, NameMap]:
    """GPT2LMHeadModel."""
    hidden_size, num_heads = config.integer("n_embd"), config.integer("n_head")
    if hidden_size % num_heads:
        raise config.unsupported("n_head", f"it must divide n_embd {hidden_size}")
    scale = (hidden_size // num_heads) ** -0.5 if config.boolean("scale_attn_weights", True) else 1.0
    by_layer = config.boolean("scale_attn_by_inverse_layer_idx", False)
    num_layers = config.integer("n_layer", at_most=MAX_LAYERS)
    spec = DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("n_inner", 4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=config.integer("n_positions"),
        layers=tuple(LayerSpec(scale / (i + 1) if by_layer else scale) for i in range(num_layers)),
        norm=NormSpec(config.number("layer_norm_epsilon", 1e-5), kind="layer"),
        activation=config.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied_head=config.boolean("tie_word_embeddings", True),
        learned_positions=True,
    )
    return spec, GPT2_NAMES
