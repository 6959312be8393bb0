"""The seam of admission rules: a request that a rule holds waits, the record has the reason, and nothing starves."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from quire.core.limits import SchedulerConfig
from quire.core.policy import Fcfs
from quire.core.prefix_cache import NullPrefixCache
from quire.core.request import Request, RequestStatus
from quire.core.scheduler import Scheduler
from quire.executor.fake import FakeExecutor
from tests.core.harness import VOCAB_SIZE, Harness, alone, new_request


class Compiling:
    """A throw-away rule: requests wait until their names are in `done`, as for a grammar."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.asked: list[str] = []

    def ready(self, request: Request) -> str | None:
        name = request.new.request_id
        self.asked.append(name)
        return None if name in self.done or not name.startswith("held") else "grammar"


class InOrder(Fcfs):
    """First come, first served, to the letter."""

    waits_for_held = True


def reasons(harness: Harness) -> dict[str, str]:
    return {item.request_id: item.reason for item in harness.scheduler.last_record.stalled}


def test_a_held_request_is_passed_and_enters_when_its_rule_lets_it() -> None:
    rule = Compiling()
    harness = Harness(rules=[rule])
    for name in ("held", "other", "late"):
        harness.add(new_request(name, [1, 2, 3], 6))
    harness.step()
    assert reasons(harness) == {"held": "grammar"}
    assert [item.request_id for item in harness.scheduler.last_record.scheduled] == ["other", "late"]
    assert not harness.scheduler.is_held and harness.scheduler.num_waiting == 1
    harness.step()
    assert reasons(harness) == {"held": "grammar"}
    rule.done.add("held")
    harness.step()
    assert [item.request_id for item in harness.scheduler.last_record.scheduled] == ["other", "late", "held"]
    harness.drain(20)
    for output in harness.outputs.values():
        assert output.sequence == alone(output.new).sequence


def test_a_released_request_keeps_its_place() -> None:
    """It is ready while no row is free: the next row is its own, though another came and waited before it was ready."""
    rule = Compiling()
    harness = Harness(rules=[rule], max_num_seqs=1)
    for name in ("first", "held", "third"):
        harness.add(new_request(name, [1, 2], 3))
    harness.step()
    assert reasons(harness) == {"held": "no_row"}, "its turn has not come: no rule was asked"
    harness.step()
    harness.step()
    harness.step()
    assert reasons(harness) == {"held": "grammar"}
    assert [item.request_id for item in harness.scheduler.last_record.scheduled] == ["third"]
    harness.add(new_request("fourth", [3, 4], 3))
    rule.done.add("held")
    harness.step()
    assert reasons(harness) == {"held": "no_row"}
    order = []
    while harness.scheduler.has_work:
        harness.step()
        order += [item.request_id for item in harness.scheduler.last_record.scheduled if item.start == 0]
    assert order == ["held", "fourth"]
    harness.check_empty()


def test_a_policy_may_let_nothing_pass() -> None:
    rule = Compiling()
    harness = Harness(rules=[rule])
    harness.scheduler._policy = harness.scheduler._waiting._policy = InOrder()
    harness.add(new_request("before", [1, 2], 3))
    harness.add(new_request("held", [1, 2], 3))
    harness.add(new_request("behind", [1, 2], 3))
    harness.step()
    assert reasons(harness) == {"held": "grammar"} and harness.scheduler.num_running == 1
    rule.done.add("held")
    harness.step()
    assert harness.scheduler.num_running == 3
    harness.drain(20)


@pytest.mark.parametrize("overlap", [False, True])
def test_all_may_be_held(overlap: bool) -> None:
    """The steps are empty meanwhile, and the request can be aborted."""
    rule = Compiling()
    harness = Harness(rules=[rule], overlap=overlap)
    harness.add(new_request("held 1", [1, 2], 3))
    harness.add(new_request("held 2", [1, 2, 3], 3))
    for _ in range(3):
        plan = harness.schedule()
        harness.update(plan, harness.executor.execute(plan))
        assert not plan.scheduled and harness.scheduler.is_held
        assert reasons(harness) == {"held 1": "grammar", "held 2": "grammar"}
    (final,) = harness.abort("held 1")
    assert final.finish_reason == "abort" and harness.scheduler.is_held
    rule.done.add("held 2")
    harness.drain(20)
    assert not harness.scheduler.is_held


class Raising(Compiling):
    """Raises for requests named `bad`: at once, or once they have been held for a while."""

    def __init__(self, num_held: int) -> None:
        super().__init__()
        self.num_held = num_held

    def ready(self, request: Request) -> str | None:
        if request.new.request_id.startswith("bad"):
            self.num_held -= 1
            if self.num_held < 0:
                raise RuntimeError("the text of this error is nobody else's")
            return "grammar"
        return super().ready(request)


@pytest.mark.parametrize("num_held", [0, 3])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_rule_that_raises_fails_its_request_alone(
    num_held: int, overlap: bool, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness(rules=[Raising(num_held)], overlap=overlap)
    if strict:
        harness.scheduler._policy = harness.scheduler._waiting._policy = InOrder()
    for name in ("before", "bad", "bad too", "behind"):
        harness.add(new_request(name, [1, 2, 3], 6))
    harness.drain(40)
    for name in ("bad", "bad too"):
        output = harness.outputs[name]
        assert output.finish_reason == "error" and output.error is not None
        assert "RuntimeError" in output.error and "nobody" not in output.error
    assert sum("an admission rule failed" in record.message for record in caplog.records) >= 2
    for name in ("before", "behind"):
        assert harness.outputs[name].sequence == alone(harness.outputs[name].new).sequence


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_whose_rule_raised_may_be_aborted_in_that_step(overlap: bool) -> None:
    harness = Harness(rules=[Raising(0)], overlap=overlap)
    harness.add(new_request("bad", [1, 2], 3))
    plan = harness.schedule()
    (final,) = harness.abort("bad")
    harness.update(plan, harness.executor.execute(plan))
    assert final.finish_reason == "abort"
    harness.check_empty()


def test_the_rules_are_asked_again_after_preemption() -> None:
    rule = Compiling()
    rule.done.update(("held 1", "held 2"))
    harness = Harness(rules=[rule], num_blocks=6, max_model_len=24)
    harness.add(new_request("held 1", [1, 2, 3], 16))
    harness.add(new_request("held 2", [4, 5, 6], 16))
    while harness.num_preemptions == 0:
        harness.step()
    rule.done.remove("held 2")
    while "held 1" not in {name for name, output in harness.outputs.items() if output.finish_reason}:
        harness.step()
    assert reasons(harness) == {"held 2": "grammar"}
    rule.done.add("held 2")
    harness.drain(40)
    assert harness.outputs["held 2"].sequence == alone(harness.outputs["held 2"].new).sequence


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nothing_starves(policy: str) -> None:
    """Requests become ready at random times, while blocks and rows are short and others never cease to come."""
    for seed in range(12):
        dice, rule = random.Random(seed), Compiling()
        harness = Harness(rules=[rule], num_blocks=10, max_num_seqs=3, policy=policy, overlap=bool(seed % 2))
        ready_at: dict[str, int] = {}
        for number in range(120):
            if number < 60:
                name = ("held " if dice.random() < 0.4 else "") + str(number)
                ready_at[name] = number + dice.randrange(40)
                prompt = [dice.randrange(9) for _ in range(dice.randint(1, 9))]
                harness.add(new_request(name, prompt, dice.randint(1, 6), priority=dice.randrange(2)))
            rule.done.update(name for name, at in ready_at.items() if at <= number)
            harness.step()
        harness.drain(600)
        for output in harness.outputs.values():
            assert output.sequence == alone(output.new).sequence


def test_a_held_caller_saves_up_no_claim() -> None:
    """While the requests of `a` are held, those of `b` are served; then they take turns."""
    rule, entered = Compiling(), []
    scheduler = Scheduler(SchedulerConfig(1, 16, 16, 4, 4), Fcfs(), NullPrefixCache(), [rule])
    executor = FakeExecutor(num_blocks=4, block_size=4, max_num_seqs=1, vocab_size=VOCAB_SIZE)
    for number in range(10):
        scheduler.add(replace(new_request(f"held {number}", [1, 2, 3, 4], 2), caller="a"))
        scheduler.add(replace(new_request(str(number), [1, 2, 3, 4], 2), caller="b"))
    for step in range(32):
        if step == 12:
            rule.done.update(f"held {number}" for number in range(10))
        plan = scheduler.schedule()
        entered += [new.request_id[0] for new in plan.new]
        scheduler.update(plan, executor.execute(plan))
        scheduler.check()
    assert "h" not in entered[:6] and [name == "h" for name in entered[6:14]] == [True, False] * 4


class Slots:
    """A rule over something scarce, which keeps its contract: one adapter at a time, a slot is free when no request
    that uses it runs; once it has refused a request, those that come after it wait until it had its turn."""

    def __init__(self) -> None:
        self.users: list[Request] = []
        self.refused: Request | None = None

    def ready(self, request: Request) -> str | None:
        self.users = [one for one in self.users if one.status is RequestStatus.RUNNING or one is request]
        if self.refused is not None and self.refused.status is not RequestStatus.WAITING:
            self.refused = None
        running = {one.new.cache_salt for one in self.users if one.status is RequestStatus.RUNNING}
        is_behind = self.refused is not None and request.arrival_index > self.refused.arrival_index
        if is_behind or not running <= {request.new.cache_salt}:
            if self.refused is None or request.arrival_index < self.refused.arrival_index:
                self.refused = request
            return "adapter_slot"
        self.users.append(request)
        return None


def test_a_stream_of_others_does_not_starve_a_request_for_a_slot() -> None:
    """Requests of adapter A come in every step and would keep the one slot for ever; one of adapter B has its turn."""
    harness = Harness(rules=[Slots()], num_blocks=64, max_num_seqs=4)
    entered: list[str] = []
    for number in range(30):
        harness.add(new_request(f"a{number}", [1, 2], 3, salt="A"))
        if number == 3:
            harness.add(new_request("b", [1, 2], 3, salt="B"))
        harness.step()
        entered += [new for new in map(_name, harness.scheduler.last_record.scheduled) if new not in entered]
    assert "b" in entered[:8] and entered.index("b") < entered.index("a5")
    harness.drain(200)


def _name(item: Sequence[object]) -> str:
    return str(item[0])


def test_no_rules_ask_nothing() -> None:
    scheduler = Scheduler(SchedulerConfig(2, 8, 8, 4, 4), Fcfs(), NullPrefixCache())
    scheduler.add(new_request("held", [1], 2))
    assert len(scheduler.schedule().scheduled) == 1 and not scheduler.is_held
