"""Fair sharing between callers: bounded differences of service, weights, no saved claims, no caller starved."""

import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from quire.core import fair_shares
from quire.core.fair_shares import OUTPUT_TOKEN_COST, UNIT, FairShares
from quire.core.request import NewRequest
from quire.errors import InvalidRequestError
from tests.core.harness import Harness, alone, new_request


class Fair(Harness):
    """A harness whose callers are in the names of requests (`caller.number`), which counts what each was given."""

    def __init__(self, **limits: object) -> None:
        super().__init__(**limits)  # type: ignore[arg-type]
        self.service: Counter[str] = Counter()
        self.first_step: dict[str, int] = {}

    def ask(self, name: str, num_prompt: int, max_tokens: int, *, weight: int = 1, priority: int = 0) -> NewRequest:
        prompt = [random.Random(name).randrange(13) for _ in range(num_prompt)]
        new = new_request(name, prompt, max_tokens, priority=priority)
        new = replace(new, caller=name.partition(".")[0], caller_weight=weight)
        self.add(new)
        return new

    def step(self) -> list[object]:  # type: ignore[override]
        deltas = super().step()
        for item in self.scheduler.last_record.scheduled:
            new = self.outputs[item.request_id].new
            if item.request_id not in self.first_step:
                self.first_step[item.request_id] = self.num_steps
                self.service[new.caller] += len(new.prompt_token_ids)
        for delta in deltas:
            self.service[self.outputs[delta.request_id].new.caller] += OUTPUT_TOKEN_COST * len(delta.token_ids)
        return list(deltas)

    def _check_order(self, plan: object) -> None:
        """Callers overtake each other here: only the order of victims holds, which the scheduler checks itself."""

    def _check_record(self, plan: object, ran_before: set[str]) -> None:
        """As above: the head of the queue is the fair one."""


@pytest.mark.parametrize("seed", range(5))
def test_service_differs_by_a_constant_while_both_wait(seed: int) -> None:
    """The paper's bound: twice the larger of the longest prompt's cost and the cost of all tokens that run."""
    dice = random.Random(seed)
    fair = Fair(num_blocks=32, max_num_seqs=4, prefix_caching=False)
    for number in range(60):
        fair.ask(f"short.{number}", dice.randint(1, 4), dice.randint(1, 4))
        fair.ask(f"long.{number}", dice.randint(8, 20), dice.randint(4, 12))
    bound = 2 * max(20, OUTPUT_TOKEN_COST * 4 * 12)
    widest = 0
    while {new.new.caller for new in fair.scheduler._waiting} == {"short", "long"}:
        fair.step()
        widest = max(widest, abs(fair.service["short"] - fair.service["long"]))
    assert fair.service["short"] > 200, "they competed for a while"
    assert widest <= bound


def test_weights_divide_the_service() -> None:
    fair = Fair(num_blocks=32, max_num_seqs=4, prefix_caching=False)
    for number in range(200):
        fair.ask(f"gold.{number}", 4, 6, weight=3)
        fair.ask(f"plain.{number}", 4, 6)
    while {new.new.caller for new in fair.scheduler._waiting} == {"gold", "plain"}:
        fair.step()
    assert 2.7 < fair.service["gold"] / fair.service["plain"] < 3.3


def test_a_flood_does_not_keep_another_out() -> None:
    fair = Fair(num_blocks=32, max_num_seqs=2)
    for number in range(50):
        fair.ask(f"flood.{number}", 6, 4)
    for _ in range(20):
        fair.step()
    fair.ask("guest.0", 6, 4)
    before = fair.num_steps
    while "guest.0" not in fair.first_step:
        fair.step()
    assert fair.num_steps - before <= 6, "as soon as one of the two rows came free"


def test_a_caller_that_asks_again_while_it_waits_keeps_its_claim() -> None:
    """Each new request of the guest finds one of its own in the queue: it is no return from idleness."""
    fair = Fair(num_blocks=32, max_num_seqs=1, prefix_caching=False)
    for number in range(100):
        fair.ask(f"flood.{number}", 6, 4)
    for number in range(120):
        fair.ask(f"guest.{number}", 6, 4)
        fair.step()
    assert abs(fair.service["guest"] - fair.service["flood"]) <= 2 * (6 + OUTPUT_TOKEN_COST * 4)


def test_hits_in_the_prefix_cache_cost_nothing() -> None:
    fair = Fair(num_blocks=32, max_num_seqs=2, block_size=4)
    fair.ask("a.0", 13, 1)
    fair.step()
    again = replace(fair.outputs["a.0"].new, request_id="b.0", caller="b")
    fair.add(again)
    before = fair.scheduler._shares["b"]
    fair.step()
    assert fair.outputs["b.0"].num_cached_tokens == 12
    assert fair.scheduler._shares["b"] - before == (1 + OUTPUT_TOKEN_COST) * UNIT


def test_no_caller_saves_up_claims() -> None:
    fair = Fair(num_blocks=32, max_num_seqs=1, prefix_caching=False)
    for number in range(60):
        fair.ask(f"busy.{number}", 6, 4)
    for _ in range(120):
        fair.step()
    served = fair.service["busy"]
    for number in range(30):
        fair.ask(f"late.{number}", 6, 4)
    while fair.service["late"] < 140:
        fair.step()
    assert fair.service["busy"] - served >= 100, "the late one takes turns; it is not paid for its silence"


def test_a_caller_that_waits_comes_first_in_the_end() -> None:
    """A long request of one caller is not overtaken for ever by the short ones of others."""
    fair = Fair(num_blocks=8, max_num_seqs=4, budget=8)
    fair.ask("a.0", 3, 5)
    fair.ask("patient.0", 20, 3)
    for number in range(1, 40):
        fair.ask(f"{'abc'[number % 3]}.{number}", 3, 3)
        fair.step()
        if "patient.0" in fair.first_step:
            break
    assert "patient.0" in fair.first_step


def test_priority_goes_before_fairness() -> None:
    fair = Fair(policy="priority", max_num_seqs=1)
    fair.ask("a.0", 3, 2)
    fair.step()
    fair.ask("b.1", 3, 2, priority=1)
    fair.ask("a.2", 3, 2, priority=0)
    while fair.scheduler.has_work:
        fair.step()
    assert fair.first_step["a.2"] < fair.first_step["b.1"]


def test_answers_do_not_depend_on_callers() -> None:
    dice = random.Random(7)
    fair = Fair(num_blocks=16, max_num_seqs=3, budget=8)
    asked = [fair.ask(f"{dice.choice('abc')}.{n}", dice.randint(1, 9), dice.randint(1, 9)) for n in range(24)]
    while fair.scheduler.has_work:
        fair.step()
    for new in asked:
        assert fair.outputs[new.request_id].sequence == alone(new).sequence


@pytest.mark.parametrize("weight", [0, -1, 1001])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(InvalidRequestError, match="weight"):
        Fair().ask("a.0", 2, 2, weight=weight)


def test_counters_of_the_idle_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_shares, "MAX_COUNTERS", 8)
    shares, one = FairShares(), new_request("x", [1])
    for number in range(100):
        shares.arrive(str(number), ())
        shares.charge_prompt(replace(one, caller=str(number)), 5)
    assert len(shares._counters) <= 9
    shares.arrive("0", ())
    assert shares["0"] == shares._floor, "what is forgotten is the same as lifted"


class Paper:
    """Algorithm 2 of the paper, in fractions; nothing is forgotten."""

    def __init__(self) -> None:
        self.counters: dict[str, Fraction] = {}
        self.waiting: Counter[str] = Counter()
        self.floor = Fraction(0)

    def arrive(self, caller: str) -> None:
        if not self.waiting[caller]:
            lift = min((self.counters[other] for other in +self.waiting), default=self.floor)
            self.counters[caller] = max(self.counters.get(caller, Fraction(0)), lift)
        self.waiting[caller] += 1

    def serve(self, caller: str, weight: int, num_prompt: int, num_output: int) -> None:
        self.waiting[caller] -= 1
        self.counters[caller] += Fraction(num_prompt, weight)
        self.floor = max(self.floor, self.counters[caller])
        self.counters[caller] += Fraction(2 * num_output, weight)


@pytest.mark.parametrize("max_counters", [4096, 3])
@pytest.mark.parametrize("seed", range(4))
def test_counters_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch, seed: int, max_counters: int) -> None:
    """Of all callers that wait, also when the counters of idle callers are forgotten."""
    monkeypatch.setattr(fair_shares, "MAX_COUNTERS", max_counters)
    dice, shares, paper, one = random.Random(seed), FairShares(), Paper(), new_request("x", [1])
    weights = {caller: dice.choice([1, 1, 3, 7]) for caller in "abcdefgh"}
    num_seen = 0
    for _ in range(2000):
        caller = dice.choice("abcdefgh")
        if dice.random() < 0.5:
            shares.arrive(caller, list(+paper.waiting))
            paper.arrive(caller)
        elif paper.waiting[caller]:
            num_prompt, num_output = dice.randint(1, 20), dice.randint(0, 20)
            new = replace(one, caller=caller, caller_weight=weights[caller])
            shares.charge_prompt(new, num_prompt)
            shares.charge_output(new, num_output)
            paper.serve(caller, weights[caller], num_prompt, num_output)
        if dice.random() < 0.02:  # a rest: all that wait are served
            for other in list(paper.waiting.elements()):
                shares.charge_prompt(replace(one, caller=other), 2)
                paper.serve(other, 1, 2, 0)
        for other in +paper.waiting:
            assert float(paper.counters[other]) == pytest.approx(shares[other] / UNIT, abs=0.01)
            num_seen += 1
    assert num_seen > 1000


def widest_difference(fair: Fair, first: str, second: str) -> int:
    """Of the service that two callers are given from now on, while both have requests waiting."""
    before, widest = dict(fair.service), 0
    while {first, second} <= {new.new.caller for new in fair.scheduler._waiting}:
        fair.step()
        given = [fair.service[name] - before.get(name, 0) for name in (first, second)]
        widest = max(widest, abs(given[0] - given[1]))
    assert min(given) > 2 * BOUND, "they competed for a while"
    return widest


BOUND = 2 * max(6, OUTPUT_TOKEN_COST * 2 * 4)
"""The paper's, for prompts of 6 tokens, 2 rows and 4 tokens of output."""


@pytest.mark.parametrize("other_weight", [1, 4])
def test_work_that_no_other_wanted_is_not_held_against_a_caller(other_weight: int) -> None:
    """One caller had the engine to itself, then another one: from the moment at which both wait they share it."""
    fair = Fair(num_blocks=64, max_num_seqs=2, prefix_caching=False)
    for name, count, weight in (("early", 60, 1), ("other", 5, other_weight), ("early", 0, 1)):
        for number in range(count):
            fair.ask(f"{name}.{fair.num_steps}.{number}", 6, 4, weight=weight)
        while fair.scheduler.has_work:
            fair.step()
    for number in range(60):
        fair.ask(f"early.again.{number}", 6, 4)
        fair.ask(f"other.again.{number}", 6, 4)
    assert widest_difference(fair, "early", "other") <= BOUND


def test_callers_that_pass_by_change_nothing_between_two_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many counters are forgotten meanwhile: those of callers that wait, or that run and come back, hold."""
    monkeypatch.setattr(fair_shares, "MAX_COUNTERS", 4)
    fair = Fair(num_blocks=64, max_num_seqs=2, prefix_caching=False)
    for number in range(40):
        fair.ask(f"one.{number}", 6, 4)
    while fair.service["one"] < 20 * BOUND // 8:
        fair.step()
    for number in range(80):
        fair.ask(f"one.late.{number}", 6, 4)
        fair.ask(f"two.{number}", 6, 4)
        fair.ask(f"passing{number}.0", 1, 1)
        fair.ask(f"passing{number + 1000}.0", 1, 1)
    assert widest_difference(fair, "one", "two") <= BOUND
    assert len(fair.scheduler._shares._counters) <= 170, "no more than have waited at one time"


def test_more_than_4096_callers_are_distinguished_where_it_matters() -> None:
    """Each comes once and is served; a caller that waits keeps its counter, and so do those ahead of it."""
    shares, one = FairShares(), new_request("x", [1])
    waiting, ahead = replace(one, caller="waiting"), replace(one, caller="ahead")
    for new in (waiting, ahead):
        shares.arrive(new.caller, ())
    shares.charge_output(waiting, 10**6)
    shares.charge_output(ahead, 10**7)
    counters = {"waiting": shares["waiting"], "ahead": shares["ahead"]}
    assert counters == {"waiting": 2 * 10**6 * fair_shares.UNIT, "ahead": 2 * 10**7 * fair_shares.UNIT}
    for number in range(3 * fair_shares.MAX_COUNTERS):
        passing = f"passing.{number}"
        shares.arrive(passing, ("waiting",))
        assert shares[passing] == counters["waiting"], "lifted to the one that waits, and no further"
    assert {name: shares[name] for name in counters} == counters
    assert len(shares._counters) <= fair_shares.MAX_COUNTERS + 1


def test_a_caller_that_comes_back_at_once_keeps_what_it_was_given() -> None:
    """One has a long queue of small requests; the other has one large request at a time, and the next one ready."""
    fair = Fair(num_blocks=64, max_num_seqs=2, prefix_caching=False)
    for number in range(150):
        fair.ask(f"steady.{number}", 2, 2)
    number = widest = 0
    while any(request.new.caller == "steady" for request in fair.scheduler._waiting):
        if number == 0 or fair.outputs[f"large.{number - 1}"].finish_reason:
            fair.ask(f"large.{number}", 20, 8)
            number += 1
        fair.step()
        widest = max(widest, fair.service["large"] - fair.service["steady"])
    assert number > 5 and widest <= 2 * (20 + OUTPUT_TOKEN_COST * 8)


def test_a_caller_is_lifted_as_the_paper_says() -> None:
    """c(u) becomes max(c(u), min over those that wait); where no caller waits, the counter of the one served last."""
    shares, one = FairShares(), new_request("x", [1])
    for name, num_tokens in (("low", 10), ("high", 1000), ("back", 500)):
        shares.charge_output(replace(one, caller=name), num_tokens)
    unit = fair_shares.UNIT * OUTPUT_TOKEN_COST
    for name, waiting, expected in (
        ("new", ("low", "high"), 10),
        ("back", ("low", "high"), 500),
        ("other", ("low", "high"), 10),
        ("back", ("high",), 1000),
    ):
        shares.arrive(name, waiting)
        assert shares[name] == expected * unit, name
    shares.charge_prompt(replace(one, caller="low"), 2000)
    shares.arrive("late", ())
    assert shares["late"] == shares["low"] == 1010 * unit
