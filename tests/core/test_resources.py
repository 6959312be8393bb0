"""Truth of resources: after 2,000 random adds, aborts and steps nothing is left over."""

import random

import pytest

from tests.core.harness import Harness, new_request


@pytest.mark.parametrize(("policy", "prefix_caching"), [("fcfs", True), ("priority", True), ("fcfs", False)])
def test_nothing_is_left_over(policy: str, prefix_caching: bool) -> None:
    dice = random.Random(20)
    harness = Harness(
        num_blocks=20,
        block_size=2,
        max_num_seqs=6,
        budget=12,
        policy=policy,
        prefix_caching=prefix_caching,
        fails=lambda request_id, position: position == 20 and int(request_id) % 7 == 0,
    )
    for _ in range(2000):
        draw = dice.random()
        live = [name for name, output in harness.outputs.items() if output.finish_reason is None]
        if draw < 0.3 and len(live) < 40:
            prompt = [1] * dice.randrange(8) + [dice.randrange(13) for _ in range(dice.randrange(1, 8))]
            max_tokens = dice.randrange(1, 20)
            name, priority = str(len(harness.outputs)), dice.randrange(3)
            harness.add(new_request(name, prompt, max_tokens, priority=priority, stop_token_ids=(4,)))
        elif draw < 0.4 and live:
            harness.abort(dice.choice(live))
        else:
            harness.step()
    harness.drain(40 * 40 * 40)
    reasons = {output.finish_reason for output in harness.outputs.values()}
    assert reasons == {"stop", "length", "abort", "error"}
    assert harness.num_preemptions > 10
    scheduler = harness.scheduler
    assert not scheduler._requests and not scheduler._in_flight and not scheduler._waiting._queues
    assert sorted(scheduler._free_rows) == list(range(6))


def test_a_queue_of_the_aborted_does_not_grow() -> None:
    """The head cannot enter, so that no dead entry behind it ever comes up; they are swept all the same."""
    harness = Harness(max_num_seqs=1)
    harness.add(new_request("runs", [1], max_tokens=50))
    harness.step()
    harness.add(new_request("head", [1], max_tokens=1))
    for number in range(300):
        harness.add(new_request(str(number), [1], max_tokens=1))
        harness.abort(str(number))
        assert sum(len(queue.heap) for queue in harness.scheduler._waiting._queues.values()) <= 3
    assert harness.scheduler.num_waiting == 1
    harness.drain(50)
