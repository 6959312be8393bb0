"""Watches over a core in its own process, so that no client loses anything by its death.

::

              spawn            Ready                 end of file, or a step that takes too long
    (nothing) ─────> starting ───────> serving ──────────────────────────────┐
                        │ died, or could not be spawned                      │
                        v                                                    v
              three in a row: open ─── pause over ───> spawn            attribute, spawn,
              newcomers: 503, Retry-After; those that wait: too,        requests are resumed
              if the cores died by themselves

The heartbeat (`heartbeat`) is the age of the core's last message while it has work: it announces a step that is
not like those before, and reports every step that is done. How long a step may take, it says itself
(`StepAllowance`).
"""

import logging
import math
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from quire.core.plan import Stalled, StepRecord, TokenDelta
from quire.core.request import NewRequest
from quire.engine.channel import CoreHealth, CoreInfo, CoreOutputs, Gauges
from quire.errors import (
    ConfigurationError,
    EngineDeadError,
    ModelFileError,
    OverloadedError,
    UnsupportedModelError,
)
from quire.isolation.breaker import Breaker
from quire.isolation.core_process import CoreExitedError, CoreProcess, SpareDescriptors
from quire.isolation.heartbeat import LEAST_SECONDS, Activity, Heartbeat
from quire.isolation.journal import Journal
from quire.isolation.wire import Abort, Add, Begun, Check, Ready, StartFailed, Stepped

IDLE = Gauges(0, 0, 0.0)
START_SECONDS = 10.0
START_SLACK = 5.0
"""A core that replaces another one may take this many times as long to start as the first did, or the seconds above."""
LATE_WAKE_SECONDS = 1.0
"""A supervisor that wakes so much too late was stopped itself, and cannot judge the core."""
FAILED_AGAIN = "the engine stopped more than once while it worked on this request"

logger = logging.getLogger("quire")


class SupervisedChannel:
    """`CoreChannel` to a core in its own process, and to its successors.

    Args:
        spawn: starts a core, given what the first one said; None for the first.
        timeout_s: how long a core that has work may be silent until it says how long its step may take.
        clock: seconds, monotonic.
        label: before what is logged: the model's name, where there are several.
    """

    def __init__(
        self,
        spawn: Callable[[CoreInfo | None], CoreProcess],
        timeout_s: float = LEAST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        label: str = "",
    ) -> None:
        self._spawn, self._label = spawn, label
        self._clock = clock
        self._journal = Journal()
        self._breaker = Breaker()
        self._info: CoreInfo | None = None
        self._gauges = IDLE
        self._is_serving = False
        self._must_refuse = False
        self._is_closed = False
        self._timeout_s = timeout_s
        self._start_allowed_s = math.inf
        self._started_s = clock()
        self._heartbeat = Heartbeat(clock, self._activity)
        self._num_replaced = {"died": 0, "hung": 0}
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._core: CoreProcess | None = None
        self._spare = SpareDescriptors()
        try:
            self._start()
        except OSError as error:
            self.close()
            raise EngineDeadError(f"the engine's core could not be started: {error}") from error

    def wait_ready(self) -> CoreInfo:
        """Wait for the first core.

        Raises:
            ConfigurationError: it cannot start with these arguments.
            EngineDeadError: it died.
        """
        core = self._core
        assert core is not None
        try:
            while self._info is None:
                self._selector.select()
                for report in core.receive():
                    if isinstance(report, StartFailed):
                        raise _start_error(report)
                    self._take(report, [])
        except CoreExitedError as error:
            raise EngineDeadError(f"the engine's core ended while it started: {error}") from error
        return self._info

    @property
    def pid(self) -> int | None:
        """The process of the present core."""
        core = self._core
        return None if core is None else core.pid

    @property
    def is_ready(self) -> bool:
        """Whether a core answers now. True to the moment, also while the thread that calls `wait` is stuck."""
        return self._is_serving and not self._is_hung()

    @property
    def health(self) -> CoreHealth:
        """See `CoreChannel.health`."""
        state = "serving" if self._is_serving else "paused" if self._core is None else "starting"
        return CoreHealth(state, self._num_replaced["died"], self._num_replaced["hung"])

    @property
    def gauges(self) -> Gauges:
        """The core's own report; requests that it has not received yet count as waiting."""
        num_open, reported = len(self._journal), self._gauges
        num_running = min(reported.num_running, num_open)
        return Gauges(num_running, num_open - num_running, reported.cache_usage, reported.held)

    def add(self, new: NewRequest) -> None:
        """See `CoreChannel.add`."""
        if not self._breaker.may_start(self._clock()):
            raise self._refusal()
        self._journal.add(new)
        self._feed()

    def abort(self, request_id: str) -> None:
        """See `CoreChannel.abort`."""
        if self._journal.remove(request_id) and self._core is not None:
            self._core.send(Abort(request_id))
        self._feed()

    def wait(self) -> None:
        """See `CoreChannel.wait`. It also returns when something is due: a hang, the end of a pause. An interrupt in it
        changes nothing."""
        self._watch_writing()
        timeout_s = self._seconds_until_due()
        before_s = self._clock()
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._woken:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
        now_s = self._clock()
        if timeout_s is not None and now_s - before_s > timeout_s + LATE_WAKE_SECONDS:
            self._heartbeat.heard()

    def wake(self) -> None:
        """See `CoreChannel.wake`."""
        with suppress(OSError):
            self._waker.send(b"\0")

    def collect(self) -> list[CoreOutputs]:
        """See `CoreChannel.collect`."""
        if self._must_refuse:
            self._must_refuse = False
            self._journal = Journal()
            raise self._refusal()
        outputs: list[CoreOutputs] = []
        if self._core is None:
            if self._breaker.may_start(self._clock()):
                self._start_next()
            return outputs
        try:
            if self._core.has_unsent:
                self._core.flush()
            for report in self._core.receive():
                self._take(report, outputs)
            if self._is_hung():
                self._on_core_exit(
                    CoreExitedError("it hangs: silent for longer than its step may take"), "hung", outputs
                )
        except CoreExitedError as error:
            self._on_core_exit(error, "died", outputs)
        self._feed()
        return outputs

    def check(self) -> None:
        """See `CoreChannel.check`: a core that breaks an invariant ends, and is replaced."""
        if self._core is not None and self._is_serving:
            self._core.send(Check())

    def clear(self) -> None:
        """See `CoreChannel.clear`: another core takes its place."""
        if self._core is not None:
            with suppress(KeyError, ValueError):  # an interrupted call came so far
                self._selector.unregister(self._core)
            self._core.end(at_once=True)
        self._core, self._is_serving, self._must_refuse = None, False, False
        self._journal, self._gauges = Journal(), IDLE
        if self._breaker.may_start(self._clock()):
            self._start_next()

    def close(self) -> None:
        """See `CoreChannel.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._is_serving = False
        if self._core is not None:
            self._core.end(at_once=False)
        self._selector.close()
        self._woken.close()
        self._waker.close()
        self._spare.close()

    def _start(self) -> None:
        with self._spare.given_up():
            self._core = self._spawn(self._info)  # at once: what an interrupt leaves here, `clear` finds
            self._selector.register(self._core, selectors.EVENT_READ)
        self._started_s = self._clock()
        self._heartbeat.expect(self._start_allowed_s)

    def _start_next(self) -> None:
        """Start the core that follows, if the system has what it takes: if not, that counts as a death."""
        try:
            self._start()
        except OSError as error:
            logger.error("%sthe engine's core could not be started (%s)", self._label, error)
            now_s = self._clock()
            self._breaker.record_failure(now_s, now_s, by_itself=False)
            self._note_pause(now_s)

    def _note_pause(self, now_s: float) -> None:
        """Say that no core is started for now, if so."""
        if not self._breaker.may_start(now_s):
            text = "%sthe engine's core died again and again: no new one for %.0f s"
            logger.error(text, self._label, self._pause_s(now_s))
            self._must_refuse = not self._breaker.lets_wait

    def _take(self, report: Any, outputs: list[CoreOutputs]) -> None:
        self._heartbeat.heard()
        if isinstance(report, Stepped):
            step = report.outputs
            deltas = self._journal.take(step.deltas)
            if any(delta.token_ids for delta in deltas):
                self._breaker.record_success()
            self._gauges = step.gauges
            outputs.append(CoreOutputs(deltas, _with_probed(step, deltas), step.gauges))
        elif isinstance(report, Begun):
            self._journal.enter(report.entered)
            self._heartbeat.expect(report.allowed_s, report.idle_timeout_s)
        elif isinstance(report, Ready):
            if self._info is None:
                self._info = report.info
                self._start_allowed_s = max(START_SECONDS, START_SLACK * (self._clock() - self._started_s))
            elif not report.info.can_follow(self._info):
                raise CoreExitedError("the model's files, or the room for them, have changed since the server started")
            self._is_serving = True
            self._heartbeat.expect(self._timeout_s)
        elif isinstance(report, StartFailed):
            raise CoreExitedError(report.message)

    def _feed(self) -> None:
        """Send what may be sent."""
        if self._core is None or not self._is_serving:
            return
        was_idle = self._journal.num_sent == 0
        for new in self._journal.take_unsent():
            self._core.send(Add(new))
        if was_idle:
            self._heartbeat.heard()

    def _on_core_exit(self, reason: CoreExitedError, kind: str, outputs: list[CoreOutputs]) -> None:
        """The core has exited, or hangs: end it, decide what fails, start the next."""
        core, now_s = self._core, self._clock()
        assert core is not None
        self._selector.unregister(core)
        core.end(at_once=True)
        self._core, self._is_serving = None, False
        self._gauges = IDLE
        self._num_replaced[kind] += 1
        by_itself = not reason.is_from_outside
        death = self._journal.core_died(by_itself=by_itself)
        if death.is_attributed:
            self._breaker.record_attributed(self._started_s, now_s)
        elif not death.is_narrowed:
            self._breaker.record_failure(self._started_s, now_s, by_itself=by_itself)
        logger.error(
            "%sthe engine's core exited (%s); %d requests go on in the next, %d fail",
            self._label, reason, death.num_kept, len(death.failed),
        )  # fmt: skip
        if death.failed:
            deltas = tuple(TokenDelta(name, (), finish_reason="error", error=FAILED_AGAIN) for name in death.failed)
            outputs.append(CoreOutputs(deltas, None, IDLE))
        if self._breaker.may_start(now_s):
            self._start_next()
        else:
            self._note_pause(now_s)

    def _activity(self) -> Activity | None:
        core = self._core  # read once: another thread may ask while this one replaces it
        return None if core is None else core.activity()

    @property
    def _has_promised(self) -> bool:
        """Whether a message of the core is due: it starts, or it has requests."""
        return self._core is not None and (not self._is_serving or self._journal.num_sent > 0)

    def _is_hung(self) -> bool:
        return self._has_promised and self._heartbeat.is_hung()

    def _seconds_until_due(self) -> float | None:
        """Until something happens by itself; None when nothing will."""
        now_s = self._clock()
        if self._must_refuse:
            return 0.0
        if self._core is None:
            return self._pause_s(now_s)
        next_check_s = self._heartbeat.next_check_s
        return max(0.0, next_check_s - now_s) + 0.001 if self._has_promised and next_check_s < math.inf else None

    def _watch_writing(self) -> None:
        if self._core is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._core.has_unsent else 0)
            if self._selector.get_key(self._core).events != events:
                self._selector.modify(self._core, events)

    def _pause_s(self, now_s: float) -> float:
        open_until_s = self._breaker.open_until_s
        return 0.0 if open_until_s is None else max(0.0, open_until_s - now_s)

    def _refusal(self) -> OverloadedError:
        retry_after_s = max(1, math.ceil(self._pause_s(self._clock())) + 1)
        return OverloadedError("the engine is being restarted after it failed repeatedly", retry_after_s=retry_after_s)


def _with_probed(step: CoreOutputs, taken: tuple[TokenDelta, ...]) -> StepRecord | None:
    """The record of a step, which also names those whose probe ended with it: they go on later."""
    ended = {delta.request_id for delta in step.deltas if delta.finish_reason is not None}
    probed = [delta.request_id for delta in taken if delta.finish_reason is None and delta.request_id in ended]
    if not probed or step.record is None:
        return step.record
    return replace(step.record, stalled=(*step.record.stalled, *(Stalled(name, "quarantined") for name in probed)))


def _start_error(report: StartFailed) -> ConfigurationError:
    kinds = {kind.__name__: kind for kind in (ModelFileError, UnsupportedModelError)}
    return kinds.get(report.kind, ConfigurationError)(report.message, field=report.field)
