"""A scheduler and the suspicious fake executor, watched at every call.

After each call the invariants are checked, each request's deltas are held against the one-final automaton,
and each record must explain every request that did not advance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.core.admission import AdmissionRule
from quire.core.limits import SchedulerConfig
from quire.core.plan import StepPlan, StepResult, TokenDelta, TokenLogprobs
from quire.core.policy import make_policy
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.request import NewRequest, Request, SamplingSpec
from quire.core.scheduler import Scheduler
from quire.executor.fake import FakeExecutor

KEY = bytes(range(32))
VOCAB_SIZE = 13


def new_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 4,
    *,
    priority: int = 0,
    salt: str = "",
    eos: tuple[int, ...] = (),
    **sampling: object,
) -> NewRequest:
    """A request with few words; further names are those of `SamplingSpec`."""
    spec = SamplingSpec(**sampling)  # type: ignore[arg-type]
    return NewRequest(request_id, tuple(prompt), max_tokens, spec, eos, priority, salt)


@dataclass
class Output:
    """All deltas of one request, put together."""

    new: NewRequest
    arrival: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None

    def take(self, delta: TokenDelta) -> None:
        assert self.finish_reason is None, f"a delta after the final: {delta}"
        assert delta.token_ids or delta.prompt_logprobs or delta.finish_reason, f"nothing new: {delta}"
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.num_cached_tokens = delta.num_cached_tokens
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.error = delta.error

    @property
    def sequence(self) -> tuple[object, ...]:
        """What must not depend on the company that the request had."""
        tokens = self.token_ids, self.logprobs, self.prompt_logprobs
        return *tokens, self.finish_reason, self.stop_reason, self.error


class Harness:
    """One engine under watch. Its keyword arguments are the limits, with small defaults. With `overlap` each step is
    scheduled before the result of the last one is taken in."""

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        max_model_len: int | None = None,
        policy: str = "fcfs",
        prefix_caching: bool = True,
        key: bytes = KEY,
        vocab_size: int = VOCAB_SIZE,
        overlap: bool = False,
        fails: Callable[[str, int], bool] = lambda request_id, position: False,
        rules: Sequence[AdmissionRule] = (),
    ) -> None:
        self.overlap = overlap
        self._before: tuple[StepPlan, StepResult] | None = None
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len or num_blocks * block_size,
            block_size=block_size,
            num_blocks=num_blocks,
        )
        cache = PrefixCache(key) if prefix_caching else NullPrefixCache()
        self.scheduler = Scheduler(config, make_policy(policy), cache, rules)
        self.executor = FakeExecutor(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            vocab_size=vocab_size,
            fails=fails,
        )
        self.outputs: dict[str, Output] = {}
        self.num_steps = 0
        self.num_preemptions = 0

    def add(self, new: NewRequest) -> None:
        self.scheduler.add(new)
        self.outputs[new.request_id] = Output(new, len(self.outputs))
        self.scheduler.check()

    def abort(self, request_id: str) -> list[TokenDelta]:
        return self._emit(self.scheduler.abort(request_id))

    def schedule(self) -> StepPlan:
        before = {request.new.request_id for request in self.scheduler._running}
        plan = self.scheduler.schedule(float(self.num_steps))
        self.num_steps += 1
        self.scheduler.check()
        self._check_record(plan, before)
        self._check_order(plan)
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        return self._emit(self.scheduler.update(plan, result))

    def step(self) -> list[TokenDelta]:
        """One step, which must advance a request if there is any that is not held."""
        had_work = self.scheduler.has_work
        plan = self.schedule()
        assert bool(plan.scheduled) == had_work or self._before is not None or self.scheduler.is_held
        started = plan, self.executor.execute(plan)
        if not self.overlap:
            return self.update(*started)
        before, self._before = self._before, started
        return self.update(*before) if before is not None else []

    def settle(self) -> None:
        """Take in what is in flight."""
        before, self._before = self._before, None
        if before is not None:
            self.update(*before)

    def drain(self, max_steps: int) -> None:
        """Step until all is done, which must take no more than `max_steps`."""
        for _ in range(2 * max_steps + 1 if self.overlap else max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"still at work after {max_steps} steps"
        self.check_empty()

    def check_empty(self) -> None:
        """Nothing is left over: no row, no block, not one request without its final."""
        assert all(output.finish_reason is not None for output in self.outputs.values())
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        pool = self.scheduler._pool
        assert pool.num_free == pool.num_blocks
        self.settle()
        plan = self.scheduler.schedule()  # takes the last rows out of the executor
        self.scheduler.update(plan, self.executor.execute(plan))
        assert self.executor.num_rows == 0
        self.scheduler.check()

    def order(self, request_id: str) -> tuple[bool, int, int]:
        output = self.outputs[request_id]
        by_priority = type(self.scheduler._policy).__name__ == "Priority"
        background = output.new.is_background
        return background, output.new.priority if by_priority and not background else 0, output.arrival

    def _is_background(self, request_id: str) -> bool:
        return self.outputs[request_id].new.is_background

    def _emit(self, deltas: list[TokenDelta]) -> list[TokenDelta]:
        for delta in deltas:
            self.outputs[delta.request_id].take(delta)
        self.scheduler.check()
        return deltas

    def _check_record(self, plan: StepPlan, ran_before: set[str]) -> None:
        record = self.scheduler.last_record
        advanced = [item.request_id for item in record.scheduled]
        stalled = {item.request_id: item for item in record.stalled}
        running = {request.new.request_id for request in self.scheduler._running}
        held = self.scheduler._waiting.held.keys()
        waiting = sorted(set(map(_id, self.scheduler._waiting)) - held, key=self.order)
        assert [(s.start, s.num_tokens) for s in plan.scheduled] == [s[1:] for s in record.scheduled]
        assert len(set(advanced)) == len(advanced) and len(stalled) == len(record.stalled)
        assert not stalled.keys() & set(advanced)
        assert stalled.keys() | set(advanced) == running | ran_before | held | set(waiting[:1])
        preempted = {name for name, item in stalled.items() if item.reason == "preempted"}
        assert preempted == ran_before - running
        takers = {stalled[name].by for name in preempted if not self._is_background(name)}
        assert takers <= set(advanced)
        others = {name for name in running if not self._is_background(name)}
        assert not others & ran_before or not any(map(self._is_background, advanced)), "the background waits"
        assert plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
        assert (record.num_running, record.num_waiting) == (len(running), len(waiting) + len(held))
        assert record.num_prefix_hits <= record.num_prefix_queries
        self.num_preemptions += len(preempted)

    def _check_order(self, plan: StepPlan) -> None:
        """No request is overtaken by admission, and victims come from the end."""
        entered = [self.order(new.request_id) for new in plan.new]
        held = self.scheduler._waiting.held
        waiting = [self.order(name) for name in map(_id, self.scheduler._waiting) if name not in held]
        assert entered == sorted(entered)
        assert not entered or not waiting or max(entered) < min(waiting)
        record = self.scheduler.last_record
        victims = [item for item in record.stalled if item.reason == "preempted"]
        running = [self.order(_id(request)) for request in self.scheduler._running]
        for item in victims:
            assert self.order(item.request_id) > max(running)
            assert item.by is not None and self.order(item.by) < self.order(item.request_id)
            assert not plan.new or self._is_background(item.request_id)


def _id(request: Request) -> str:
    return request.new.request_id


def alone(new: NewRequest, **limits: object) -> Output:
    """The output of a request that has an engine for itself, with room for everything and no cache."""
    harness = Harness(num_blocks=64, budget=4096, prefix_caching=False, **limits)  # type: ignore[arg-type]
    harness.add(new)
    harness.drain(len(new.prompt_token_ids) + new.max_tokens)
    return harness.outputs[new.request_id]
