"""What a soak asks, and of which servers: requests that share beginnings, and settings that change how they are cut."""

import random
from typing import Any

TOKENS = range(10, 250)
"""Prompts are of these: each model has them."""
BEGINNINGS = (7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64)
"""Their lengths in tokens, at the edges of blocks and beside them."""
NUM_LONG, NUM_SHORT = 3, 5
"""Requests of a family."""
MAX_MODEL_LEN = 192
"""Prompt and answer of the longest request fit."""
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1.0, "logprobs": 1},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.4, "logprobs": 1},
    {"temperature": 1.1, "top_k": 40, "repetition_penalty": 1.2, "ignore_eos": False, "logprobs": 1},
    {"temperature": 1.5, "min_tokens": 9, "max_tokens": 24, "ignore_eos": False, "logprobs": 1},
    {"temperature": 1.0, "stop": ["e", "zq", ". "], "n": 2, "logprobs": 1},
    {"temperature": 1.2, "min_p": 0.02, "logit_bias": {"11": 4.0, "12": -100.0}, "logprobs": 1},
    {"temperature": 0, "prompt_logprobs": 1, "logprobs": 1, "stream": False},
    {"temperature": 1.0, "stop_token_ids": list(range(20, 60)), "n": 3},
)


def make_families(seed: int, count: int) -> list[list[dict[str, Any]]]:
    """Bodies of requests. Those of a family begin alike: first long answers, which keep rows busy, then short ones to
    prompts that go on from each other. Many bring several prompts, whose sequences the scheduler gets together."""
    rng = random.Random(f"requests of {seed}")
    return [_family(rng) for _ in range(count)]


def _family(rng: random.Random) -> list[dict[str, Any]]:
    def text(count: int) -> list[int]:
        return rng.choices(TOKENS, k=count)

    def body(prompt: Any, max_tokens: int) -> dict[str, Any]:
        base = {"seed": rng.randrange(2**31), "ignore_eos": True, "return_token_ids": True}
        return {"prompt": prompt, "max_tokens": max_tokens, **base, **rng.choice(KINDS)}

    beginning = text(rng.choice(BEGINNINGS))
    bodies = [body(beginning, rng.randint(30, 80)) for _ in range(NUM_LONG)]
    prompts = [beginning[: rng.randint(1, len(beginning))] + text(rng.randint(0, 16))]
    for _ in range(NUM_SHORT):
        while len(prompts) < 4 or rng.random() < 0.4:
            prompts.append(rng.choice(prompts[-3:])[:90] + text(rng.randint(0, 16)))
        bodies.append(body(rng.choice([prompts[-1], prompts[-4:]]), rng.randint(1, 6)))
    return bodies


def make_settings(rng: random.Random) -> dict[str, Any]:
    """Engine arguments of one server: short chunks, more threads than the soak has processors. Half of them are crowded
    (many rows, blocks for all), as some faults need a step of many rows; many of the others have few blocks."""
    crowded = rng.random() < 0.5
    block_size = rng.choice([8, 16] if crowded else [8, 16, 32])
    return {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": rng.choice([48, 64] if crowded else [16, 24, 32, 33, 48, 64]),
        "max_num_seqs": 64 if crowded else rng.choice([8, 32, 64]),
        "block_size": block_size,
        "num_gpu_blocks_override": MAX_MODEL_LEN // block_size * (24 if crowded else rng.choice([1, 2, 3, 8])),
        "async_scheduling": rng.random() < 0.5,
        "threads": 4 if crowded else rng.choice([4, 6]),
    }


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as `quire serve` takes them."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags
