"""Makers of tiny random checkpoints in which every feature of a family matters.

`make_tiny("gemma2", directory)` writes what transformers would. Weights are larger than a fresh model's, so that
logits differ; norms are not ones and biases not zeros, so that a forgotten one shows.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 320
END_OF_TEXT = 256

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
}


@dataclass(frozen=True)
class TinyFamily:
    """One line of the table: transformers' names, and what differs from `_COMMON`."""

    config: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=lambda: _COMMON)
    embedding_std: float = 0.3
    """Small beside what the layers add, or a tied head only repeats its input."""


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0} | settings}


LLAMA3_ROPE = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN_ROPE = _rope("yarn", factor=4.0, original_max_position_embeddings=128)
_LONGROPE_FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
}

_GEMMA3 = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 48,
    "sliding_window": 20,
    "sliding_window_pattern": 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    },
}

FAMILIES: dict[str, TinyFamily] = {
    "llama": TinyFamily("LlamaConfig", "LlamaForCausalLM"),
    "llama-3.1": TinyFamily("LlamaConfig", "LlamaForCausalLM", LLAMA3_ROPE | {"tie_word_embeddings": True}),
    "llama-bias": TinyFamily(
        "LlamaConfig",
        "LlamaForCausalLM",
        _rope("linear", factor=2.0) | {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "mistral": TinyFamily("MistralConfig", "MistralForCausalLM", {"sliding_window": 21, "head_dim": 32}),
    "qwen2": TinyFamily(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        YARN_ROPE | {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
    "qwen3": TinyFamily("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "phi3": TinyFamily(
        "Phi3Config",
        "Phi3ForCausalLM",
        {"sliding_window": 23, "original_max_position_embeddings": 256}
        | _rope("longrope", partial_rotary_factor=0.75, **_LONGROPE_FACTORS),
    ),
    "gemma2": TinyFamily(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 48,
            "sliding_window": 20,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 1.5,
        },
        embedding_std=0.05,
    ),
    "gemma3": TinyFamily("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA3, embedding_std=0.05),
    "gemma3-vision": TinyFamily(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _COMMON | _GEMMA3,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
        {},
        embedding_std=0.05,
    ),
    "olmo2": TinyFamily("Olmo2Config", "Olmo2ForCausalLM"),
    "granite": TinyFamily(
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.11,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.25,
            "attention_bias": True,
        },
        embedding_std=0.03,
    ),
    "smollm3": TinyFamily(
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 18},
    ),
    "starcoder2": TinyFamily("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": 22}),
    "gpt2": TinyFamily(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True},
        {
            "vocab_size": VOCAB_SIZE,
            "n_positions": 512,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
        },
    ),
}


def make_tiny(
    family: str,
    directory: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    tokenizer: bool = False,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint of `family` (a key of `FAMILIES`) into `directory` and return it.

    Args:
        dtype: bfloat16, float16 or float32.
        tokenizer: also write a byte-level tokenizer with a chat template.
        max_shard_size: as transformers has it; "100KB" gives several shards and an index.
        overrides: settings of the family's config, in place of the table's.
    """
    tiny = FAMILIES[family]
    config = getattr(transformers, tiny.config)(**(tiny.common | tiny.settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, tiny.model)._from_config(config, attn_implementation="eager")
        randomise(model, tiny.embedding_std)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def randomise(model: torch.nn.Module, embedding_std: float) -> None:
    """Matrices of a gain a little above one, norms around one (Gemma stores them minus one), small biases."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 2:
                is_table = "embed" in name or "wte" in name or "wpe" in name
                parameter.copy_(noise * (embedding_std if is_table else 1.3 * 64**-0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.2)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer: token `b` is the byte `b`; 256 ends a text, 257 to 259 mark chat turns."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[0],
        "bos_token": special[0],
        "pad_token": special[0],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
