"""The data sets of `quire bench serve` and `quire bench throughput`: names, and lengths like those of ShareGPT."""

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.bench.serving import Load

RANDOM, LENGTHS, CUSTOM = "random", "sharegpt-lengths", "custom"
NUM_PROMPTS, RANDOM_LENGTHS = 1000, (1024, 128)
"""vLLM's defaults: requests, and tokens of a prompt and of an answer of `random`."""


def named(text: str) -> str:
    """A flag's value.

    Raises:
        argparse.ArgumentTypeError: it is `sharegpt`, whose texts are not here.
    """
    if text == "sharegpt":
        raise argparse.ArgumentTypeError(f"the texts of sharegpt are not here; {LENGTHS}: random tokens, its lengths")
    return text


def sharegpt_loads(count: int, longest: int, seed: int, *, as_text: bool) -> "list[Load]":
    """Random requests with the lengths that `quire simulate` gives to as many, cut to `longest` tokens together."""
    from quire.bench.serving import loads_of
    from quire.observe.arrivals import SHAREGPT, made_up

    asked = made_up(SHAREGPT, count, math.inf, longest, seed)
    return loads_of([(one.prompt, one.max_tokens) for one in asked], seed, as_text=as_text)
