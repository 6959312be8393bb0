"""Orders and the waiting queue."""

import random

import pytest

from quire.core.fair_shares import FairShares
from quire.core.policy import Fcfs, Policy, Priority, WaitingQueue, make_policy
from quire.core.request import Request, RequestStatus
from quire.errors import ConfigurationError
from tests.core.harness import new_request


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
