"""The engine: checked requests in, `RequestOutput`s out, one step at a time.

It stands between text and the core, and it owns the requests: whether the core is in this process or in its own is
the channel's affair. It has no thread: `LLM` steps it in the caller's, `AsyncEngine` in one beside the event loop.
"""

import logging
import time
from collections.abc import Callable, Container, Iterable

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
MOST_FAULTS = 3
"""A request that was there in so many faults of the engine fails: it may be what the engine fails of."""
FAULTY = "the engine failed more than once while this request was in it"


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
        self._made: Outputs = []
        """Outputs that a call has made and not returned: after a fault, `mend` does."""

    @property
    def has_work(self) -> bool:
        """True while a request has not had its last output."""
        return bool(self._states)

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._states)

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
            self._drop_all("error")
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

    def drop_all(self, *, is_whole: bool) -> None:
        """Drop every request without an output. A call that was interrupted is repeated.

        Args:
            is_whole: False: an earlier call was interrupted, or raised; the core may be in any state, and starts anew.
        """
        self._made = []
        if is_whole:
            for request_id in list(self._states):
                self.channel.abort(request_id)
        else:
            self.channel.clear()
        self._drop_all("abort")

    def mend(self, wanted: Container[int]) -> Outputs:
        """After a fault in another call: whatever state the core is in, it starts anew, and computes on from what the
        outputs say. Outputs that were made and not returned, and the last ones of requests that were there in
        `MOST_FAULTS` faults.

        Args:
            wanted: numbers of requests that still have a reader; the others are dropped.

        Raises:
            OverloadedError: there is no core for now. All requests have been dropped.
        """
        now_s, outputs = self.clock(), self._made
        self.channel.clear()
        self.observer.on_core_replaced()
        for state in {id(state): state for state in self._states.values()}.values():
            state.num_faults += 1
            if state.num_faults >= MOST_FAULTS:
                outputs.append((state.parsed.number, self._end_failed(state, FAULTY, now_s)))
        for request_id, state in list(self._states.items()):
            if state.parsed.number not in wanted:
                self._end(state, request_id, "abort", now_s)
                continue
            new, finish_reason = state.resumed(request_id)
            if finish_reason is not None:  # the fault came between its last token and the word of it
                self._end(state, request_id, finish_reason, now_s)
                output = state.output()
                outputs += [] if output is None else [(state.parsed.number, output)]
                continue
            try:
                self.channel.add(new)
            except OverloadedError:
                self._drop_all("error")
                raise
        self._made = []
        return outputs

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
        now_s, outputs = self.clock(), self._made
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
        self._made = []
        return outputs

    def _take(self, state: RequestState, delta: TokenDelta, now_s: float) -> None:
        self._observe(state, delta, now_s)
        finish_reason = state.apply(delta)
        if finish_reason is not None:
            self._end(state, delta.request_id, finish_reason, now_s)
            if delta.finish_reason is None:
                self.channel.abort(delta.request_id)

    def _fail(self, state: RequestState, error: Exception, now_s: float) -> RequestOutput:
        """End a request whose text cannot be made. Its last output."""
        logger.error("a request failed: %s", type(error).__name__, exc_info=error)
        for new in state.parsed.sequences:
            if new.request_id in self._states:
                self.channel.abort(new.request_id)
        return self._end_failed(state, internal_fault_message(error), now_s)

    def _end_failed(self, state: RequestState, message: str, now_s: float) -> RequestOutput:
        parsed = state.parsed
        for new in parsed.sequences:
            if new.request_id in self._states:
                self._end(state, new.request_id, "error", now_s)
        return RequestOutput(
            parsed.request_id,
            parsed.prompt,
            list(parsed.sequences[0].prompt_token_ids),
            [CompletionOutput(index, "", [], finish_reason="error") for index in range(len(parsed.sequences))],
            finished=True,
            metrics=state.metrics,
            error=message,
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

    def _drop_all(self, reason: str) -> None:
        now_s = self.clock()
        for request_id, state in list(self._states.items()):
            self._end(state, request_id, reason, now_s)

    def _end(self, state: RequestState, request_id: str, reason: str, now_s: float) -> None:
        # Last of all it is no longer known: a call that was interrupted before is repeated.
        self._unscheduled.discard(request_id)
        self.queue.left(request_id, was_scheduled=False)
        state.metrics.finished_s = now_s
        self.observer.on_end(state, request_id, reason, now_s)
        self._states.pop(request_id, None)
