"""The engine: checked requests in, `RequestOutput`s out, one step at a time.

It stands between text and the core, and it owns the requests: whether the core is in this process or in its own is
the channel's affair. It has no thread: `LLM` steps it in the caller's, `AsyncEngine` in one beside the event loop.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from quire.core.plan import StepRecord, TokenDelta
from quire.engine.channel import CoreChannel
from quire.engine.explain import Explanation, explain
from quire.engine.inputs import ParsedRequest
from quire.engine.metrics import EngineMetrics, core_metrics
from quire.engine.queue_bound import QueueBound
from quire.engine.request_state import RequestState
from quire.engine.timeline import RequestTimelines
from quire.errors import OverloadedError, internal_fault_message
from quire.outputs import CompletionOutput, Labels, Metric, RequestOutput
from quire.text.tokenizer import Tokenizer

logger = logging.getLogger("quire.engine")


class NumberedOutput(NamedTuple):
    """Output of the request that `InputProcessor` gave `number`."""

    number: int
    output: RequestOutput


class Engine:
    """Requests between the text side and the core.

    Args:
        channel: the way to the core, which this object alone uses.
        tokenizer: None when the model has none; then no request may ask for text.
        queue: told of every sequence that leaves it; whoever adds requests lets them in there first, if they are to
            be bounded.
        clock: seconds, monotonic; the one that the core is given as well.
        cache_config: of the core's cache, for the metrics.
    """

    def __init__(
        self,
        channel: CoreChannel,
        tokenizer: Tokenizer | None,
        queue: QueueBound,
        clock: Callable[[], float] = time.monotonic,
        cache_config: Labels = (),
    ) -> None:
        self.clock = clock
        self.queue = queue
        self._channel = channel
        self._tokenizer = tokenizer
        self._metrics = EngineMetrics(cache_config)
        self.timelines = RequestTimelines()
        self._num_replaced = 0
        self._states: dict[str, RequestState] = {}
        """The core's request id -> the state of the request that it is a sequence of."""

    @property
    def has_work(self) -> bool:
        """True while a request has not had its last output."""
        return bool(self._states)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return self._channel.gauges.num_waiting

    @property
    def is_ready(self) -> bool:
        """Whether a core answers now."""
        return self._channel.is_ready

    def add(self, parsed: ParsedRequest) -> None:
        """Queue a request.

        Raises:
            OverloadedError: there is no core, and there will be none soon.
        """
        state, now_s = RequestState(parsed, self._tokenizer, parsed.sequences[0].arrival_s), self.clock()
        self._metrics.observe_asked(len(parsed.sequences), parsed.sequences[0].max_tokens)
        for index, new in enumerate(parsed.sequences):
            self._channel.add(new)
            self._states[new.request_id] = state
            self.timelines.add(new, parsed.request_id, index, now_s)

    def abort(self, parsed: ParsedRequest) -> list[NumberedOutput]:
        """Drop a request. Its last output, with `finish_reason` abort, unless it had ended."""
        open_ids = [new.request_id for new in parsed.sequences if new.request_id in self._states]
        for request_id in open_ids:
            self._channel.abort(request_id)
        return self._emit([TokenDelta(request_id, (), finish_reason="abort") for request_id in open_ids])

    def wait(self) -> None:
        """Return when there may be outputs, or when `wake` was called since the last time."""
        self._channel.wait()

    def wake(self) -> None:
        """From any thread: let `wait` return."""
        self._channel.wake()

    def step(self) -> list[NumberedOutput]:
        """Outputs of one step if the core is in this process, else of all steps since the last call.

        Raises:
            OverloadedError: the core has exited for now. All requests have been dropped.
        """
        try:
            steps = self._channel.collect()
        except OverloadedError:
            self._drop_all()
            raise
        health = self._channel.health
        num_replaced = health.num_died + health.num_hung
        if num_replaced > self._num_replaced:
            self._num_replaced = num_replaced
            self.timelines.core_replaced()
        for step in steps:
            if step.record is not None:
                self._observe_step(step.record)
        gauges = self._channel.gauges
        self.queue.observe(gauges.num_running, gauges.num_waiting)
        return self._emit(delta for step in steps for delta in step.deltas)

    def get_metrics(self) -> list[Metric]:
        """All metrics now."""
        found = self._metrics.read(*self._channel.gauges, self.queue.num_rejected)
        return found + core_metrics(self._channel.health)

    def explain(self, request_id: str) -> list[Explanation]:
        """Where the time of a request went, by its public name (or that of the response whose numbered requests it
        stands for); empty when it is not remembered."""
        timelines, now_s = self.timelines, self.clock()
        return [explain(times, now_s, timelines.name_of) for times in timelines.find(request_id)]

    def check(self) -> None:
        """State the invariants of the core."""
        self._channel.check()

    def _observe_step(self, record: StepRecord) -> None:
        self._metrics.observe_step(record)
        for request_id in self.timelines.observe(record):
            self.queue.left(request_id, was_scheduled=True)
            state = self._states.get(request_id)
            if state is not None and state.metrics.first_scheduled_s is None:
                state.metrics.first_scheduled_s = record.now_s

    def _emit(self, deltas: Iterable[TokenDelta]) -> list[NumberedOutput]:
        """The outputs that deltas make. What making the text of one request raises fails that request."""
        now_s = self.clock()
        changed: dict[int, RequestState] = {}
        failed: dict[int, RequestOutput] = {}
        for delta in deltas:
            state = self._states.get(delta.request_id)
            if state is None:
                continue  # a stop string ended it, and the core's word of the abort has come
            changed[state.parsed.number] = state
            try:
                self._take(state, delta, now_s)
            except Exception as error:  # noqa: BLE001 -- `_fail` logs it
                failed[state.parsed.number] = self._fail(state, error, now_s)
        outputs = []
        for number, state in changed.items():
            output = failed.get(number)
            try:
                output = output or state.output()
            except Exception as error:  # noqa: BLE001 -- `_fail` logs it
                output = self._fail(state, error, now_s)
            if output is not None:
                outputs.append(NumberedOutput(number, output))
        made_s = self.clock()
        for number, output in outputs:
            if output.finished:
                self.timelines.made(output.request_id, changed[number].parsed.sequences[0].caller, made_s)
        return outputs

    def _take(self, state: RequestState, delta: TokenDelta, now_s: float) -> None:
        self._observe(state, delta, now_s)
        ended_here = state.apply(delta)
        if ended_here is not None:
            self._end(state, delta.request_id, ended_here, now_s)
            self._channel.abort(delta.request_id)
        elif delta.finish_reason is not None:
            self._end(state, delta.request_id, delta.finish_reason, now_s)

    def _fail(self, state: RequestState, error: Exception, now_s: float) -> RequestOutput:
        """End a request whose text cannot be made. Its last output."""
        logger.error("a request failed: %s", type(error).__name__, exc_info=error)
        parsed = state.parsed
        for new in parsed.sequences:
            if new.request_id in self._states:
                self._channel.abort(new.request_id)
                self._end(state, new.request_id, "error", now_s)
        return RequestOutput(
            parsed.request_id,
            parsed.prompt,
            list(parsed.sequences[0].prompt_token_ids),
            [CompletionOutput(index, "", [], finish_reason="error") for index in range(len(parsed.sequences))],
            finished=True,
            metrics=state.metrics,
            error=internal_fault_message(error),
        )

    def _observe(self, state: RequestState, delta: TokenDelta, now_s: float) -> None:
        times, count = state.metrics, len(delta.token_ids)
        if not count:
            return
        if times.first_token_s is None:
            times.first_token_s = now_s
            self.timelines.first_token(delta.request_id, now_s)
            self._metrics.first_token.observe(now_s - times.arrival_s)
            prompt = len(state.parsed.sequences[0].prompt_token_ids)
            self._metrics.observe_prompt(prompt, delta.num_cached_tokens)
        gap_s = state.token_came(delta.request_id, now_s)
        if gap_s is not None:
            self._metrics.token_gap.observe(gap_s / count)
        times.last_token_s = now_s
        self._metrics.observe_tokens(count)

    def _drop_all(self) -> None:
        now_s = self.clock()
        for request_id, state in list(self._states.items()):
            self._end(state, request_id, "error", now_s)

    def _end(self, state: RequestState, request_id: str, reason: str, now_s: float) -> None:
        del self._states[request_id]
        if state.finished:
            self._metrics.longest_length.observe(state.longest)
        self.queue.left(request_id, was_scheduled=False)
        state.metrics.finished_s = now_s
        prompt, num_tokens = len(state.parsed.sequences[0].prompt_token_ids), state.num_tokens(request_id)
        timeline = self.timelines.end(request_id, reason, num_tokens, now_s)
        state.metrics.num_preemptions += timeline.num_preemptions if timeline is not None else 0
        self._metrics.observe_finished(state.metrics, reason, prompt, num_tokens)
