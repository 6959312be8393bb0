from typing import Any


def bytes_per_token(config: dict[str, Any], bytes_per_number: int = 2) -> int:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * config["num_hidden_layers"] * kv_heads * head_dim * bytes_per_number


def blocks_for(num_tokens: int, block_size: int = 16) -> int:
    return -(-num_tokens // block_size)


def sequences_that_fit(config: dict[str, Any], memory_bytes: int, num_tokens: int, block_size: int = 16) -> int:
    num_blocks = memory_bytes // (block_size * bytes_per_token(config))
    return num_blocks // blocks_for(num_tokens, block_size)
