"""Decides what each step computes.

There are no phases. A request is `num_computed` chasing `num_known`; prefill in chunks, decode, a
prefix hit and the way back after preemption are all that one case. A step

1. gives each running request, in policy order, the tokens it lacks as far as the budget lasts, and the
   blocks they need; where none is left, the last running request gives up its own (`_advance_running`); what is
   in the background waits while anything else runs;
2. admits waiting requests while budget, rows and blocks last (`_admit_waiting`): those of one caller in policy
   order, callers among each other by fair shares.

**Admission.** A request enters when all tokens it knows, less what the prefix cache holds, fit the free
blocks with one block to spare for each request already running; it takes all these blocks at once. So an
admitted prompt never waits for blocks, and running requests need not preempt it as soon as they grow. The head of
the queue is never overtaken, and no request is admitted in a step that preempted. A request that an admission rule
refuses is held outside the queue (`quire.core.admission`).

**Progress.** While no step is in flight and not every request is held, every step computes something, and every
request ends:

- The first running request always advances: there is budget (at least one token), and if it needs a block it
  may take those of every other. Alone it has all `num_blocks`, and these hold `max_model_len` tokens.
- It is never preempted while it is first, so it ends, and then the next is first.
- When nothing runs, all rows and blocks are free, so the head of the queue is admitted.
- With a finite number of requests ordered before it, each request becomes first.
- A caller that waits is charged nothing while the others are: so it becomes the one that was given least.
"""

import logging
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from quire.core.admission import AdmissionRule, refusal
from quire.core.block_pool import BlockPool, require
from quire.core.fair_shares import MAX_WEIGHT, FairShares
from quire.core.limits import SchedulerConfig
from quire.core.plan import (
    RowResult,
    ScheduledRow,
    StepPlan,
    StepResult,
    TokenDelta,
)
from quire.core.policy import Policy, WaitingQueue
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.request import NewRequest, Request, RequestStatus
from quire.core.step import PlannedStep, make
from quire.errors import (
    InvalidRequestError,
    PromptTooLongError,
    ShapeError,
    internal_fault_message,
)


class Scheduler:
    """Owns all requests, rows and blocks. Deterministic: the same calls give the same plans.

    `schedule` and `update` need not alternate. A plan may be made while others are in flight: a token that one of
    them samples counts as known, since the executor has it by then. Where a request turns out to have ended with
    an earlier token, or to have failed, what later steps sampled for it is dropped. Every request that `add` accepted
    gets exactly one final `TokenDelta`: from `abort`, if that came first, otherwise from `update`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        prefix_cache: PrefixCache | NullPrefixCache,
        rules: Sequence[AdmissionRule] = (),
    ) -> None:
        self.config = config
        self._rules = rules
        self._policy = policy
        self._prefix_cache = prefix_cache
        self._pool = BlockPool(config.num_blocks, config.block_size, config.soft_block_limit)
        self.clear()

    def clear(self) -> None:
        """Forget all requests and all that was cached, in whatever state they are; the executor must do so as well.
        A call that was interrupted is repeated."""
        self._pool.clear()
        self._requests: dict[str, Request] = {}
        self._shares = FairShares()
        self._waiting = WaitingQueue(self._policy, self._shares)
        self._running: list[Request] = []
        """In policy order, always."""
        self._free_rows = list(reversed(range(self.config.max_num_seqs)))
        self._removed_rows: list[int] = []
        self._in_flight: dict[int, PlannedStep] = {}
        """Steps whose results are not back, in their order. Their owners are the requests that still want them."""
        self._lacks = False
        """The head lacks what the background holds."""
        self._num_arrived = 0
        self._num_steps = 0
        self.last_record = PlannedStep(0, 0).record(0.0, 0, 0, self._pool)
        """Of the last step; an empty one before the first."""

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def is_held(self) -> bool:
        """Whether every unfinished request is held by an admission rule, so that a step computes nothing."""
        return bool(self._waiting.held) and len(self._waiting.held) == len(self._requests)

    @property
    def num_steps(self) -> int:
        """Steps that were scheduled."""
        return self._num_steps

    @property
    def num_running(self) -> int:
        """Requests that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for admission, the preempted and the held included."""
        return len(self._waiting)

    @property
    def held_by_reason(self) -> tuple[tuple[str, int], ...]:
        """How many requests admission rules held in the last step, by the rule's word."""
        held = self._waiting.held
        if not held:
            return ()
        return tuple(Counter(item.reason for item in self.last_record.stalled if item.request_id in held).items())

    @property
    def cache_usage(self) -> float:
        """Share of the blocks that requests hold, in [0, 1]; what is only remembered does not count."""
        return 1.0 - self._pool.num_free / self._pool.num_blocks

    def add(self, new: NewRequest) -> None:
        """Queue a request. The caller has checked it; what would break the core is refused here again.

        Raises:
            InvalidRequestError: an id in use, no tokens, nothing left to generate, a caller's weight out of range.
            PromptTooLongError: the prompt leaves no room for a token.
        """
        num_prompt_tokens = len(new.prompt_token_ids)
        if new.request_id in self._requests:
            raise InvalidRequestError(f"request id {new.request_id!r} is in use", param="request_id")
        if not num_prompt_tokens or new.max_tokens < 1:
            raise InvalidRequestError("a request needs a prompt token and max_tokens of at least 1")
        num_given = len(new.resume.output_token_ids)
        if num_given >= new.max_tokens or (num_given and num_prompt_tokens + num_given >= self.config.max_model_len):
            raise InvalidRequestError("a request that has been given all its tokens cannot be resumed")
        if num_prompt_tokens >= self.config.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {num_prompt_tokens} tokens; max_model_len {self.config.max_model_len} "
                "must leave room for one more"
            )
        if not 1 <= new.caller_weight <= MAX_WEIGHT:
            raise InvalidRequestError(f"a caller's weight is between 1 and {MAX_WEIGHT}, got {new.caller_weight}")
        request = Request.of(new, self._num_arrived, self.config.max_model_len)
        self._num_arrived += 1
        self._requests[new.request_id] = request
        self._waiting.arrive(request)

    def abort(self, request_id: str) -> list[TokenDelta]:
        """End a request now. Returns its final delta; nothing when it is unknown or has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        self._end(request)
        return [_final_delta(request, "abort")]

    def schedule(self, now_s: float = 0.0) -> StepPlan:
        """Decide the next step. `now_s` is only written into the record."""
        step = self._in_flight[self._num_steps] = PlannedStep(self._num_steps, self.config.max_num_batched_tokens)
        self._num_steps += 1
        self._advance_running(step)
        self._lacks = False
        self._admit_waiting(step)
        plan = StepPlan(step.step_id, tuple(self._removed_rows), tuple(step.new), tuple(step.scheduled))
        self._removed_rows.clear()
        self.last_record = step.record(now_s, len(self._running), len(self._waiting), self._pool)
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in what a step gave; results of requests that ended or were preempted meanwhile are dropped."""
        require(result.step_id == plan.step_id, "a result answers its own plan")
        step = self._in_flight[plan.step_id]
        deltas: list[TokenDelta] = []
        failed = {row_result.row for row_result in result.rows if row_result.error is not None}
        if not failed <= step.void_rows:
            self._void(step, failed)
        for scheduled, row_result in zip(plan.scheduled, result.rows, strict=True):
            request = step.owners.get(scheduled.row)
            if request is not None:
                delta = self._apply(request, scheduled, row_result)
                if delta is not None:
                    deltas.append(delta)
        for request, error in step.failed:
            if request.status is not RequestStatus.FINISHED:
                self._end(request)
                deltas.append(_final_delta(request, "error", error))
        del self._in_flight[plan.step_id]
        return deltas

    # Step 1: running requests.

    def _advance_running(self, step: PlannedStep) -> None:
        # Victims are taken from the end of the list, which this loop has not reached: nothing that was
        # scheduled is ever taken back.
        for request in self._running:
            num_known = len(request.token_ids) + request.num_in_flight
            if num_known == request.max_num_tokens:
                num_known -= 1  # its last token is in flight, and nothing comes after that
            num_tokens = num_known - request.num_computed
            if num_tokens > step.budget:
                num_tokens = step.budget
            num_slots = len(request.block_ids) * self._pool.block_size
            if request.new.is_background and self._yields(request):
                step.stall(request, "background")
            elif step.budget == 0:
                step.stall_for_budget(request)
            elif num_tokens == 0 or (request.num_in_flight and request.new.needs_output_tokens):
                step.stall(request, "in_flight")
            elif request.num_computed + num_tokens <= num_slots:
                self._give(request, num_tokens, (), step)
            else:
                self._grow(request, num_tokens, step)

    def _yields(self, request: Request) -> bool:
        """What is in the background stands behind all others. While one of them runs it keeps its row and blocks, and
        gives them to one that lacks them: not in a step that computes it, but in the next."""
        if not self._running:
            return False
        head = self._waiting.head() if self._lacks else None
        return not self._running[0].new.is_background or (head is not None and not head.new.is_background)

    def _grow(self, request: Request, num_tokens: int, step: PlannedStep) -> None:
        """Give tokens that need new blocks, if there are any or room can be made."""
        held = len(request.block_ids)
        lacking = self._pool.blocks_for(request.num_computed + num_tokens) - held
        if self._make_room(request, lacking, step):
            request.block_ids += self._pool.take(lacking)
            self._give(request, num_tokens, tuple(request.block_ids[held:]), step)
        else:
            step.stall(request, "no_blocks")

    def _give(self, request: Request, num_tokens: int, new_block_ids: tuple[int, ...], step: PlannedStep) -> None:
        """Schedule tokens, and let the blocks that they fill be found at once: in each layer a step writes all its
        keys and values before it reads any, so a request admitted later in the same step can share them."""
        start = request.num_computed
        end = start + num_tokens
        step.give(request, num_tokens, new_block_ids)
        if end % self._pool.block_size < num_tokens and end <= len(request.token_ids):  # a block becomes full
            self._register(request, start, end)

    def _register(self, request: Request, start: int, end: int) -> None:
        """The blocks that tokens `[start, end)` fill can be found from now on: see `_void`."""
        self._prefix_cache.register(request, self._pool, start, end)
        size = self.config.block_size
        last = self._in_flight[self._num_steps - 1]
        last.registered += [(block_id, request) for block_id in request.block_ids[start // size : end // size]]

    def _make_room(self, request: Request, num_blocks: int, step: PlannedStep) -> bool:
        """Preempt from the end of the order until `num_blocks` are free.

        The last request has no other to preempt: it keeps what it has and waits, until blocks come free or a
        request before it takes its own.
        """
        while self._pool.num_free < num_blocks and self._running[-1] is not request:
            victim = self._running[-1]
            self._preempt(victim)
            step.victims.append(victim)
            step.stall(victim, "preempted", by=request.new.request_id)
        return self._pool.num_free >= num_blocks

    def _take_from_background(self, head: Request, step: PlannedStep) -> bool:
        """Let what is in the background give up row and blocks to the head; False where it has none to give now."""
        victim = self._running[-1] if self._running else head
        if head.new.is_background or not victim.new.is_background:
            return False
        if victim in step.owners.values():
            self._lacks = True
            return False
        self._preempt(victim)
        step.stall_once(victim, "preempted", by=head.new.request_id)
        return True

    def _preempt(self, victim: Request) -> None:
        """Back to its place in the queue. The prefix cache keeps its full blocks, so the way back is short."""
        self._vacate(victim)
        victim.status = RequestStatus.WAITING
        victim.num_computed = 0
        victim.num_preemptions += 1
        self._waiting.push(victim)

    # Step 2: waiting requests.

    def _admit_waiting(self, step: PlannedStep) -> None:
        if self._waiting.held:
            self._ask_about_held(step)
        while (request := self._waiting.head()) is not None:
            if step.victims:
                return None if request in step.victims else step.stall(request, "no_blocks")
            if request.new.is_background and self._yields(request):
                return step.stall_once(request, "background")
            if step.budget == 0:
                return step.stall_for_budget(request)
            if not self._free_rows and not self._take_from_background(request, step):
                return step.stall(request, "no_row")
            reason = self._refusal(request, step) if self._rules else None
            if reason is not None:
                step.stall(request, reason)
                if self._policy.waits_for_held:
                    return None
                self._waiting.hold(request)
                continue
            if not self._admit(request, step) and not self._take_from_background(request, step):
                return step.stall(request, "no_blocks")

    def _ask_about_held(self, step: PlannedStep) -> None:
        """Those that no rule refuses any more go back to the queue."""
        for request in [*self._waiting.held.values()]:
            reason = self._refusal(request, step)
            if reason is None:
                self._waiting.release(request)
            else:
                step.stall(request, reason)

    def _refusal(self, request: Request, step: PlannedStep) -> str | None:
        """Why a request may not enter. One for which a rule raises is refused, too, until `update` ends it."""
        try:
            return refusal(self._rules, request)
        except Exception as error:
            if not isinstance(error, ShapeError):
                logging.getLogger("quire.core").exception("an admission rule failed")
            step.failed.append((request, internal_fault_message(error)))
            return "rule_failed"

    def _admit(self, request: Request, step: PlannedStep) -> bool:
        """Let the head of the queue in, if its blocks and the reserve are there."""
        match = self._prefix_cache.match(request, self._pool)
        num_hits = len(match.block_ids) * self.config.block_size
        lacking = self._pool.blocks_for(len(request.token_ids)) - len(match.block_ids)
        reserve = len(self._running)
        if lacking + self._pool.num_unheld(match.block_ids) + reserve > self._pool.num_free:
            return False
        self._waiting.pop(request)
        self._pool.share(match.block_ids)
        request.block_ids = match.block_ids + self._pool.take(lacking)
        request.num_computed = num_hits
        if request.num_preemptions == 0 and not request.new.resume.output_token_ids:
            request.num_cached = num_hits
            self._shares.charge_prompt(request.new, len(request.token_ids) - num_hits)
        request.status = RequestStatus.RUNNING
        request.row = self._free_rows.pop()
        insort(self._running, request, key=self._policy.order)
        step.num_prefix_queries += match.num_tokens_queried
        step.num_prefix_hits += num_hits
        step.enter(request)
        self._give(request, min(len(request.token_ids) - num_hits, step.budget), (), step)
        return True

    # What a step gave.

    def _apply(self, request: Request, scheduled: ScheduledRow, result: RowResult) -> TokenDelta | None:
        """Take in the result of one row. Returns what is to be sent up, if there is anything."""
        row, start, _, _, samples = scheduled
        result_row, token_ids, logprobs, prompt_logprobs, error = result
        if result_row != row or (error is None and samples != bool(token_ids)):
            raise AssertionError(f"{result} does not answer {scheduled}")
        if error is not None:
            self._pool.forget(request.block_ids)
            self._end(request)
            return _final_delta(request, "error", error)
        if prompt_logprobs:
            prompt_logprobs = request.take_unsent(start, prompt_logprobs)
        if token_ids:
            self._shares.charge_output(request.new, len(token_ids))
            request.num_in_flight -= 1  # the others of several were forced, and in no step
        finish_reason = stop_reason = None
        for num_kept, token_id in enumerate(token_ids, 1):
            request.token_ids.append(token_id)
            if token_id in request.stop_token_ids or len(request.token_ids) == request.max_num_tokens:
                finish_reason, stop_reason = request.ending()
            if finish_reason is not None:
                token_ids, logprobs = token_ids[:num_kept], logprobs[:num_kept]
                self._end(request)
                break
            num_known = len(request.token_ids)
            if num_known % self._pool.block_size == 0 and num_known <= request.num_computed:
                # It was given while it was in flight: only now is it known what its block holds.
                self._register(request, num_known - 1, num_known)
        if not token_ids and not prompt_logprobs:
            return None
        name, cached = request.new.request_id, request.num_cached
        return make(TokenDelta, (name, token_ids, logprobs, prompt_logprobs, cached, finish_reason, stop_reason, None))

    # Leaving.

    def _void(self, step: PlannedStep, failed: set[int]) -> None:
        """Rows of a step failed, also rows whose requests have ended since: the blocks that they were to fill may hold
        anything, and so may every block that was computed from those, by whichever request.

        A block is shared at the earliest in the step that fills it, so all that is in doubt was registered since that
        step was scheduled. The prefix cache forgets all of it, and each request that holds such a block of another
        request is preempted: it computes again what it read."""
        fillers: dict[int, Request] = {}
        for later in self._in_flight.values():
            if later.step_id >= step.step_id:
                fillers.update(later.registered)
                later.registered.clear()
                later.void_rows |= {row for row in failed if later.owners.get(row) is step.owners.get(row)}
        self._pool.forget(fillers)
        for request in [*self._running]:
            has_failed = request.row in failed and step.owners.get(request.row) is request
            if not has_failed and any(fillers.get(block_id, request) is not request for block_id in request.block_ids):
                self._preempt(request)

    def _end(self, request: Request) -> None:
        """The request is finished: nothing of it stays but what the prefix cache remembers."""
        if request.status is RequestStatus.RUNNING:
            self._vacate(request)
            request.status = RequestStatus.FINISHED
        else:
            request.status = RequestStatus.FINISHED
            self._waiting.discard(request)
        del self._requests[request.new.request_id]

    def _vacate(self, request: Request) -> None:
        """Give back the row and the blocks of a running request; its results in flight are dropped."""
        place = bisect_left(self._running, self._policy.order(request), key=self._policy.order)
        if self._running[place] is not request or request.row is None:
            raise AssertionError(f"request {request.new.request_id} does not run")
        del self._running[place]
        for step in self._in_flight.values():
            step.owners.pop(request.row, None)
        self._removed_rows.append(request.row)
        self._free_rows.append(request.row)
        request.row = None
        request.num_in_flight = 0
        self._pool.release(request.block_ids)
        request.block_ids = []

    def give_back(self, *, keeps_cached: bool) -> list[tuple[int, int]]:
        """See `BlockPool.give_back`."""
        return self._pool.give_back(keeps_cached=keeps_cached)

    def check(self) -> None:
        """State what is always true between calls."""
        self._pool.check(request.block_ids for request in self._running)
        rows = [request.row for request in self._running]
        orders = [self._policy.order(request) for request in self._running]
        waiting = list(self._waiting)
        require(
            sorted([*self._free_rows, *(row for row in rows if row is not None)])
            == list(range(self.config.max_num_seqs)),
            "free rows and held rows are all rows",
        )
        require(all(before < after for before, after in pairwise(orders)), "running requests are in order")
        require(len(waiting) == len(self._waiting), "the queue knows its length")
        require(
            {id(request) for request in self._requests.values()}
            == {id(request) for request in [*self._running, *waiting]}
            and len(self._requests) == len(self._running) + len(waiting),
            "each request either runs or waits",
        )
        for request in waiting:
            idle = request.row is None and not request.block_ids and request.num_computed == 0
            require(idle, "a waiting request holds nothing")
        for request in self._running:
            require(request.status is RequestStatus.RUNNING, "a running request has that status")
            num_known = request.num_known
            require(len(request.token_ids) < request.max_num_tokens, "a request with all its tokens has ended")
            require(request.num_computed <= num_known <= request.max_num_tokens, "counts are in order")
            flights = sum(request in step.owners.values() for step in self._in_flight.values())
            require(0 <= request.num_in_flight <= flights, "what is in flight is in a step")
            num_blocks = len(request.block_ids)
            require(
                self._pool.blocks_for(request.num_computed) <= num_blocks <= self._pool.blocks_for(num_known),
                "blocks cover what is computed and nothing unknown",
            )
        for step in self._in_flight.values():
            require(all(request.row == row for row, request in step.owners.items()), "owners still run")


def _final_delta(request: Request, reason: str, error: str | None = None) -> TokenDelta:
    """The last delta of a request that ends without a token."""
    name, cached = request.new.request_id, request.num_cached
    return TokenDelta(name, (), num_cached_tokens=cached, finish_reason=reason, error=error)
