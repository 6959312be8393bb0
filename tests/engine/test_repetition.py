"""Repetition against its definition: the last tokens are one pattern, so many times in a row."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from quire.engine.request_state import RepetitionDetector
from quire.sampling_params import RepetitionDetectionParams


def repeats(tokens: Sequence[int], params: RepetitionDetectionParams) -> bool:
    """By the definition, looked up anew for every length."""
    for size in range(max(1, params.min_pattern_size), params.max_pattern_size + 1):
        length = size * params.min_count
        if length <= len(tokens) and list(tokens[-length:]) == list(tokens[-size:]) * params.min_count:
            return True
    return False


@pytest.mark.parametrize(
    "options",
    [
        {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 2},
        {"max_pattern_size": 1, "min_pattern_size": 0, "min_count": 5},
        {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 3},
        {"max_pattern_size": 5, "min_pattern_size": 1, "min_count": 2},
        {"max_pattern_size": 4, "min_pattern_size": 4, "min_count": 2},
    ],
)
def test_random_sequences_repeat_where_the_definition_says(options: dict[str, Any]) -> None:
    params, dice = RepetitionDetectionParams(**options), random.Random(str(options))
    num_found = 0
    for _ in range(60):
        watch, tokens = RepetitionDetector(params), list[int]()
        while len(tokens) < 60:
            pattern = [dice.randrange(3) for _ in range(dice.randint(1, 5))]
            for token in pattern * dice.randint(1, 4):
                tokens.append(token)
                found = watch.push([token])
                assert found == repeats(tokens, params), tokens
                num_found += found
    assert num_found > 20


def test_a_pattern_must_be_complete_at_the_last_of_the_tokens_that_come_together() -> None:
    params = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=2, min_count=2)
    watch = RepetitionDetector(params)
    assert watch.push([1, 2, 1, 2])
    assert not watch.push([1, 3]) and not watch.push([])
    assert RepetitionDetector(params).push([9, 1, 2, 1, 2])
    assert not RepetitionDetector(params).push([1, 2, 1, 2, 5])
