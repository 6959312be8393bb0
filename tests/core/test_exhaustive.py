"""Every interleaving of three requests on six blocks: a search through all states, not a sample of them.

Three requests with a common beginning compete for 6 blocks of 2 tokens, 3 rows and a budget of 4. From each
state every `add`, `abort` and `step` is tried until no new state appears. `Harness` and the fake executor
check every call; each state's outputs must be those of a run alone so far; and from each state, steps alone
must lead to the end within the bound of the proof in `scheduler.py`.
"""

from collections import Counter
from copy import deepcopy

import pytest

from tests.core.harness import Harness, alone, new_request

REQUESTS = {
    "a": new_request("a", [1, 2, 3], max_tokens=8, priority=1, seed=1),
    "b": new_request("b", [1, 2, 3, 4], max_tokens=7, priority=0, seed=2, num_prompt_logprobs=0),
    "c": new_request("c", [1, 2], max_tokens=9, priority=1, seed=3, stop_token_ids=(5,)),
}
WORK = sum(len(new.prompt_token_ids) + new.max_tokens for new in REQUESTS.values())
ALONE = {name: alone(new) for name, new in REQUESTS.items()}

Action = tuple[str, str]
State = tuple[object, ...]


def choices(harness: Harness) -> list[Action]:
    adds = [("add", name) for name in REQUESTS if name not in harness.outputs]
    aborts = [("abort", name) for name in harness.scheduler._requests]
    steps = [("step", "")] if harness.scheduler.has_work else []
    return [*adds, *aborts, *steps]


def after(harness: Harness, action: Action) -> Harness:
    verb, name = action
    harness = deepcopy(harness, {id(new): new for new in REQUESTS.values()})
    if verb == "add":
        harness.add(REQUESTS[name])
    elif verb == "abort":
        harness.abort(name)
    else:
        harness.step()
    return harness


def state(harness: Harness) -> State:
    """All that the future depends on."""
    scheduler, pool = harness.scheduler, harness.scheduler._pool
    live = tuple(
        (
            request.new.request_id,
            tuple(request.token_ids),
            request.num_computed,
            request.row,
            tuple(request.block_ids),
            request.num_prompt_logprobs_sent,
        )
        for request in scheduler._requests.values()
    )
    rows = tuple(scheduler._free_rows), tuple(scheduler._removed_rows)
    return live, frozenset(harness.outputs), rows, tuple(pool.free_blocks()), tuple(pool._hash_of)


def check_outputs(harness: Harness) -> None:
    for name, output in harness.outputs.items():
        if output.finish_reason in (None, "abort"):
            assert output.token_ids == ALONE[name].token_ids[: len(output.token_ids)]
            num_sent = len(output.prompt_logprobs)
            assert output.prompt_logprobs == ALONE[name].prompt_logprobs[:num_sent]
        else:
            assert output.sequence == ALONE[name].sequence


def check_progress(step_of: dict[State, State | None]) -> None:
    """Steps alone end every request: the longest way to a state without work is within the bound."""
    distance: dict[State, int] = {}
    for start in step_of:
        way: list[State] = []
        here: State | None = start
        while here is not None and here not in distance:
            way.append(here)
            assert len(way) <= WORK * len(REQUESTS), "steps go round in a circle"
            here = step_of[here]
        known = -1 if here is None else distance[here]
        for number, passed in enumerate(reversed(way), start=1):
            distance[passed] = known + number
    assert max(distance.values()) <= WORK * len(REQUESTS)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_every_interleaving(policy: str) -> None:
    start = Harness(num_blocks=6, block_size=2, max_num_seqs=3, budget=4, policy=policy)
    step_of: dict[State, State | None] = {state(start): None}
    frontier = [start]
    ends: Counter[str | None] = Counter()
    num_preempting = 0
    while frontier:
        harness = frontier.pop()
        for action in choices(harness):
            reached = after(harness, action)
            key = state(reached)
            if action[0] == "step":
                step_of[state(harness)] = key
            if key not in step_of:
                step_of[key] = None
                frontier.append(reached)
                check_outputs(reached)
                num_preempting += reached.num_preemptions > harness.num_preemptions
                ends.update(output.finish_reason for output in reached.outputs.values())
                if not reached.scheduler.has_work:
                    deepcopy(reached).check_empty()
    check_progress(step_of)
    assert len(step_of) > 1000 and num_preempting > 10
    assert min(ends[reason] for reason in (None, "abort", "length", "stop")) > 50
