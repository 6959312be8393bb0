"""The scheduler as a state machine: anything may happen in any order, and all laws hold after each call.

`Harness` checks the invariants, the one-final automaton, the records and the order at every call; the fake
executor checks every plan against its own copy of rows and cache. At the end all requests must end within
the number of steps that the proof in `scheduler.py` gives, and each must have had the output that it has
when it is alone.
"""

from dataclasses import replace
from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from quire.core.request import NewRequest, SamplingSpec
from tests.core.harness import VOCAB_SIZE, Harness, Output, alone

MAX_MODEL_LEN = 24
PREFIXES = (tuple(range(12)), (*range(6), *range(20, 26)), (7,) * 12)

tokens = st.integers(0, VOCAB_SIZE - 1)


@st.composite
def requests(draw: st.DrawFn) -> NewRequest:
    prefix = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 12))]
    prompt = (*prefix, *draw(st.lists(tokens, min_size=0 if prefix else 1, max_size=4)))
    return NewRequest(
        request_id="",
        prompt_token_ids=prompt,
        max_tokens=draw(st.integers(1, 12)),
        sampling=SamplingSpec(
            seed=draw(st.integers(0, 2)),
            min_tokens=draw(st.integers(0, 3)),
            stop_token_ids=draw(st.sampled_from([(), (), (3,), (5, 8)])),
            num_logprobs=draw(st.sampled_from([None, None, 0])),
            num_prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        ),
        eos_token_ids=draw(st.sampled_from([(), (3,)])),
        priority=draw(st.integers(0, 2)),
        cache_salt=draw(st.sampled_from(["", "", "salt"])),
        is_background=draw(st.booleans()),
    )


@cache
def solo(new: NewRequest) -> Output:
    return alone(new, max_model_len=MAX_MODEL_LEN)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        spare_blocks=st.integers(0, 6),
        max_num_seqs=st.integers(1, 5),
        budget=st.sampled_from([1, 3, 7, 64]),
        policy=st.sampled_from(["fcfs", "priority"]),
        prefix_caching=st.booleans(),
        overlap=st.booleans(),
    )
    def start(self, block_size: int, spare_blocks: int, **limits: object) -> None:
        num_blocks = MAX_MODEL_LEN // block_size + spare_blocks
        self.harness = Harness(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=MAX_MODEL_LEN,
            fails=lambda request_id, position: request_id.endswith("!") and position == 9,
            **limits,  # type: ignore[arg-type]
        )

    @rule(new=requests(), fails=st.booleans())
    def add(self, new: NewRequest, fails: bool) -> None:
        name = f"{len(self.harness.outputs)}{'!' if fails else ''}"
        self.harness.add(replace(new, request_id=name))

    @rule()
    def step(self) -> None:
        self.harness.step()

    @rule(count=st.integers(2, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @precondition(lambda self: self.harness.outputs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.outputs))))

    @precondition(lambda self: self.harness.outputs)
    @rule(data=st.data())
    def abort_in_flight(self, data: st.DataObject) -> None:
        self.harness.settle()
        plan = self.harness.schedule()
        self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.outputs))))
        result = self.harness.executor.execute(plan)
        self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.outputs))))
        self.harness.update(plan, result)

    @rule(count=st.integers(2, 4))
    def steps_in_flight(self, count: int) -> None:
        self.harness.settle()
        plans = [self.harness.schedule() for _ in range(count)]
        for plan in plans:
            self.harness.update(plan, self.harness.executor.execute(plan))

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        outputs = self.harness.outputs.values()
        unfinished = [output.new for output in outputs if output.finish_reason is None]
        work = sum(len(new.prompt_token_ids) + new.max_tokens for new in unfinished)
        by_priority = self.harness.scheduler._policy.order.__qualname__.startswith("Priority")
        overtakes = by_priority or any(new.is_background for new in unfinished)
        self.harness.drain(work * (len(unfinished) if overtakes else 1))
        for output in outputs:
            self.compare(output)

    @staticmethod
    def compare(output: Output) -> None:
        new = output.new
        expected = solo(replace(new, request_id="", priority=0, cache_salt="", is_background=False))
        num_tokens = len(output.token_ids)
        assert output.token_ids == expected.token_ids[:num_tokens]
        assert output.logprobs == expected.logprobs[:num_tokens]
        assert output.prompt_logprobs == expected.prompt_logprobs[: len(output.prompt_logprobs)]
        if output.finish_reason == "error":
            assert new.request_id.endswith("!")
            assert num_tokens <= max(0, 10 - len(new.prompt_token_ids))
        elif output.finish_reason != "abort":
            assert output.sequence == expected.sequence


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
