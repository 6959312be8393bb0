"""Four deterministic workloads of token ids.

    W1  one stream: 128 tokens in, 128 out
    W2  offline, mixed lengths: 32 requests, 32 to 512 in, 16 to 256 out
    W3  a common prefix of 1,024 tokens, 32 own tokens each, 32 out: 16 requests
    W4  one long prompt: 4,096 in, 1 out

Lengths are the same in every repetition and the ids are not, so a prefix cache left over from the repetition before
is no help. Outputs have exactly the asked length: the end of sequence is ignored.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

LOWEST_ID, HIGHEST_ID = 300, 8000
"""Ordinary tokens of any vocabulary of usual size: past the special ones and the single bytes."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a workload."""

    prompt_token_ids: list[int]
    num_output: int


class _Ids:
    """A seeded source of token ids."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._random = random.Random(seed)
        self._high = min(HIGHEST_ID, vocab_size)
        self._low = min(LOWEST_ID, self._high // 2)

    def take(self, count: int) -> list[int]:
        return [self._random.randrange(self._low, self._high) for _ in range(count)]


def single_stream(repetition: int, vocab_size: int) -> list[Item]:
    """W1."""
    return [Item(_Ids(1000 + repetition, vocab_size).take(128), 128)]


def mixed_lengths(repetition: int, vocab_size: int) -> list[Item]:
    """W2."""
    lengths = random.Random(0)
    shape = [(lengths.randint(32, 512), lengths.randint(16, 256)) for _ in range(32)]
    ids = _Ids(2000 + repetition, vocab_size)
    return [Item(ids.take(num_input), num_output) for num_input, num_output in shape]


def common_prefix(repetition: int, vocab_size: int) -> list[Item]:
    """W3."""
    ids = _Ids(3000 + repetition, vocab_size)
    prefix = ids.take(1024)
    return [Item(prefix + ids.take(32), 32) for _ in range(16)]


def long_prompt(repetition: int, vocab_size: int) -> list[Item]:
    """W4."""
    return [Item(_Ids(4000 + repetition, vocab_size).take(4096), 1)]


WORKLOADS: dict[str, Callable[[int, int], list[Item]]] = {
    "W1": single_stream,
    "W2": mixed_lengths,
    "W3": common_prefix,
    "W4": long_prompt,
}


def warm_up(vocab_size: int) -> list[Item]:
    """A short run before anything is timed."""
    (item,) = single_stream(99, vocab_size)
    return [Item(item.prompt_token_ids, 8)]


def longest(items: list[Item]) -> int:
    """Tokens of the longest request, prompt and output together."""
    return max(len(item.prompt_token_ids) + item.num_output for item in items)
