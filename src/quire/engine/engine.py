"""The engine: checked requests in, `RequestOutput`s out, one step at a time.

It stands between text and the core, and it owns the requests: whether the core is in this process or in its own is
the channel's affair. It has no thread: `LLM` steps it in the caller's, `AsyncEngine` in one beside the event loop.
"""

import logging
import time
from collections.abc import Callable, Iterable

from quire.core.plan import StepRecord, TokenDelta
from quire.engine.channel import CoreChannel
from quire.engine.inputs import ParsedRequest
from quire.engine.observer import Observer
from quire.engine.queue import QueueBound
from quire.engine.request_state import RequestState
from quire.errors import OverloadedError, internal_fault_message
from quire.outputs import CompletionOutput, Metric, RequestOutput
from quire.text.tokenizer import Tokenizer

logger = logging.getLogger("quire.engine")

Outputs = list[tuple[int, RequestOutput]]
"""Each with `ParsedRequest.number` of its request."""


class Engine:
    """Requests between the text side and the core.

    Args:
        channel: the way to the core.
        tokenizer: None when the model has none; then no request may ask for text.
        queue: every sequence that leaves it is reported there; requests that are to be bounded enter it before `add`.
        clock: seconds, monotonic; the core has the same one.
        observer: of its events; None: they are ignored.
    """

    def __init__(
        self,
        channel: CoreChannel,
        tokenizer: Tokenizer | None,
        queue: QueueBound,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
    ) -> None:
        self.clock = clock
        self.queue = queue
        self.channel = channel
        self.observer = observer or Observer()
        self._tokenizer = tokenizer
        self._num_replaced = 0
        self._states: dict[str, RequestState] = {}
        """The core's request id -> the state of the request that it is a sequence of."""
        self._unscheduled: set[str] = set()
        """Of these, the ids that had no step yet."""

    @property
    def has_work(self) -> bool:
        """True while a request has not had its last output."""
        return bool(self._states)

    def add(self, parsed: ParsedRequest) -> None:
        """Queue a request.

        Raises:
            OverloadedError: there is no core, and there will be none soon.
        """
        state, now_s = RequestState(parsed, self._tokenizer, parsed.sequences[0].arrival_s), self.clock()
        self.observer.on_request(parsed)
        for index, new in enumerate(parsed.sequences):
            self.channel.add(new)
            self._states[new.request_id] = state
            self._unscheduled.add(new.request_id)
            self.observer.on_add(new, parsed, index, now_s)

    def abort(self, parsed: ParsedRequest) -> Outputs:
        """Drop a request. Its last output, with `finish_reason` abort, unless it had ended."""
        open_ids = [new.request_id for new in parsed.sequences if new.request_id in self._states]
        for request_id in open_ids:
            self.channel.abort(request_id)
        return self._emit([TokenDelta(request_id, (), finish_reason="abort") for request_id in open_ids])

    def step(self) -> Outputs:
        """Outputs of one step if the core is in this process, else of all steps since the last call.

        Raises:
            OverloadedError: there is no core for now. All requests have been dropped.
        """
        try:
            steps = self.channel.collect()
        except OverloadedError:
            self._drop_all()
            raise
        health = self.channel.health
        num_replaced = health.num_died + health.num_hung
        if num_replaced > self._num_replaced:
            self._num_replaced = num_replaced
            self.observer.on_core_replaced()
        for step in steps:
            if step.record is not None:
                self._observe_step(step.record)
        gauges = self.channel.gauges
        self.queue.observe(gauges.num_running, gauges.num_waiting)
        return self._emit(delta for step in steps for delta in step.deltas)

    def get_metrics(self) -> list[Metric]:
        """All metrics now."""
        return self.observer.metrics(self.channel.gauges, self.channel.health, self.queue.num_rejected)

    def _observe_step(self, record: StepRecord) -> None:
        self.observer.on_step(record)
        if self._unscheduled:
            for item in record.scheduled:
                if item.request_id in self._unscheduled:
                    self._unscheduled.discard(item.request_id)
                    self.queue.left(item.request_id, was_scheduled=True)
                    times = self._states[item.request_id].metrics
                    if times.first_scheduled_s is None:
                        times.first_scheduled_s = record.now_s
        for stalled in record.stalled:
            if stalled.reason == "preempted" and stalled.request_id in self._states:
                self._states[stalled.request_id].metrics.num_preemptions += 1

    def _emit(self, deltas: Iterable[TokenDelta]) -> Outputs:
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
        outputs: Outputs = []
        for number, state in changed.items():
            output = failed.get(number)
            try:
                output = output or state.output()
            except Exception as error:  # noqa: BLE001 -- `_fail` logs it
                output = self._fail(state, error, now_s)
            if output is not None:
                outputs.append((number, output))
        made_s = self.clock()
        for number, output in outputs:
            if output.finished:
                self.observer.on_output(changed[number].parsed, made_s)
        return outputs

    def _take(self, state: RequestState, delta: TokenDelta, now_s: float) -> None:
        self._observe(state, delta, now_s)
        ended_here = state.apply(delta)
        if ended_here is not None:
            self._end(state, delta.request_id, ended_here, now_s)
            self.channel.abort(delta.request_id)
        elif delta.finish_reason is not None:
            self._end(state, delta.request_id, delta.finish_reason, now_s)

    def _fail(self, state: RequestState, error: Exception, now_s: float) -> RequestOutput:
        """End a request whose text cannot be made. Its last output."""
        logger.error("a request failed: %s", type(error).__name__, exc_info=error)
        parsed = state.parsed
        for new in parsed.sequences:
            if new.request_id in self._states:
                self.channel.abort(new.request_id)
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
        times = state.metrics
        if not delta.token_ids:
            return
        is_first = times.first_token_s is None
        if is_first:
            times.first_token_s = now_s
        times.last_token_s = now_s
        gap_s = state.token_came(delta.request_id, now_s)
        self.observer.on_tokens(state, delta, now_s, is_first=is_first, gap_s=gap_s)

    def _drop_all(self) -> None:
        now_s = self.clock()
        for request_id, state in list(self._states.items()):
            self._end(state, request_id, "error", now_s)

    def _end(self, state: RequestState, request_id: str, reason: str, now_s: float) -> None:
        del self._states[request_id]
        self._unscheduled.discard(request_id)
        self.queue.left(request_id, was_scheduled=False)
        state.metrics.finished_s = now_s
        self.observer.on_end(state, request_id, reason, now_s)
