"""An engine over a core that says what a test tells it to say, and does nothing else."""

import threading
from collections import deque
from dataclasses import replace
from typing import Any

from quire.core.plan import ScheduledRequest, Stalled, StepRecord, TokenDelta
from quire.core.request import NewRequest
from quire.engine.async_engine import AsyncEngine
from quire.engine.channel import CoreHealth, CoreOutputs, Gauges
from quire.engine.engine import Engine
from quire.engine.front import ServedEngine
from quire.engine.inputs import InputProcessor, ParsedRequest, RequestLimits
from quire.engine.observer import Observer
from quire.engine.queue import Caller, QueueBound, QueueConfig
from quire.observe.observer import EngineObserver
from quire.sampling_params import RequestOutputKind, SamplingParams

LIMITS = RequestLimits(64, 100, (), 0, False)
PARAMS = SamplingParams(max_tokens=8, detokenize=False, output_kind=RequestOutputKind.DELTA)


class Clock:
    """Seconds, as they are set."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class ScriptedChannel:
    """`CoreChannel` that keeps what it was asked, and whose outputs are given to it."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.news: list[NewRequest] = []
        self.aborted: list[str] = []
        self.gauges = Gauges(0, 0, 0.0)
        self.health = CoreHealth()
        self.is_ready = True
        self.num_closed = self.num_cleared = 0
        self.raises: dict[str, BaseException] = {}
        """Method, or the core's id of a request that is added -> what it raises, once."""
        self.threads: list[tuple[str, threading.Thread]] = []
        """Method -> the thread that called it."""
        self._outputs: deque[CoreOutputs] = deque()
        self._awake = threading.Event()

    def give(self, *deltas: TokenDelta, record: StepRecord | None = None) -> None:
        """Outputs for the next `collect`."""
        self._outputs.append(CoreOutputs(deltas, record, self.gauges))
        self._awake.set()

    def add(self, new: NewRequest) -> None:
        self._note("add", new.request_id)
        self.added.append(new.request_id)
        self.news.append(new)

    def abort(self, request_id: str) -> None:
        self._note("abort")
        self.aborted.append(request_id)

    def wait(self) -> None:
        self._awake.wait()
        self._awake.clear()
        self._note("wait")

    def wake(self) -> None:
        self._awake.set()

    def collect(self) -> list[CoreOutputs]:
        self._note("collect")
        found = list(self._outputs)
        self._outputs.clear()
        return found

    def check(self) -> None:
        self._note("check")

    def clear(self) -> None:
        self._note("clear")
        self._outputs.clear()
        self.num_cleared += 1

    def close(self) -> None:
        self.num_closed += 1

    def _note(self, *names: str) -> None:
        self.threads.append((names[0], threading.current_thread()))
        for name in names:
            if name in self.raises:
                raise self.raises.pop(name)


class Scripted:
    """A channel, and an engine over it with a clock that stands still; or one in a thread beside the event loop."""

    def __init__(self, limits: QueueConfig | None = None, observer: Observer | None = None) -> None:
        self.clock = Clock()
        self.channel = ScriptedChannel()
        self.queue = QueueBound(limits or QueueConfig(8, 1000, 4), self.clock)
        self.engine = Engine(self.channel, None, self.queue, self.clock, observer or EngineObserver())
        self.inputs = InputProcessor(None, LIMITS)
        self._num_steps = 0

    def beside_a_loop(self) -> AsyncEngine:
        """The engine, run by a thread."""
        served = ServedEngine(self.engine, self.inputs, None, LIMITS, [], {}, self.channel.close)
        return AsyncEngine(served)

    def parse(self, prompt: Any = (1, 2, 3), caller: str = "", **changes: Any) -> ParsedRequest:
        """A request, let into the queue."""
        params = replace(PARAMS, **changes)
        parsed = self.inputs.parse(list(prompt), params, arrival_s=self.clock(), caller=Caller(caller))
        ids = tuple(new.request_id for new in parsed.sequences)
        self.queue.enter(Caller(caller), len(prompt), ids)
        return parsed

    def add(self, *prompt: int, **changes: Any) -> ParsedRequest:
        """A request that the engine has."""
        parsed = self.parse(prompt or (1, 2, 3), **changes)
        self.engine.add(parsed)
        return parsed

    def record(self, *scheduled: tuple[str, int, int], stalled: tuple[Stalled, ...] = (), hits: int = 0) -> StepRecord:
        """Of a step that begins now."""
        self._num_steps += 1
        rows = tuple(ScheduledRequest(*item) for item in scheduled)
        return StepRecord(self._num_steps - 1, self.clock(), rows, stalled, len(rows), 0, 1, 0, 1, hits, hits)

    def metric(self, name: str, **labels: str) -> Any:
        """One reading of the engine."""
        wanted = tuple(labels.items())
        (found,) = (item for item in self.engine.get_metrics() if item.name == name and item.labels == wanted)
        return found


def final(request_id: str, *token_ids: int, reason: str = "length") -> TokenDelta:
    """The last delta of a request."""
    return TokenDelta(request_id, token_ids, finish_reason=reason)
