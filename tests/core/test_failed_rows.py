"""What a failed row leaves in the cache reaches no other request: not one that shares its blocks, not one that shares
the blocks of such a one, not one that comes later. The judge is each request alone in a fresh engine."""

import random
from dataclasses import replace
from functools import cache

import pytest

from quire.core.plan import StepPlan, StepResult
from quire.core.request import NewRequest
from tests.core.harness import VOCAB_SIZE, Harness, Output, alone, new_request

FAILS = "!"


@cache
def undisturbed(new: NewRequest) -> Output:
    return alone(new, max_model_len=48)


def same_as_alone(output: Output) -> bool:
    """Whether a request, or what there is of it, has the output that it has alone."""
    expected = undisturbed(replace(output.new, request_id=""))
    if output.finish_reason in ("abort", "error"):
        num_tokens = len(output.token_ids)
        return output.token_ids == expected.token_ids[:num_tokens] and output.logprobs == expected.logprobs[:num_tokens]
    return output.sequence == expected.sequence


class Storm:
    """Random requests whose prompts begin alike; some fail, some are aborted while their steps are in flight."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.depth = rng.randint(1, 3)
        """Steps in flight."""
        self.harness = Harness(
            num_blocks=rng.choice([14, 20, 40]),
            block_size=4,
            max_num_seqs=rng.randint(2, 6),
            budget=rng.choice([3, 6, 16, 40]),
            max_model_len=48,
            fails=lambda request_id, position: request_id.endswith(FAILS) and position == int(request_id.split()[1]),
        )
        self.stem = [rng.randrange(VOCAB_SIZE) for _ in range(26)]
        self.flights: list[tuple[StepPlan, StepResult]] = []
        self.num_errors = 0

    def prompt(self) -> list[int]:
        rng = self.rng
        return self.stem[: rng.randint(1, len(self.stem))] + [
            rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 6))
        ]

    def add(self, may_fail: bool) -> None:
        rng, number = self.rng, len(self.harness.outputs)
        fails_at = rng.randint(0, 30) if may_fail and rng.random() < 0.3 else None
        name = f"{number}" if fails_at is None else f"{number} {fails_at} {FAILS}"
        logprobs = rng.choice([None, 0])
        self.harness.add(
            new_request(name, self.prompt(), rng.randint(1, 12), seed=rng.randint(0, 2), num_logprobs=logprobs)
        )

    def step(self) -> None:
        plan = self.harness.schedule()
        self.flights.append((plan, self.harness.executor.execute(plan)))
        if self.rng.random() < 0.2:
            live = [name for name, output in self.harness.outputs.items() if output.finish_reason is None]
            self.harness.abort(self.rng.choice(live)) if live else None
        while len(self.flights) >= self.depth:
            self.land()

    def land(self) -> None:
        plan, result = self.flights.pop(0)
        self.num_errors += sum(row.error is not None for row in result.rows)
        self.harness.update(plan, result)

    def settle(self) -> None:
        for _ in range(2000):
            if not self.harness.scheduler.has_work:
                break
            self.step()
        while self.flights:
            self.land()
        self.harness.check_empty()


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_what_failed_rows_leave_reaches_no_request(first: int) -> None:
    num_errors = num_later = num_hits = 0
    for seed in range(first, first + 40):
        storm = Storm(seed)
        for _ in range(30):
            for _ in range(storm.rng.randint(0, 2)):
                storm.add(may_fail=True)
            storm.step()
        storm.settle()
        disturbed = len(storm.harness.outputs)
        for _ in range(15):
            storm.add(may_fail=False)
            storm.settle()
        outputs = list(storm.harness.outputs.values())
        wrong = [output.new.request_id for output in outputs if not same_as_alone(output)]
        assert not wrong, (seed, wrong)
        num_errors += storm.num_errors
        num_later += len(outputs) - disturbed
        num_hits += sum(output.num_cached_tokens > 0 for output in outputs[disturbed:])
    assert num_errors > 100 and num_later == 600 and num_hits > 300
