"""The oracle must see what is wrong: each test hands it a plan that a faulty scheduler could make."""

from dataclasses import replace

import pytest

from quire.core.plan import NewRow, ScheduledRow, StepPlan
from quire.core.request import SamplingSpec
from quire.executor.fake import FakeExecutor
from tests.core.harness import new_request


def executor() -> FakeExecutor:
    return FakeExecutor(num_blocks=4, block_size=2, max_num_seqs=2, vocab_size=13)


def enter(row: int, token_ids: tuple[int, ...], block_ids: tuple[int, ...]) -> NewRow:
    return NewRow(row, f"r{row}", token_ids, len(token_ids), SamplingSpec(), block_ids)


GOOD = StepPlan(0, (), (enter(0, (1, 2, 3), (0, 1)),), (ScheduledRow(0, 0, 3, (), True),))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (replace(GOOD, step_id=1), "step 0 comes next"),
        (replace(GOOD, removed=(1,)), "row 1 is removed but was not held"),
        (replace(GOOD, new=GOOD.new * 2), "row 0 is taken"),
        (replace(GOOD, new=(GOOD.new[0]._replace(row=2),)), "there is no row 2"),
        (replace(GOOD, new=()), "row 0 is scheduled but was not entered"),
        (replace(GOOD, scheduled=GOOD.scheduled * 2), "scheduled twice"),
        (replace(GOOD, scheduled=(ScheduledRow(0, 0, 4, (), True),)), "is not known"),
        (replace(GOOD, scheduled=(ScheduledRow(0, 0, 0, (), False),)), "is not known"),
        (replace(GOOD, scheduled=(ScheduledRow(0, 0, 2, (), True),)), "samples at its last token"),
        (replace(GOOD, scheduled=(ScheduledRow(0, 0, 3, (), False),)), "samples at its last token"),
        (replace(GOOD, new=(enter(0, (1, 2, 3), (0,)),)), "too few blocks"),
        (replace(GOOD, new=(enter(0, (1, 2, 3), (0, 0)),)), "block 0 holds another text"),
        (replace(GOOD, scheduled=(ScheduledRow(0, 2, 1, (), True),)), "block 0 holds another text"),
    ],
)
def test_a_wrong_plan_is_seen(plan: StepPlan, message: str) -> None:
    executor().execute(GOOD)
    with pytest.raises(AssertionError, match=message):
        executor().execute(plan)


def test_a_start_that_does_not_continue_is_seen() -> None:
    fake = executor()
    fake.execute(GOOD)
    with pytest.raises(AssertionError, match="starts at 2, not 3"):
        fake.execute(StepPlan(1, (), (), (ScheduledRow(0, 2, 2, (), True),)))


def test_a_slot_overwritten_by_another_row_is_seen() -> None:
    fake = executor()
    fake.execute(GOOD)
    new = enter(1, (9,), (1,))
    plan = StepPlan(1, (), (new,), (ScheduledRow(0, 3, 1, (), True), ScheduledRow(1, 0, 1, (), True)))
    with pytest.raises(AssertionError, match="request r0: block 1 holds another text"):
        fake.execute(plan)


def test_a_block_shared_with_equal_text_is_right() -> None:
    fake = executor()
    fake.execute(GOOD)
    new = enter(1, (1, 2, 7), (0, 2))
    assert fake.execute(StepPlan(1, (), (new,), (ScheduledRow(1, 2, 1, (), True),))).rows[0].token_ids


def test_tokens_depend_on_seed_and_text() -> None:
    def first_token(token_ids: tuple[int, ...], seed: int) -> tuple[int, ...]:
        fake = FakeExecutor(num_blocks=4, block_size=2, max_num_seqs=2, vocab_size=1 << 30)
        sampling = new_request("a", token_ids, seed=seed).sampling
        new = enter(0, token_ids, (3, 1))._replace(sampling=sampling)
        return fake.execute(replace(GOOD, new=(new,))).rows[0].token_ids

    tokens = [first_token((1, 2, 3), 0), first_token((1, 2, 3), 1), first_token((1, 5, 3), 0)]
    assert len(set(tokens)) == 3
    assert first_token((1, 2, 3), 0) == tokens[0]
