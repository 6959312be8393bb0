"""A request whose core died goes on in another one: what was given is data, and nothing is given twice."""

from dataclasses import replace

import pytest

from quire.core.plan import TokenDelta
from quire.core.request import NewRequest, ResumeState
from quire.errors import InvalidRequestError
from tests.core.harness import Harness, alone, new_request

REQUESTS = (
    new_request("plain", range(1, 10), max_tokens=9),
    new_request("sampled", range(1, 7), max_tokens=12, seed=7, num_logprobs=0, stop_token_ids=(3, 4), eos=(3,)),
    new_request("least", range(2, 9), max_tokens=12, stop_token_ids=tuple(range(13)), min_tokens=6),
    new_request("scored", range(1, 12), max_tokens=5, num_logprobs=0, num_prompt_logprobs=0),
)


def deltas_of(new: NewRequest, budget: int) -> list[TokenDelta]:
    """Step by step, alone."""
    harness, deltas = Harness(budget=budget), []
    harness.add(new)
    while harness.scheduler.has_work:
        deltas += harness.step()
    return deltas


def resume_state(deltas: list[TokenDelta]) -> ResumeState:
    return ResumeState(
        tuple(token for delta in deltas for token in delta.token_ids),
        sum(len(delta.prompt_logprobs) for delta in deltas),
        deltas[-1].num_cached_tokens if deltas else 0,
    )


@pytest.mark.parametrize("new", REQUESTS, ids=lambda new: new.request_id)
def test_any_death_between_two_steps_changes_nothing(new: NewRequest) -> None:
    whole = alone(new)
    deltas = deltas_of(new, budget=4)
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    for num_seen in range(len(deltas)):
        rest = deltas_of(replace(new, resume=resume_state(deltas[:num_seen])), budget=7)
        joined = [*deltas[:num_seen], *rest]
        assert [token for delta in joined for token in delta.token_ids] == whole.token_ids
        assert [item for delta in joined for item in delta.logprobs] == whole.logprobs
        assert [item for delta in joined for item in delta.prompt_logprobs] == whole.prompt_logprobs
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == (whole.finish_reason, whole.stop_reason)


def test_the_cached_tokens_of_the_first_run_are_reported() -> None:
    harness = Harness()
    prompt = range(1, 12)
    harness.add(new_request("first", prompt))
    harness.drain(20)
    harness.add(replace(new_request("resumed", prompt, max_tokens=5), resume=ResumeState((5, 6), 0, 3)))
    while harness.scheduler.has_work:
        assert all(delta.num_cached_tokens == 3 for delta in harness.step())


@pytest.mark.parametrize("num_given", [4, 5, 60])
def test_what_has_all_its_tokens_is_refused(num_given: int) -> None:
    new = new_request("done", [1, 2, 3], max_tokens=4)
    with pytest.raises(InvalidRequestError, match="all its tokens"):
        Harness().scheduler.add(replace(new, resume=ResumeState((1,) * num_given)))


def test_a_request_as_long_as_the_model_allows_is_refused() -> None:
    new = new_request("done", [1, 2, 3], max_tokens=100)
    harness = Harness(max_model_len=8)
    with pytest.raises(InvalidRequestError, match="all its tokens"):
        harness.scheduler.add(replace(new, resume=ResumeState((1,) * 5)))
    harness.add(replace(new, resume=ResumeState((1,) * 4)))
    harness.drain(1)
    assert len(harness.outputs["done"].token_ids) == 1
