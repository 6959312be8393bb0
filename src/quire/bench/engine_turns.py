"""Several engines on one workload in turns, each in its own process, the others stopped meanwhile; and the figures."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

from quire.bench.offline import Measurement, measure
from quire.bench.peer_answers import EngineInfo, PeerError, PeerMissing, RunResult
from quire.bench.peers import EngineProcess, Spec
from quire.bench.serving import percentile
from quire.bench.workloads import Item

AGREED = 16
"""First tokens of an output that are held against those of the engine that `yardstick` names."""

STATES = {"missing": "not installed", "unfit": "left out", "failed": "failed"}
"""Why an engine is not in the table, and how that is said."""


@dataclass(slots=True)
class Started:
    """An engine that was asked for, and what became of it."""

    name: str
    state: str
    """ran, or one of `STATES`."""
    reason: str = ""
    facts: EngineInfo = field(default_factory=lambda: EngineInfo({}, {}))
    start_s: float = 0.0
    """From the start of its process to the end of the warm-up."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine, one workload, once."""

    measured: Measurement
    ran: RunResult
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most over the repetitions."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the table shows of an engine and a workload."""

    runs: int
    output_rate: Spread
    """Output tokens a second."""
    total_rate: Spread
    """Prompt and output tokens a second."""
    ttft_s: Spread
    """Of the median request of each run."""
    ttft_p99_s: Spread
    peak_bytes: int | None
    """The most in any run."""
    kv_bytes: int | None
    agreeing: tuple[int, int] | None
    """Requests whose first tokens are those of the engine that `yardstick` names, of how many."""


class Comparison:
    """Engines that are started once, take turns, and are ended together.

    Args:
        say: told what happens.
        start_timeout_s, run_timeout_s: past it an engine has failed.
    """

    def __init__(self, say: Callable[[str], None], start_timeout_s: float, run_timeout_s: float) -> None:
        self.started: list[Started] = []
        self.turns: list[Turn] = []
        self._say = say
        self._start_timeout_s, self._run_timeout_s = start_timeout_s, run_timeout_s
        self._peers: dict[str, EngineProcess] = {}
        self._stack = ExitStack()

    def start(self, spec: Spec, warm_ups: Sequence[Sequence[Item]]) -> bool:
        """Start an engine and let it answer each of `warm_ups`; False where it cannot, kept with its reason."""
        self._say(f"{spec.name}: starting")
        begun_s = time.monotonic()
        try:
            peer = self._stack.enter_context(EngineProcess(spec))
            peer.start(self._start_timeout_s)
            for items in warm_ups:
                peer.run(items, self._run_timeout_s)
        except PeerError as error:
            self._lose(spec.name, error)
            return False
        took_s = time.monotonic() - begun_s
        peer.pause()
        self._peers[spec.name] = peer
        self.started.append(Started(spec.name, "ran", facts=peer.facts, start_s=took_s))
        self._say(f"{spec.name}: ready in {took_s:.1f} s")
        return True

    def run(self, workload: str, repetition: int, items: Sequence[Item]) -> None:
        """Every engine once, in their order, in every second repetition the other way round. One that fails is lost."""
        for name in list(self._peers)[:: -1 if repetition % 2 else 1]:
            peer = self._peers[name]
            peer.resume()
            peer.forget_peak()
            try:
                ran = peer.run(items, self._run_timeout_s)
            except PeerError as error:
                self._lose(name, error)
                continue
            peak = peer.peak_bytes()
            peer.pause()
            measured = measure(name, workload, repetition, items, ran.elapsed_s, statistics.median(ran.ttfts_s))
            self.turns.append(Turn(measured, ran, peak))
            self._say(f"{workload} {repetition + 1} {name}: {measured.output_tokens_per_second:.1f} tok/s")

    def leave_out(self, name: str, reason: str, state: str = "unfit") -> None:
        """Keep that an engine takes no part, and why."""
        self._say(f"{name}: {STATES[state]}: {reason}")
        self.started = [one for one in self.started if one.name != name]
        self.started.append(Started(name, state, reason))

    def _lose(self, name: str, error: PeerError) -> None:
        self.leave_out(name, str(error), "missing" if isinstance(error, PeerMissing) else "failed")
        if (peer := self._peers.pop(name, None)) is not None:
            peer.close(0.0)

    def __enter__(self) -> "Comparison":
        self._stack.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def yardstick(turns: Sequence[Turn], started: Sequence[Started]) -> str | None:
    """The first engine that ran and gave token ids: with its outputs the others' are compared."""
    told = {turn.measured.engine for turn in turns if turn.ran.token_ids}
    return next((one.name for one in started if one.state == "ran" and one.name in told), None)


def figures(turns: Sequence[Turn], started: Sequence[Started]) -> dict[tuple[str, str], Figures]:
    """(workload, engine) -> its figures, in the order of the first turns."""
    groups: dict[tuple[str, str], list[Turn]] = {}
    for turn in turns:
        groups.setdefault((turn.measured.workload, turn.measured.engine), []).append(turn)
    accounts = {one.name: one.facts.kv_bytes for one in started}
    first = yardstick(turns, started)
    right = {(turn.measured.workload, turn.measured.repetition): turn.ran.token_ids
             for turn in turns if turn.measured.engine == first}  # fmt: skip
    return {
        key: _figures(group, accounts.get(key[1]), {} if key[1] == first else right) for key, group in groups.items()
    }


def _figures(
    group: Sequence[Turn], kv_bytes: int | None, right: Mapping[tuple[str, int], Sequence[Sequence[int]] | None]
) -> Figures:
    agreeing, compared = 0, 0
    for turn in group:
        ours = right.get((turn.measured.workload, turn.measured.repetition))
        for one, other in zip(ours or (), turn.ran.token_ids or (), strict=False):
            compared += 1
            agreeing += list(one[:AGREED]) == list(other[:AGREED])
    grown = [turn.ran.kv_bytes for turn in group if turn.ran.kv_bytes is not None]
    peaks = [turn.peak_bytes for turn in group if turn.peak_bytes is not None]
    return Figures(
        runs=len(group),
        output_rate=spread([turn.measured.output_tokens_per_second for turn in group]),
        total_rate=spread([turn.measured.tokens_per_second for turn in group]),
        ttft_s=spread([statistics.median(turn.ran.ttfts_s) for turn in group]),
        ttft_p99_s=spread([percentile(turn.ran.ttfts_s, 99) for turn in group]),
        peak_bytes=max(peaks, default=None),
        kv_bytes=max(grown, default=kv_bytes),
        agreeing=(agreeing, compared) if compared else None,
    )


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))
