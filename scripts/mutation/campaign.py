"""Tries faults one by one, in as many copies of the tree as there are jobs, within a bound of time."""

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Event, Lock

from scripts.mutation.faults import Fault
from scripts.mutation.tree_copy import TreeCopy
from scripts.mutation.trial import Ending, Trial, run_tests

BASELINE_LIMIT_S = 600.0
"""For a run of tests without a fault."""
GRACE_S, GRACE_TIMES = 60.0, 5.0
"""A run with a fault hangs when it takes so many seconds more than so many times the run without."""


class Outcome(Enum):
    """What became of a fault."""

    KILLED = "killed"
    HUNG = "killed (hang)"
    SURVIVED = "survived"
    ARGUED = "survived as argued"
    INVALID = "invalid: its tests do not pass without it"
    NOT_RUN = "not run"


KILLED = (Outcome.KILLED, Outcome.HUNG)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one fault."""

    fault: Fault
    outcome: Outcome
    seconds: float = 0.0
    failure: str = ""
    """The test that killed it, or that fails without it."""


class Campaign:
    """Faults against the tree at `root`, whose compiled module is `native`. No fault is started later than `seconds`
    after the copies are there."""

    def __init__(self, root: Path, seconds: float, jobs: int, native: Path | None) -> None:
        self._root = root
        self._native = native
        self._seconds = seconds
        self._jobs = jobs
        self._copies: SimpleQueue[TreeCopy] = SimpleQueue()
        self._baselines: dict[str, Trial] = {}
        """Test file or id -> its run without a fault."""
        self._locks: dict[str, Lock] = {}
        self._end_s = 0.0
        self._stop = Event()

    def run(self, faults: Sequence[Fault]) -> Generator[Verdict, None, None]:
        """The verdicts, each as soon as it is known; closed before the end, it stops all that runs. Raises RuntimeError
        when the tests in a copy would import something else."""
        with TemporaryDirectory(prefix="quire-mutants-") as folder, ThreadPoolExecutor(self._jobs) as pool:
            for number in range(self._jobs):
                self._copies.put(TreeCopy(self._root, Path(folder) / f"tree{number}", self._native))
            self._locks = {test: Lock() for fault in faults for test in fault.tests}
            self._end_s = time.monotonic() + self._seconds
            futures = [pool.submit(self._try, fault) for fault in faults]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    @contextmanager
    def _copy(self) -> Iterator[TreeCopy]:
        copy = self._copies.get()
        try:
            yield copy
        finally:
            self._copies.put(copy)

    def _try(self, fault: Fault) -> Verdict:
        with self._copy() as copy:
            if time.monotonic() >= self._end_s:
                return Verdict(fault, Outcome.NOT_RUN)
            baselines = [self._baseline(copy, test) for test in fault.tests]
            for test, baseline in zip(fault.tests, baselines, strict=True):
                if baseline.ending is not Ending.PASSED:
                    failure = baseline.failure or f"{test} {baseline.ending.value}"
                    return Verdict(fault, Outcome.INVALID, baseline.seconds, failure)
            limit_s = GRACE_S + GRACE_TIMES * sum(baseline.seconds for baseline in baselines)
            with copy.with_fault(fault):
                trial = run_tests(copy, fault.tests, limit_s, self._stop)
        return Verdict(fault, outcome_of(fault, trial), trial.seconds, trial.failure)

    def _baseline(self, copy: TreeCopy, test: str) -> Trial:
        """Without it a fault would be killed by a test that fails anyway."""
        with self._locks[test]:
            if test not in self._baselines:
                self._baselines[test] = run_tests(copy, (test,), BASELINE_LIMIT_S, self._stop)
            return self._baselines[test]


def outcome_of(fault: Fault, trial: Trial) -> Outcome:
    """What a run of the fault's tests says of it."""
    if trial.ending is Ending.PASSED:
        return Outcome.SURVIVED if fault.survives is None else Outcome.ARGUED
    return {Ending.HUNG: Outcome.HUNG, Ending.STOPPED: Outcome.NOT_RUN}.get(trial.ending, Outcome.KILLED)
