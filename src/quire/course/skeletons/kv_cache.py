"""Exercise 1.2: KV-cache arithmetic. Check it with `quire course check 1.2`.

Every token of a sequence leaves one key and one value behind: in each layer, for each key-value head, `head_dim`
numbers each. A `config.json` says how many: `num_hidden_layers`, `num_key_value_heads` (left out or null: as many as
`num_attention_heads`), `head_dim` (left out or null: `hidden_size` divided by `num_attention_heads`).
"""

from typing import Any


def bytes_per_token(config: dict[str, Any], bytes_per_number: int = 2) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    raise NotImplementedError


def blocks_for(num_tokens: int, block_size: int = 16) -> int:
    """How many blocks a sequence of so many tokens takes: the last one may be filled in part."""
    raise NotImplementedError


def sequences_that_fit(config: dict[str, Any], memory_bytes: int, num_tokens: int, block_size: int = 16) -> int:
    """How many sequences of `num_tokens` tokens, at 2 bytes a number, a cache of `memory_bytes` holds.

    Memory is cut into whole blocks first; a sequence takes whole blocks. Stay with integers: floats lose bits.
    """
    raise NotImplementedError
