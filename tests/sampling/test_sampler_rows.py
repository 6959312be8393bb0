"""A row taken anew finds nothing of the request before, and a fault of one row's logits is that row's alone."""

import math

import numpy as np
import pytest

from quire.core.request import PenaltySpec, SamplingSpec
from quire.errors import NO_TOKEN_LEFT
from quire.ops.types import Ops
from quire.sampling.sampler import NOT_FINITE
from tests.sampling.known_rows import PROVIDERS, full_sampler, new_row, normal_logits

VOCABULARY = 90
GREEDY = SamplingSpec(temperature=0.0)
FULL = SamplingSpec(
    temperature=1.5, top_k=1, top_p=0.2, min_p=0.9, seed=4,
    penalties=PenaltySpec(presence=2.0, frequency=2.0, repetition=1.9), min_tokens=50, stop_token_ids=(3, 4),
    logit_bias=((5, 50.0),), bad_words=((6,), (7, 8)),
    allowed_token_ids=tuple(range(3, 60)), num_logprobs=3, logprob_token_ids=(9, 10),
)  # fmt: skip
"""A request that uses everything."""


def test_a_row_taken_anew_is_clean(ops: Ops) -> None:
    """A neighbour uses every feature all the time, so that each of them is asked in each step."""
    sampler = full_sampler(ops, 2)
    sampler.add(new_row(0, [1, 2], FULL))
    sampler.add(new_row(1, [5, 6], FULL, [7, 7]))
    sampler.on_token(1, 7)
    logits = normal_logits(1, 2, VOCABULARY)
    sampler.sample(ops.array(logits, "float32"), [0, 1], [2, 5]).read([0, 1])
    sampler.remove(1)
    sampler.remove(1)  # after a fault it is called again
    sampler.add(new_row(1, [20], GREEDY))
    assert sampler.all_greedy([1])
    array = ops.array(logits, "float32")
    results = sampler.sample(array, [0, 1], [2, 1]).read([0, 1])
    assert np.array_equal(ops.to_numpy(array)[1], logits[1]), "nothing was edited"
    assert not np.array_equal(ops.to_numpy(array)[0], logits[0])
    assert (results[1].token_ids, results[1].logprobs) == ((int(logits[1].argmax()),), ())
    sampler.remove(1)
    sampler.add(new_row(1, [20], GREEDY._replace(num_logprobs=1)))
    results = sampler.sample(ops.array(logits, "float32"), [0, 1], [2, 1]).read([0, 1])
    assert results[1].logprobs[0].token_ids == (int(logits[1].argmax()),) * 2, "the best, and no named token"


@pytest.mark.parametrize(
    "kept",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}, {"temperature": 0.0}],
    ids=lambda kept: next(iter(kept)),
)
def test_cut_offs_and_temperature_end_with_their_request(ops: Ops, kept: dict[str, float]) -> None:
    """Each of them allows only the best token, 0. The request after it samples freely, so 1 comes too."""
    sampler = full_sampler(ops, 1)
    near = np.full((1, 8), -50.0, np.float32)
    near[0, :2] = 1.0, 0.9
    free = SamplingSpec(temperature=1.0, seed=1)

    def seen() -> set[int]:
        results = [sampler.sample(ops.array(near, "float32"), [0], [position]).read([0]) for position in range(40)]
        return {token for (result,) in results for token in result.token_ids}

    for spec, tokens in ((free, {0, 1}), (free._replace(**kept), {0}), (free, {0, 1})):
        sampler.add(new_row(0, [1], spec))
        assert seen() == tokens
        sampler.remove(0)


def test_what_rows_want_of_their_logits() -> None:
    """The sampler edits nothing, or lets the model take the best token, only where all rows of a step allow."""
    plain = SamplingSpec(temperature=1.0)
    editing = [
        {"allowed_token_ids": (1,)}, {"logit_bias": ((1, 1.0),)}, {"min_tokens": 1, "stop_token_ids": (2,)},
        {"bad_words": ((1,),)}, {"penalties": PenaltySpec(presence=0.1)},
        {"penalties": PenaltySpec(frequency=-0.1)}, {"penalties": PenaltySpec(repetition=1.1)},
        {"num_logprobs": 0},
    ]  # fmt: skip
    sampler = full_sampler(PROVIDERS["numpy"](), 4)
    sampler.add(new_row(0, [1], GREEDY))
    sampler.add(new_row(1, [1], plain))
    sampler.add(new_row(2, [1], GREEDY))
    assert sampler.all_greedy([0, 2]) and sampler.all_greedy([0])
    assert not sampler.all_greedy([0, 1]) and not sampler.all_greedy([1])
    assert sampler.needs_only_tokens([0, 1, 2])
    for setting in editing:
        sampler.add(new_row(3, [1], GREEDY._replace(**setting)))
        assert not sampler.needs_only_tokens([0, 3]) and not sampler.all_greedy([3, 2]), setting
        assert sampler.needs_only_tokens([0, 1]) and sampler.all_greedy([0])
        sampler.remove(3)
        assert sampler.needs_only_tokens([0, 3])


@pytest.mark.parametrize("tells", [True, False], ids=["logprobs", "tokens"])
def test_a_fault_of_logits_is_of_one_row(ops: Ops, tells: bool) -> None:
    """Of five rows one has NaN, one an infinite logit, and one has no token left once its logits are edited."""
    specs = [GREEDY, GREEDY, GREEDY, SamplingSpec(temperature=0.0, logit_bias=((2, 1.0),)), GREEDY]
    specs[1] = SamplingSpec(temperature=0.0, allowed_token_ids=(7,), bad_words=((7,),))
    sampler = full_sampler(ops, 5)
    for row, spec in enumerate(specs):
        sampler.add(new_row(row, [1], spec._replace(num_logprobs=1 if tells and row == 4 else None)))
    logits = normal_logits(8, 5, VOCABULARY)
    logits[2, 30], logits[0, 89] = math.nan, math.inf
    results = sampler.sample(ops.array(logits, "float32"), range(5), [1] * 5).read(range(5))
    assert [result.error for result in results] == [NOT_FINITE, NO_TOKEN_LEFT, NOT_FINITE, None, None]
    logits[3, 2] += 1.0
    for row in (3, 4):
        assert results[row].token_ids == (int(logits[row].argmax()),)
    assert [one.token_ids for one in results[4].logprobs] == [(int(logits[4].argmax()),) * 2] * tells
    assert not any(result.token_ids or result.logprobs for result in results[:3])
    # The one that has no token left, alone among rows that are well.
    logits = normal_logits(9, 5, VOCABULARY)
    results = sampler.sample(ops.array(logits, "float32"), range(5), [1] * 5).read(range(5))
    assert [result.error for result in results] == [None, NO_TOKEN_LEFT, None, None, None]
