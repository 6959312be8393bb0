"""Law: Ctrl-C at any line of a call of `LLM` leaves nothing behind, and the next call gives the right answer.

An interrupt is raised at every line of Quire's own code that a call runs through, at the first and at a later time that
it does; also in the cleaning up after an interrupt. Not at lines that open a `with`: Python calls `__exit__` of a lock
there, where no signal handler ever runs, and the tracer would.
"""

import linecache
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import quire
from quire import LLM, SamplingParams
from quire.core.engine_core import OverlappingCore

SOURCE = str(Path(quire.__file__).parent)
PROMPTS = [[5, 6, 7] * 12, [5, 6, 7] * 12 + [9], [30, 31]]
PARAMS = [
    SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, presence_penalty=0.5),
    SamplingParams(max_tokens=4, seed=7, n=2, ignore_eos=True, logprobs=1, prompt_logprobs=0),
    SamplingParams(max_tokens=3, seed=8, ignore_eos=True, stop="zz"),
]
Place = tuple[str, int]


def answers(llm: LLM) -> list[Any]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], PARAMS, use_tqdm=False)
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


@contextmanager
def tracing(on_line: Callable[[Place], None]) -> Iterator[None]:
    """Every line of the package that this thread runs."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(SOURCE):
            return None
        if event == "line" and not linecache.getline(name, frame.f_lineno).lstrip().startswith("with "):
            on_line((name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(llm: LLM) -> dict[Place, int]:
    """How often a call runs through each line."""
    counts: dict[Place, int] = {}

    def count(place: Place) -> None:
        counts[place] = counts.get(place, 0) + 1

    with tracing(count):
        answers(llm)
    return counts


class Interrupt:
    """Raises at one line, when it is met for the given time; then, if told so, again so many lines later."""

    def __init__(self, place: Place, time: int, again: int | None) -> None:
        self._place, self._time, self._again = place, time, again
        self.num_raised = 0

    def __call__(self, place: Place) -> None:
        if self.num_raised == 1 and self._again is not None:
            self._again -= 1
            if self._again < 0:
                self._again = None
                self.num_raised = 2
                raise KeyboardInterrupt
        if self.num_raised == 0 and place == self._place:
            self._time -= 1
            if self._time == 0:
                self.num_raised = 1
                raise KeyboardInterrupt


def left_over(llm: LLM) -> dict[str, Any]:
    """Of a call, once another has ended: nothing."""
    engine, core = llm._engine, llm._engine.channel._core  # type: ignore[attr-defined]
    runner = core._executor._runner
    timelines = engine.observer.timelines  # type: ignore[attr-defined]
    core.check()
    return {
        "requests": len(core.scheduler._requests),
        "states": len(engine._states) + len(engine._unscheduled) + len(engine._made),
        "waiting": engine.queue.num_waiting,
        "timelines": len(timelines._live) + len(timelines._requests) - len(timelines._ended),
        "steps in flight": max(0, len(runner._in_flight) - isinstance(core, OverlappingCore)),
        "rows": len(runner._dirty_rows),
        "lock": llm._lock.locked(),
        "broken": not llm._is_whole,
    }


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_an_interrupt_at_any_line_leaves_nothing(tiny_model: Path, overlap: bool) -> None:
    numbers = random.Random(0)
    with LLM(model=str(tiny_model), max_num_seqs=3, max_model_len=64, async_scheduling=overlap) as llm:
        expected = answers(llm)
        nothing = dict.fromkeys(left_over(llm), 0)
        places = lines_of(llm)
        assert len(places) > 400
        assert {Path(name).name for name, _ in places} >= {"llm.py", "engine.py", "scheduler.py", "model_runner.py"}
        num_raised = 0
        for place, count in places.items():
            for time in {1, 1 if overlap else numbers.randint(1, count)}:
                interrupt = Interrupt(place, time, numbers.choice([None, numbers.randint(0, 150)]))
                try:
                    with tracing(interrupt):
                        answers(llm)
                except KeyboardInterrupt:
                    pass
                num_raised += interrupt.num_raised
                assert answers(llm) == expected, f"interrupted at {place}, time {time}"
                assert left_over(llm) == nothing, f"interrupted at {place}, time {time}"
        assert num_raised >= len(places)
        print(f"{num_raised} interrupts at {len(places)} lines")
