"""Checks of exercise 1.2: published models, then made-up ones."""

import random
from types import ModuleType
from typing import Any

from quire.course.checking import Check, expect

_LLAMA_2 = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": (_LLAMA_2, 524_288),
    "Llama-3-8B": ({**_LLAMA_2, "num_key_value_heads": 8}, 131_072),
    "SmolLM2-135M": (
        {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576},
        23_040,
    ),
    "Qwen3-0.6B": (
        {
            **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
            **{"hidden_size": 1024, "head_dim": 128},
        },
        114_688,
    ),
    "a file with nulls": ({**_LLAMA_2, "num_key_value_heads": None, "head_dim": None}, 524_288),
}
"""Name -> what its config.json says, and the bytes of a token at 16 bits."""


def published(module: ModuleType) -> str:
    """bytes_per_token of published models"""
    for name, (config, wanted) in MODELS.items():
        expect(module.bytes_per_token(dict(config)), wanted, f"bytes_per_token of {name}")
    return f"{len(MODELS)} models"


def made_up(module: ModuleType) -> str:
    """bytes_per_token at 1, 2 and 4 bytes a number"""
    rng = random.Random(0)
    for _ in range(50):
        layers, heads, dim = rng.randint(1, 90), rng.randint(1, 64), rng.choice((64, 80, 128, 256))
        size = rng.choice((1, 2, 4))
        config = {
            **{"num_hidden_layers": layers, "num_attention_heads": heads * 4, "num_key_value_heads": heads},
            **{"hidden_size": 32 * heads, "head_dim": dim},
        }
        expect(
            module.bytes_per_token(config, size), 2 * layers * heads * dim * size, f"bytes_per_token({config}, {size})"
        )
    return "50 made-up models"


def blocks(module: ModuleType) -> None:
    """blocks_for rounds up to whole blocks"""
    for size in (1, 16, 64):
        for count in (0, 1, size - 1, size, size + 1, 10 * size, 10 * size + 1):
            expect(module.blocks_for(count, size), -(-count // size), f"blocks_for({count}, {size})")
    expect(module.blocks_for(2**60 + 1, 2), 2**59 + 1, "blocks_for(2**60 + 1, 2)")


def fitting(module: ModuleType) -> str:
    """sequences_that_fit counts whole blocks"""
    ask, config = module.sequences_that_fit, MODELS["Llama-2-7B"][0]
    block = 16 * 524_288
    for memory, length, wanted in (
        (16 * 2**30, 2048, 16),  # the course's example: a batch of 16 sequences of 2,048 tokens takes 16 GiB
        (16 * 2**30 - 1, 2048, 15),
        (10 * block, 16, 10),
        (10 * block, 17, 5),
        (11 * block + block // 2, 33, 3),
        (block - 1, 1, 0),
    ):
        expect(
            ask(dict(config), memory, length),
            wanted,
            f"sequences_that_fit(Llama-2-7B, {memory:,} bytes, {length} tokens)",
        )
    expect(
        ask(dict(config), 6 * 64 * 524_288, 100, 64),
        3,
        "with blocks of 64: sequences_that_fit(..., 6 blocks, 100 tokens)",
    )
    return "16 GiB hold 16 sequences of 2,048 tokens of Llama-2-7B"


CHECKS: tuple[Check, ...] = (published, made_up, blocks, fitting)
