"""Log-probabilities against a plain log-softmax: values, ids and ranks of every token reported."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire import LLM, SamplingParams
from quire.compose.core import sampling_features
from quire.core.plan import RowResult
from quire.core.request import SamplingSpec
from quire.ops.types import Ops
from quire.outputs import PositionLogprobs
from quire.sampling.sampler import Sampler
from tests.sampling.known_rows import full_sampler, new_row, normal_logits

VOCABULARY = 500


def log_softmax(logits: Any) -> Any:
    values = logits.astype(np.float64)
    return values - values.max() - np.log(np.exp(values - values.max()).sum())


def rank(logits: Any, token: int) -> int:
    """1 is the most probable token."""
    return 1 + int((logits > logits[token]).sum())


def check_row(logits: Any, result: RowResult, others: Sequence[int]) -> None:
    """The chosen token, then `others`, each with its value and its rank among the raw `logits`."""
    (token,), (found,) = result.token_ids, result.logprobs
    expected = [token, *others]
    assert list(found.token_ids) == expected
    np.testing.assert_allclose(found.logprobs, log_softmax(logits)[expected], rtol=0, atol=1e-5)
    assert list(found.ranks) == [rank(logits, token) for token in expected]


def best(logits: Any, count: int) -> list[int]:
    return sorted(range(VOCABULARY), key=lambda token: (-logits[token], token))[:count]


@pytest.mark.parametrize("wanted", [[1, 5, 20], [20, 1, 5], [0, 3], [3, None, 0, 7], [None, 2, None, 1]])
def test_rows_that_want_different_numbers(ops: Ops, wanted: list[int | None]) -> None:
    """In one batch, the smallest number first and last, and rows between that want none."""
    sampler = full_sampler(ops, 8)
    for row, count in enumerate(wanted):
        sampler.add(new_row(row + 2, [1], SamplingSpec(temperature=1.0, seed=row, num_logprobs=count)))
    logits = normal_logits(3, len(wanted), VOCABULARY)
    rows = [row + 2 for row in range(len(wanted))]
    results = sampler.sample(ops.array(logits, "float32"), rows, [1] * len(rows)).read(range(len(rows)))
    assert [result.row for result in results] == rows
    for one, result, count in zip(logits, results, wanted, strict=True):
        if count is None:
            assert result.logprobs == ()
        else:
            check_row(one, result, best(one, count))
    for index in reversed(range(len(rows))):  # each alone reads the same
        assert sampler.sample(ops.array(logits, "float32"), rows, [1] * len(rows)).read([index]) == [results[index]]


def test_tokens_that_rows_name(ops: Ops) -> None:
    """More of them together than the sampler reads at one time, beside rows that want the best."""
    draw = random.Random(4)
    named = [tuple(sorted(draw.sample(range(VOCABULARY), count))) for count in (11, 0, 17, 1)]
    sampler = full_sampler(ops, 4)
    for row, ids in enumerate(named):
        sampler.add(new_row(row, [1], SamplingSpec(temperature=0.0, num_logprobs=2, logprob_token_ids=ids)))
    logits = normal_logits(4, 4, VOCABULARY)
    order = [2, 1, 3, 0]
    results = sampler.sample(ops.array(logits[order], "float32"), order, [1] * 4).read(range(4))
    for row, result in zip(order, results, strict=True):
        assert result.token_ids == (int(logits[row].argmax()),)
        check_row(logits[row], result, named[row] or best(logits[row], 2))


def test_they_are_of_the_models_own_logits(ops: Ops) -> None:
    """A token that a bias or a mask made the best keeps the log-probability that the model gave it."""
    logits = normal_logits(6, 2, VOCABULARY)
    unlikely = [int(one.argmin()) for one in logits]
    sampler = full_sampler(ops, 2)
    sampler.add(new_row(0, [1], SamplingSpec(temperature=0.0, num_logprobs=3, logit_bias=((unlikely[0], 100.0),))))
    sampler.add(new_row(1, [1], SamplingSpec(temperature=0.0, num_logprobs=3, allowed_token_ids=(unlikely[1],))))
    results = sampler.sample(ops.array(logits, "float32"), [0, 1], [1, 1]).read([0, 1])
    for one, token, result in zip(logits, unlikely, results, strict=True):
        assert result.token_ids == (token,)
        check_row(one, result, best(one, 3))
        assert result.logprobs[0].ranks[0] == VOCABULARY


def test_raw_logits_are_the_models_own_to_the_bit(ops: Ops) -> None:
    """With a mask, a bias, named tokens and a temperature beside them, which change none of the values."""
    logits = normal_logits(8, 3, VOCABULARY)
    unlikely = int(logits[0].argmin())
    specs = [
        SamplingSpec(temperature=0.0, num_logprobs=4, allowed_token_ids=(unlikely,)),
        SamplingSpec(temperature=2.0, seed=1, num_logprobs=1, logit_bias=((7, 5.0),), bad_words=((7, 3),)),
        SamplingSpec(temperature=0.5, seed=2, top_k=5, num_logprobs=1, logprob_token_ids=(0, 499, 17)),
    ]
    found = {}
    for mode in ("raw_logprobs", "raw_logits"):
        sampler = Sampler(ops, 3, sampling_features(ops), mode)
        for row, spec in enumerate(specs):
            sampler.add(new_row(row, [1, 7], spec))
        found[mode] = sampler.sample(ops.array(logits, "float32"), [0, 1, 2], [2, 2, 2]).read([0, 1, 2])
    assert found["raw_logits"][0].token_ids == (unlikely,)
    for one, as_logits, as_logprobs in zip(logits, found["raw_logits"], found["raw_logprobs"], strict=True):
        assert as_logits.token_ids == as_logprobs.token_ids
        (values,), (others,) = as_logits.logprobs, as_logprobs.logprobs
        assert (values.token_ids, values.ranks) == (others.token_ids, others.ranks)
        assert list(values.logprobs) == one[list(values.token_ids)].tolist()


# End to end.


def expected_rows(judge: Any, token_ids: list[int]) -> Any:
    """Logits after each token, by transformers."""
    with torch.no_grad():
        return judge(torch.tensor([token_ids])).logits[0].numpy()


def check_position(logits: Any, token: int, found: PositionLogprobs | None, count: int) -> None:
    """`token`, and the `count` best: a tie within the tolerance may stand in either order."""
    assert found is not None
    values = log_softmax(logits)
    assert next(iter(found)) == token
    ranks = [item.rank for item in found.values()]
    assert sorted({*ranks, *range(1, count + 1)}) == sorted(ranks)
    for other, item in found.items():
        assert item.logprob == pytest.approx(values[other], abs=2e-4)
        assert values[other] == pytest.approx(np.sort(values)[-item.rank], abs=2e-4)
        if other < 256:  # the tokenizer's tokens are the bytes, then some special ones
            assert item.decoded_token == bytes([other]).decode("utf-8", "replace")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_batch_of_different_numbers_is_that_of_transformers(model: Path, judge: Any, overlap: bool) -> None:
    prompts = [[10, 11, 12], [90] * 20, [7, 8, 9, 200, 13], [33, 34]]
    wanted = [0, 4, 1, None]
    params = [
        SamplingParams(temperature=1.0, seed=place, max_tokens=10, ignore_eos=True, logprobs=count)
        for place, count in enumerate(wanted)
    ]
    with LLM(model=str(model), dtype="float32", async_scheduling=overlap) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, count, output in zip(prompts, wanted, outputs, strict=True):
        completion = output.outputs[0]
        if count is None:
            assert completion.logprobs is None and completion.cumulative_logprob is None
            continue
        assert completion.logprobs is not None
        rows = expected_rows(judge, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
        for token, logits, found in zip(completion.token_ids, rows, completion.logprobs, strict=False):
            check_position(logits, token, found, count)
        total = sum(log_softmax(one)[token] for token, one in zip(completion.token_ids, rows, strict=False))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_raw_logits_of_prompt_and_answer_are_those_of_transformers(model: Path, judge: Any) -> None:
    """More positions than are read at one time (64), and an answer that is held to letters."""
    prompt = [(11 * place + place // 20) % 250 for place in range(80)]
    params = SamplingParams(
        max_tokens=6, temperature=1.0, seed=3, logprobs=2, prompt_logprobs=1, allowed_token_ids=[*range(97, 123)]
    )
    with LLM(model=str(model), dtype="float32", logprobs_mode="raw_logits") as llm:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    answer = output.outputs[0]
    assert output.prompt_logprobs is not None and answer.logprobs is not None and len(answer.token_ids) == 6
    rows = expected_rows(judge, [*prompt, *answer.token_ids])
    for logits, found in zip(rows, [*output.prompt_logprobs[1:], *answer.logprobs], strict=False):
        assert found is not None
        for token, item in found.items():
            assert item.logprob == pytest.approx(logits[token], abs=2e-4)
    assert set(answer.token_ids) <= {*range(97, 123)}


def test_those_of_a_long_prompt_in_one_step(model: Path, judge: Any) -> None:
    """More positions than are read at one time (64)."""
    prompt = [(11 * place + place // 20) % 250 for place in range(150)]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    with LLM(model=str(model), dtype="float32", max_num_batched_tokens=512) as llm:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 150
    rows = expected_rows(judge, prompt)
    for token, logits, found in zip(prompt[1:], rows, output.prompt_logprobs[1:], strict=False):
        check_position(logits, token, found, 1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("batched_tokens", [64, 7])
def test_those_of_the_prompt_are_given_once_for_n_sequences(
    model: Path, judge: Any, overlap: bool, batched_tokens: int
) -> None:
    prompt = [(7 * place) % 250 for place in range(21)]
    params = SamplingParams(
        n=3, temperature=1.0, seed=2, max_tokens=5, ignore_eos=True, logprobs=1, prompt_logprobs=2
    )  # fmt: skip
    with LLM(model=str(model), dtype="float32", async_scheduling=overlap, max_num_batched_tokens=batched_tokens) as llm:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    rows = expected_rows(judge, prompt)
    for token, logits, found in zip(prompt[1:], rows, output.prompt_logprobs[1:], strict=False):
        check_position(logits, token, found, 2)
    assert len({tuple(item.token_ids) for item in output.outputs}) == 3
    for item in output.outputs:
        rows = expected_rows(judge, [*prompt, *item.token_ids])[len(prompt) - 1 :]
        assert item.logprobs is not None
        for token, logits, position in zip(item.token_ids, rows, item.logprobs, strict=False):
            check_position(logits, token, position, 1)
