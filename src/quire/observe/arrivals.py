"""Requests made up for a simulation: the lengths and the arrivals of a public trace, without the trace."""

import math
import random
from dataclasses import dataclass

from quire.observe.replay import Asked


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths: the mean of prompts and answers in tokens, and the spread of their logarithms."""

    prompt: float
    output: float
    prompt_spread: float = 1.3
    output_spread: float = 0.9


SHAREGPT = Lengths(161, 338)
"""The means of ShareGPT as the paper on PagedAttention has them (arXiv 2309.06180, figure 11)."""
ALPACA = Lengths(19, 58, 0.6, 0.8)
"""Of Alpaca, from the same figure."""
NAMED = {"sharegpt": SHAREGPT, "alpaca": ALPACA}


def made_up(lengths: Lengths, count: int, rate: float, max_model_len: int, seed: int = 0) -> list[Asked]:
    """Requests that come at random (Poisson).

    Args:
        rate: requests a second; infinity: all at once.
        max_model_len: prompts and answers are cut to it, together.
    """
    rng, now_s, found = random.Random(seed), 0.0, list[Asked]()
    for number in range(count):
        now_s += rng.expovariate(rate) if math.isfinite(rate) else 0.0
        prompt = min(_length(rng, lengths.prompt, lengths.prompt_spread), max_model_len - 1)
        output = min(_length(rng, lengths.output, lengths.output_spread), max_model_len - prompt)
        found.append(Asked(number, prompt, output, now_s, reason="length", num_output=output))
    return found


def _length(rng: random.Random, mean: float, spread: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))
