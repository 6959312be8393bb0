"""Orders and the waiting queue."""

import random
from dataclasses import replace

import pytest

from quire.core.fair_shares import FairShares
from quire.core.policy import Fcfs, Policy, Priority, WaitingQueue, make_policy
from quire.core.request import Request, RequestStatus
from quire.errors import ConfigurationError
from tests.core.harness import Harness, alone, new_request


def request(arrival_index: int, priority: int = 0) -> Request:
    new = new_request(str(arrival_index), [1], priority=priority)
    return Request(new, [1], arrival_index, max_num_tokens=5, stop_token_ids=frozenset())


@pytest.mark.parametrize("policy", [Fcfs(), Priority()])
def test_the_queue_agrees_with_a_sorted_list(policy: Policy) -> None:
    dice = random.Random(3)
    queue, oracle = WaitingQueue(policy, FairShares()), []
    for arrival_index in range(400):
        draw = dice.random()
        if draw < 0.5 or not oracle:
            new = request(arrival_index, dice.randrange(4))
            queue.push(new)
            oracle.append(new)
        elif draw < 0.75:
            ended = oracle.pop(dice.randrange(len(oracle)))
            ended.status = RequestStatus.FINISHED
            queue.discard(ended)
        else:
            oracle.sort(key=policy.order)
            head = queue.head()
            assert head is oracle[0]
            queue.pop(head)
            head.status = RequestStatus.RUNNING
            del oracle[0]
        assert len(queue) == len(oracle)
        assert {item.arrival_index for item in queue} == {item.arrival_index for item in oracle}


def test_priority_then_arrival() -> None:
    requests = [request(0, 3), request(1, -2), request(2, 3), request(3, 0)]
    assert [item.arrival_index for item in sorted(requests, key=Priority().order)] == [1, 3, 0, 2]
    assert [item.arrival_index for item in sorted(requests, key=Fcfs().order)] == [0, 1, 2, 3]


def test_policies_have_names() -> None:
    assert isinstance(make_policy("fcfs"), Fcfs) and isinstance(make_policy("priority"), Priority)
    with pytest.raises(ConfigurationError, match=r"unknown scheduling policy 'priorty'.*'priority'") as caught:
        make_policy("priorty")
    assert caught.value.field == "scheduling_policy"


def test_the_background_gives_way_and_comes_back() -> None:
    """It keeps what it holds while others run, gives it up to one that lacks it, and ends with the same tokens."""
    harness = Harness(num_blocks=8, block_size=4, max_num_seqs=2)
    lines = [replace(new_request(f"line {number}", [number, 2, 3], 8), is_background=True) for number in range(2)]
    for line in lines:
        harness.add(line)
    for _ in range(3):
        harness.step()
    assert {item.request_id for item in harness.scheduler.last_record.scheduled} == {"line 0", "line 1"}
    harness.add(new_request("live", [5, 5], 6))
    harness.step()  # what computes the background takes nothing from it
    while harness.outputs["live"].finish_reason is None:
        harness.step()
        record = harness.scheduler.last_record
        assert [item.request_id for item in record.scheduled] == ["live"]
        assert {item.reason for item in record.stalled} <= {"background", "preempted"}
    assert harness.num_preemptions == 1, "one row was lacking"
    harness.drain(40)
    for new in [*lines, new_request("live", [5, 5], 6)]:
        assert harness.outputs[new.request_id].sequence == alone(replace(new, is_background=False)).sequence


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_background_enters_last(policy: str) -> None:
    harness = Harness(max_num_seqs=1, policy=policy)
    harness.add(replace(new_request("line", [1], 2), is_background=True))
    harness.add(new_request("live", [1], 2, priority=3 if policy == "priority" else 0))
    harness.step()
    assert [item.request_id for item in harness.scheduler.last_record.scheduled] == ["live"]
    harness.drain(9)
