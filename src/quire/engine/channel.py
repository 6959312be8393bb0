"""Between the text side and the core: one interface, whether the core computes in this process or in its own.

::

    Engine ── add, abort ──> CoreChannel ──> EngineCore        here: `LocalChannel`, the caller's thread computes
           <── CoreOutputs ─                                   apart: `supervisor.SupervisedChannel`
"""

import threading
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from quire.core.engine_core import EngineCore
from quire.core.plan import StepRecord, TokenDelta
from quire.core.request import NewRequest
from quire.outputs import Decision, Labels


@dataclass(frozen=True, slots=True)
class CoreInfo:
    """What the text side must know of a core."""

    max_model_len: int
    vocab_size: int
    """Width of the logits."""
    decisions: tuple[Decision, ...]
    model_fingerprint: str
    """Changes when the model's files do: a request must not be resumed under other weights."""
    cache_config: Labels = ()
    """Of the cache, under vLLM's names: labels of a metric."""

    def can_follow(self, first: "CoreInfo") -> bool:
        """Whether a core like this can resume every request that one like `first` accepted."""
        is_same = (self.model_fingerprint, self.vocab_size) == (first.model_fingerprint, first.vocab_size)
        return is_same and self.max_model_len >= first.max_model_len


class Gauges(NamedTuple):
    """The state of a core between two steps."""

    num_running: int
    num_waiting: int
    cache_usage: float
    """Share of the cache's blocks that requests hold, in [0, 1]."""


class CoreHealth(NamedTuple):
    """Of a core and those before it."""

    state: str = "serving"
    """One of `CORE_STATES`."""
    num_died: int = 0
    """Cores that exited by themselves, or were killed from outside, and were replaced."""
    num_hung: int = 0
    """Cores that were ended since they hung."""


CORE_STATES = ("serving", "starting", "paused")
"""`paused`: cores died again and again, and none is started for a while."""


@dataclass(frozen=True, slots=True)
class CoreOutputs:
    """What one step gave; `record` is None when requests left without a step."""

    deltas: tuple[TokenDelta, ...]
    record: StepRecord | None
    gauges: Gauges


class CoreChannel(Protocol):
    """The core, seen from the text side. One thread calls it; only `wake` may be called from others.

    Each request that was added gets one final delta, unless it is aborted: nothing is said of it after that.
    """

    def add(self, new: NewRequest) -> None:
        """Give the core a request.

        Raises:
            OverloadedError: there is no core, and there will be none soon.
        """

    def abort(self, request_id: str) -> None:
        """Drop a request. An id that is unknown, or has ended, is fine."""

    def wait(self) -> None:
        """Return when `collect` may have outputs, or when `wake` was called since the last `wait`."""

    def wake(self) -> None:
        """Let `wait` return."""

    def collect(self) -> list[CoreOutputs]:
        """Outputs since the last call. In this process: compute one step.

        Raises:
            OverloadedError: the core has exited, with all requests, and none is started for a while.
        """

    @property
    def gauges(self) -> Gauges:
        """The last that is known."""

    @property
    def is_ready(self) -> bool:
        """Whether a core answers now."""

    @property
    def health(self) -> CoreHealth:
        """What it is doing, and how often it was replaced."""

    def check(self) -> None:
        """State the invariants of the core."""

    def close(self) -> None:
        """Give back what the core holds. Calling it again does nothing."""


class LocalChannel:
    """The core in this process: `collect` computes."""

    is_ready = True
    health = CoreHealth()

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._awake = threading.Event()

    def add(self, new: NewRequest) -> None:
        """See `CoreChannel.add`."""
        self._core.add(new)

    def abort(self, request_id: str) -> None:
        """See `CoreChannel.abort`."""
        self._core.abort(request_id)

    def wait(self) -> None:
        """See `CoreChannel.wait`."""
        wait_for_work(self._core, self._awake)
        self._awake.clear()

    def wake(self) -> None:
        """See `CoreChannel.wake`."""
        self._awake.set()

    def collect(self) -> list[CoreOutputs]:
        """See `CoreChannel.collect`."""
        return [step_outputs(self._core)] if self._core.has_work else []

    @property
    def gauges(self) -> Gauges:
        """See `CoreChannel.gauges`."""
        return core_gauges(self._core)

    def check(self) -> None:
        """See `CoreChannel.check`."""
        self._core.check()

    def close(self) -> None:
        """See `CoreChannel.close`."""
        self._core.close()


def core_gauges(core: EngineCore) -> Gauges:
    """Of a core in this process."""
    return Gauges(core.num_running, core.num_waiting, core.cache_usage)


def wait_for_work(core: EngineCore, awake: threading.Event) -> None:
    """Return when the core has work, or `awake` is set; moments until then are for `EngineCore.run_idle_work`."""
    while not core.has_work and not awake.is_set():
        if not core.run_idle_work():
            awake.wait()


def step_outputs(core: EngineCore) -> CoreOutputs:
    """Compute one step."""
    deltas = core.step()
    return CoreOutputs(tuple(deltas), core.last_record, core_gauges(core))
