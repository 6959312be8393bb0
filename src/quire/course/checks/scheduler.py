"""Checks of exercise 2.2: random requests, step by step, against what must hold; then sixty requests, simulated.

The same invariants hold for `quire.core.scheduler` (tests/core/harness.py).
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from quire.core.limits import SchedulerConfig
from quire.core.plan import ScheduledRow
from quire.course.checking import Check, Failed, said, shown, smallest
from quire.observe.arrivals import SHAREGPT, made_up
from quire.observe.replay import Asked, Session, read
from quire.observe.reservations import simulate_reserved
from quire.observe.simulate import Outcome, Times, arrivals, simulate
from quire.observe.step_cost import StepCost, fit

NUM_CASES = 100
RULES = ("plan", "order", "decode", "full", "ends")


@dataclass(frozen=True, slots=True)
class _Coming:
    """A request: when it comes, its prompt, its answer, and when its client leaves."""

    step: int
    prompt: int
    output: int
    leaves: int | None = None

    def __str__(self) -> str:
        leaves = "" if self.leaves is None else f", its client leaves before step {self.leaves}"
        return f"prompt {self.prompt}, answer {self.output}, comes before step {self.step}{leaves}"


@dataclass(frozen=True, slots=True)
class _Case:
    max_num_seqs: int
    budget: int
    requests: tuple[_Coming, ...]

    def __str__(self) -> str:
        requests = "; ".join(f"{_name(number)}: {one}" for number, one in enumerate(self.requests))
        return f"Scheduler({self.max_num_seqs}, {self.budget}), {requests}"


@dataclass(slots=True)
class _State:
    """What is true of a request."""

    known: int
    left: int
    computed: int = 0

    @property
    def lacks(self) -> int:
        return self.known - self.computed


def _name(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"r{number}"


class _Watched:
    """A scheduler, watched at every step. Only breaches of `rules` are said."""

    def __init__(self, module: ModuleType, max_num_seqs: int, budget: int, rules: Iterable[str] = RULES) -> None:
        self._path = str(module.__file__)
        self._rows, self._budget, self._rules = max_num_seqs, budget, frozenset(rules)
        self._scheduler = self._ask(lambda: module.Scheduler(max_num_seqs, budget))
        self.open: dict[str, _State] = {}
        """In the order in which they came."""
        self.begun: list[str] = []

    def _ask(self, asked: Any) -> Any:
        try:
            return asked()
        except Exception as error:
            raise Failed(said(error, self._path)) from error

    def add(self, name: str, prompt: int, output: int) -> None:
        self.open[name] = _State(prompt, output)
        self._ask(lambda: self._scheduler.add(name, prompt))

    def leave(self, name: str) -> None:
        """Its client has left."""
        if self.open.pop(name, None) is not None:
            self.begun = [one for one in self.begun if one != name]
            self._ask(lambda: self._scheduler.update([], [name]))

    def step(self) -> tuple[list[ScheduledRow], list[str], list[str]]:
        """One step: what was computed, who has a token more, and who ended with it."""
        plan = self._ask(self._scheduler.schedule)
        self._check_plan(plan)
        ran = [name for name in self.begun]
        self.begun += [name for name in self.open if name in plan and name not in ran]
        self._check_choice(plan, ran)
        rows, sampled, ended = list[ScheduledRow](), list[str](), list[str]()
        for name, count in plan.items():
            state = self.open[name]
            samples = state.lacks == count
            rows.append(ScheduledRow(len(rows), state.computed, count, (), samples))
            state.computed += count
            if samples:
                state.known += 1
                state.left -= 1
                sampled.append(name)
                if state.left == 0:
                    ended.append(name)
        for name in ended:
            del self.open[name]
        self.begun = [name for name in self.begun if name in self.open]
        self._ask(lambda: self._scheduler.update(list(sampled), list(ended)))
        return rows, sampled, ended

    def _require(self, rule: str, holds: bool, text: str) -> None:
        if not holds and rule in self._rules:
            raise Failed(text)

    def _check_plan(self, plan: Any) -> None:
        """What no other rule can do without."""
        if not isinstance(plan, dict) or not all(type(count) is int for count in plan.values()):
            raise Failed(f"the plan is {shown(plan)}, expected request -> tokens")
        for name, count in plan.items():
            if name not in self.open:
                raise Failed(f"the plan {shown(plan)} has {shown(name)}, which has ended or never came")
            lacks = self.open[name].lacks
            if not 1 <= count <= lacks:
                raise Failed(f"the plan {shown(plan)} computes {count} tokens of {name}, which lacks {lacks}")
        total = sum(plan.values())
        if total > self._budget:
            raise Failed(f"the plan {shown(plan)} computes {total} tokens; the budget is {self._budget}")
        running = set(self.begun) | plan.keys()
        if len(running) > self._rows:
            raise Failed(f"with the plan {shown(plan)} {len(running)} requests run; max_num_seqs is {self._rows}")

    def _check_choice(self, plan: dict[str, int], ran: list[str]) -> None:
        spent, waiting = sum(plan.values()), [name for name in self.open if name not in self.begun]
        shows = f"the plan {shown(plan)}"
        self._require(
            "ends", bool(plan) or not self.open, f"the plan is empty, and {shown(list(self.open))} have not ended"
        )
        last = max((place for place, name in enumerate(self.open) if name in self.begun), default=-1)
        overtaken = [name for place, name in enumerate(self.open) if place < last and name in waiting]
        self._require(
            "order", not overtaken, f"{shows} lets {self.begun[-1:]} begin before {overtaken[:1]}, which came earlier"
        )
        late = [name for name in ran if self.open[name].lacks == 1 and name not in plan]
        self._require("decode", not late, f"{shows} leaves out {late[:1]}, which lacks one token")
        begins = bool(waiting) and len(self.begun) < self._rows
        text = f"{shows} leaves {self._budget - spent} tokens of the budget, and {waiting[:1]} could begin"
        self._require("full", spent == self._budget or not begins, text)
        short = [name for name in ran if plan.get(name, 0) < self.open[name].lacks]
        text = f"{shows} leaves {self._budget - spent} tokens of the budget, and {short[:1]} lacks more than it gets"
        self._require("full", spent == self._budget or not short, text)


def _run(module: ModuleType, case: _Case, rules: Iterable[str]) -> None:
    watched = _Watched(module, case.max_num_seqs, case.budget, rules)
    most = sum(one.prompt + one.output for one in case.requests) + max(one.step for one in case.requests) + 1
    for step in range(most):
        try:
            for number, one in enumerate(case.requests):
                if one.step == step:
                    watched.add(_name(number), one.prompt, one.output)
                if one.leaves == step:
                    watched.leave(_name(number))
            watched.step()
        except Failed as error:
            raise Failed(f"step {step}: {error}") from error
    if watched.open and "ends" in rules:
        raise Failed(
            f"after {most} steps {shown(list(watched.open))} have not ended: that is more than there are tokens"
        )


def _smaller(case: _Case) -> Iterator[_Case]:
    requests = case.requests
    if len(requests) > 1:
        for place in range(len(requests)):
            yield replace(case, requests=requests[:place] + requests[place + 1 :])
    for place, one in enumerate(requests):
        for changed in (
            *(replace(one, prompt=size) for size in (1, one.prompt // 2, one.prompt - 1) if 1 <= size < one.prompt),
            *(replace(one, output=size) for size in (1, one.output - 1) if 1 <= size < one.output),
            *(replace(one, step=0, leaves=one.leaves and 1) for _ in range(1) if one.step),
            *(replace(one, leaves=None) for _ in range(1) if one.leaves is not None),
        ):
            yield replace(case, requests=(*requests[:place], changed, *requests[place + 1 :]))
    if case.max_num_seqs > 1:
        yield replace(case, max_num_seqs=case.max_num_seqs - 1)
    if case.budget > case.max_num_seqs:
        yield replace(case, budget=case.budget - 1)


def _random_case(rng: random.Random, number: int, leaving: bool) -> _Case:
    rows, requests = rng.randint(1, 4), []
    for _ in range(1 + number * 8 // NUM_CASES):
        step = rng.choice((0, rng.randint(0, 12)))
        leaves = step + rng.randint(1, 6) if leaving and rng.random() < 0.4 else None
        requests.append(_Coming(step, rng.choice((1, rng.randint(1, 30))), rng.randint(1, 8), leaves))
    return _Case(rows, rows + rng.choice((0, rng.randint(0, 12))), tuple(sorted(requests, key=lambda one: one.step)))


def _cases(module: ModuleType, rules: Iterable[str], leaving: bool = False) -> str:
    def problem(case: _Case) -> str | None:
        try:
            _run(module, case, rules)
        except Failed as error:
            return f"{case}: {error}"
        return None

    rng = random.Random(0)
    for number in range(NUM_CASES):
        text = smallest(_random_case(rng, number, leaving), _smaller, problem)
        if text is not None:
            raise Failed(text)
    return f"{NUM_CASES} random loads"


def within_budget(module: ModuleType) -> str:
    """a plan has what is lacking, within the budget and max_num_seqs"""
    return _cases(module, ("plan",))


def all_end(module: ModuleType) -> str:
    """every request ends"""
    return _cases(module, ("plan", "ends"))


def in_order(module: ModuleType) -> str:
    """requests begin in the order in which they came"""
    return _cases(module, ("plan", "order"))


def decode_first(module: ModuleType) -> str:
    """no answer waits for a prompt"""
    return _cases(module, ("plan", "decode"))


def continuous(module: ModuleType) -> str:
    """no budget is left where a request lacks tokens or could begin"""
    return _cases(module, ("plan", "full"))


def leaving(module: ModuleType) -> str:
    """clients that leave, running or waiting, give up their place"""
    return _cases(module, RULES, leaving=True)


COST = StepCost(0.0165, 0.00017, 0.0, 5.3e-7)
"""OPT-13B on an A100, as in `quire simulate`."""
ROWS, BUDGET, LONGEST, BLOCK = 32, 512, 1024, 16
REQUESTS = (60, 4.0)
"""How many, and how many a second."""
MOST_RECORDED = 1000
"""Requests of a recording."""
LEAST = 0.95
"""Of the tokens a second of Quire's scheduler."""


def simulated(module: ModuleType) -> str:
    """made-up arrivals like those of ShareGPT, beside static batches and Quire's own scheduler"""
    config = SchedulerConfig(ROWS, BUDGET, LONGEST, BLOCK, ROWS * LONGEST // BLOCK)
    session = Session(config, "fcfs", False, 0, 0.0)
    rates, table = _beside(module, session, made_up(SHAREGPT, *REQUESTS, LONGEST), COST)
    if rates["yours"] < LEAST * rates["Quire"]:
        raise Failed(f"it gives fewer tokens a second than Quire's own scheduler\n{table}")
    return f"{REQUESTS[0]} requests\n{table}"


def recorded(path: str) -> Check:
    """A check with the arrivals, the settings and the time of steps of a recording (`quire serve --record`).

    Raises:
        ConfigurationError: it is none, or has too few steps.
    """
    sessions = read(path)
    requests, (cost, _) = arrivals(sessions)[:MOST_RECORDED], fit(sessions)

    def played(module: ModuleType) -> str:
        """arrivals of the recording, beside static batches and Quire's own scheduler"""
        return f"{len(requests)} requests\n{_beside(module, sessions[0], requests, cost)[1]}"

    return played


def _beside(
    module: ModuleType, session: Session, requests: list[Asked], cost: StepCost
) -> tuple[dict[str, float], str]:
    """Tokens a second of each, and a table."""
    config = session.config
    found = {
        "static batches": simulate_reserved(config, requests, cost, "reserve-oracle", "static"),
        "yours": _simulate(module, config, requests, cost),
        "Quire": simulate(session, requests, cost),
    }
    numbers = {name: outcome.numbers() for name, outcome in found.items()}
    lines = [f"{'':16}{'tok/s':>8}{'TTFT p50 s':>12}{'TPOT p99 ms':>13}{'rows in use':>13}"]
    for name, one in numbers.items():
        in_use = one["mean_running"] / config.max_num_seqs
        first, later = one["ttft_p50_s"], one["tpot_p99_s"] * 1e3
        lines.append(f"{name:16}{one['output_tokens_per_s']:8.1f}{first:12.2f}{later:13.1f}{in_use:13.0%}")
    return {name: one["output_tokens_per_s"] for name, one in numbers.items()}, "\n".join(lines)


def _simulate(module: ModuleType, config: SchedulerConfig, requests: list[Asked], cost: StepCost) -> Outcome:
    """As `quire.observe.simulate`, with the learner's scheduler, whose memory has no end."""
    rows = config.max_num_seqs
    watched = _Watched(module, rows, max(rows, config.max_num_batched_tokens), ("plan", "ends"))
    outcome, coming = Outcome(), deque(requests)
    now_s = start_s = requests[0].arrival_s
    while coming or watched.open:
        if not watched.open:
            now_s = max(now_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now_s:
            one = coming.popleft()
            outcome.times[one.number] = Times(one.arrival_s)
            watched.add(str(one.number), one.prompt, one.num_output)
        computed, sampled, ended = watched.step()
        seconds = cost.seconds(computed)
        outcome.row_seconds += (len(watched.begun) + len(ended)) * seconds
        outcome.num_steps += 1
        now_s += seconds
        for name in sampled:
            outcome.times[int(name)].took(1, now_s)
    outcome.duration_s = now_s - start_s
    return outcome


CHECKS: tuple[Check, ...] = (within_budget, all_end, in_order, decode_first, continuous, leaving, simulated)
