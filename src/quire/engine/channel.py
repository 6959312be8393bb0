"""Between the text side and the core: one interface, whether the core computes in this process or in its own.

::

    Engine ── add, abort ──> CoreChannel ──> EngineCore        here: `LocalChannel`, the caller's thread computes
           <── CoreOutputs ─                                   apart: `supervisor.SupervisedChannel`
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from quire.core.engine_core import EngineCore
from quire.core.plan import StepRecord, TokenDelta
from quire.core.request import NewRequest
from quire.engine.idle import IdleChores
from quire.outputs import Decision, Labels

HELD_S = 0.005
"""Between two questions to the admission rules, where every request is held and no step has anything to compute."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model is, as catalogues tell it."""

    family: str = ""
    """`model_type` of its configuration; empty where it is not known."""
    num_parameters: int = 0
    weight_format: str = ""
    """A dtype, a scheme of `quantization`, or a checkpoint's own format."""


UNKNOWN_MODEL = ModelDescription()
"""Where nothing is known."""


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
    model: ModelDescription = UNKNOWN_MODEL

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
    held: tuple[tuple[str, int], ...] = ()
    """Of those that wait: how many each admission rule holds, by its word."""


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

    def abort(self, request_id: str) -> object:
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

    def clear(self) -> None:
        """Drop all requests, in whatever state core and channel are: after a fault, or an interrupt in the middle of a
        call. A call that was interrupted is repeated."""

    def close(self) -> None:
        """Give back what the core holds. Calling it again does nothing."""


class LocalChannel:
    """The core in this process: `collect` computes.

    Args:
        release: `EngineArgs.release_idle_memory`.
        clock: seconds.
    """

    is_ready = True
    health = CoreHealth()

    def __init__(self, core: EngineCore, release: str = "no", clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._chores = IdleChores(core, release, clock)
        self._awake = threading.Event()
        self.add, self.abort = core.scheduler.add, core.scheduler.abort
        self.check, self.clear, self.close = core.check, core.clear, core.close

    def wait(self) -> None:
        """See `CoreChannel.wait`. While there is no work, it does `EngineCore.run_idle_work`. Where admission rules
        hold all work, it returns when it is time to ask them again."""
        if not self._core.scheduler.has_work:
            self._rest()
        if self._core.scheduler.is_held:
            self._awake.wait(HELD_S)
        self._awake.clear()

    def _rest(self) -> None:
        self._chores.begin()
        while not self._core.scheduler.has_work and not self._awake.is_set():
            if not self._core.run_idle_work():
                self._awake.wait(self._chores.do_due())

    def wake(self) -> None:
        """See `CoreChannel.wake`."""
        self._awake.set()

    def collect(self) -> list[CoreOutputs]:
        """See `CoreChannel.collect`."""
        if not self._core.scheduler.has_work:
            return []
        deltas = self._core.step()
        return [CoreOutputs(tuple(deltas), self._core.scheduler.last_record, self.gauges)]

    @property
    def gauges(self) -> Gauges:
        """See `CoreChannel.gauges`."""
        scheduler = self._core.scheduler
        return Gauges(scheduler.num_running, scheduler.num_waiting, scheduler.cache_usage, scheduler.held_by_reason)
