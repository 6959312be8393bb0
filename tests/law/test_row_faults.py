"""One bad request hurts one request: faults at named points of everything that touches a row.

At each point the work of one request raises. Exactly that request fails; the canaries beside it, one of which shares
its prefix, end bit for bit as if it had never been; no row and no block is lost; and the engine goes on.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from quire import AsyncLLM, SamplingParams
from quire.engine.engine import FAULTY
from quire.engine.request_state import RequestState
from quire.errors import RequestFailedError
from quire.outputs import RequestOutput
from quire.runner import model_runner
from quire.sampling import logprobs as logprobs_module
from quire.structured_params import StructuredOutputsParams
from quire.text.detokenizer import StopSearch
from tests.tiny.checkpoints import make_tiny

SEED, MARK, SHARED = 666, 77, list(range(20, 60))
VICTIM = SamplingParams(
    max_tokens=20, ignore_eos=True, seed=SEED, temperature=1.0, logprobs=7, prompt_logprobs=3, min_tokens=5,
    stop=["\0never"], logit_bias={5: 1.0}, allowed_token_ids=list(range(100)), bad_words=["hello world"],
    presence_penalty=0.5, typical_p=0.95,
)  # fmt: skip
HELD = SamplingParams(
    max_tokens=20, seed=SEED, temperature=1.0, structured_outputs=StructuredOutputsParams(regex=r"[a-z ]*!")
)
"""The victim at the points of grammars."""
CANARIES = [
    ([*SHARED, 3], SamplingParams(max_tokens=24, ignore_eos=True, temperature=0)),
    ([9, 8, 7], SamplingParams(max_tokens=24, ignore_eos=True, seed=3, temperature=1.0, logprobs=2)),
    ([6] * 30, SamplingParams(max_tokens=24, min_tokens=9, seed=4, temperature=1.0, frequency_penalty=0.7)),
]


class Fault(Exception):
    """Thrown on purpose."""


class Victim:
    """Knows which row is the victim's, and which rows are being computed."""

    def __init__(self, engine: AsyncLLM, patch: pytest.MonkeyPatch) -> None:
        channel: Any = engine._engine.channel
        self.patch, self.engine, self.core = patch, engine, channel._core
        self.runner = self.core._executor._runner
        self.row: int | None = None
        self.computed: list[int] = []
        self.num_thrown = 0
        self.watch(self.runner._rows, "enter", self._entering)
        self.watch(self.runner._rows, "gather", self._gathering)

    def _entering(self, new: Any) -> None:
        if new.sampling.seed == SEED:
            self.row = new.row
        elif new.row == self.row:
            self.row = None  # the victim has left it

    def _gathering(self, scheduled: Any, num_outputs: Any, ops: Any) -> None:
        self.computed = [item.row for item in scheduled]

    def watch(self, owner: Any, name: str, see: Callable[..., None]) -> None:
        """Call `see` with the arguments before `owner.name`."""
        plain = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            see(*args, **kwargs)
            return plain(*args, **kwargs)

        self.patch.setattr(owner, name, watched)

    def throw(self, owner: Any, name: str, when: Callable[..., bool]) -> None:
        """`owner.name` raises when `when` holds of its arguments."""

        def see(*args: Any, **kwargs: Any) -> None:
            if when(*args, **kwargs):
                self.num_thrown += 1
                raise Fault("secret text of the fault")

        self.watch(owner, name, see)

    def is_computed(self, *_: Any, **__: Any) -> bool:
        return self.row is not None and self.row in self.computed


def feature(victim: Victim, kind: str) -> Any:
    return next(item for item, _ in victim.runner._sampler._features if type(item).__name__ == kind)


def in_row(victim: Victim) -> Callable[..., bool]:
    return lambda row, *_: row == victim.row


def in_rows(victim: Victim) -> Callable[..., bool]:
    return lambda _, rows, *__: victim.row in rows


def of_victim(new: Any) -> bool:
    return bool(new.sampling.seed == SEED)


def named_victim(state: RequestState, *_: Any) -> bool:
    return state.parsed.request_id.endswith("victim")


def not_finite(victim: Victim) -> None:
    plain = victim.runner._sampler.sample

    def sample(logits: Any, rows: Any, positions: Any) -> Any:
        if victim.row in rows:
            victim.num_thrown += 1
            logits[list(rows).index(victim.row)] = float("nan")
        return plain(logits, rows, positions)

    victim.patch.setattr(victim.runner._sampler, "sample", sample)


def of_new_state(parsed: Any) -> bool:
    return bool(parsed.request_id.endswith("victim"))


POINTS: dict[str, Callable[[Victim], None]] = {
    "rows.enter": lambda v: v.throw(v.runner._rows, "enter", of_victim),
    "rows.extend": lambda v: v.throw(v.runner._rows, "extend", lambda row, ids: row == v.row and v.computed != []),
    "rows.gather": lambda v: v.throw(v.runner._rows, "gather", lambda s, *_: v.row in [item.row for item in s]),
    "rows.append": lambda v: v.throw(v.runner._rows, "append", lambda rows, _: v.row in rows),
    "model.forward": lambda v: v.throw(v.runner._model, "forward", lambda ids, *_: MARK in ids.tolist()),
    "model.logits": lambda v: v.throw(v.runner._model, "logits", v.is_computed),
    "logits not finite": not_finite,
    "ops.sample": lambda v: v.throw(v.runner._ops, "sample", lambda _, batch: SEED in batch.seeds.tolist()),
    "sampler.add": lambda v: v.throw(v.runner._sampler, "add", of_victim),
    "masks enter": lambda v: v.throw(feature(v, "LogitMasks"), "add", of_victim),
    "masks apply": lambda v: v.throw(feature(v, "LogitMasks"), "apply", in_rows(v)),
    "bad words": lambda v: v.throw(feature(v, "LogitMasks"), "on_token", in_row(v)),
    "penalties": lambda v: v.throw(feature(v, "Penalties"), "on_token", in_row(v)),
    "typical": lambda v: v.throw(feature(v, "Typical"), "apply", in_rows(v)),
    "logprobs": lambda v: v.throw(logprobs_module, "token_logprobs", lambda *args: args[3] == 7),
    "prompt logprobs": lambda v: v.throw(model_runner, "token_logprobs", lambda *args: args[3] == 3),
    "grammar enter": lambda v: v.throw(feature(v, "GrammarMasks"), "add", of_victim),
    "grammar apply": lambda v: v.throw(feature(v, "GrammarMasks"), "apply", in_rows(v)),
    "grammar decide": lambda v: v.throw(feature(v, "GrammarMasks"), "decide", in_row(v)),
    "grammar follow": lambda v: v.throw(feature(v, "GrammarMasks"), "on_token", in_row(v)),
    "grammar force": lambda v: v.throw(feature(v, "GrammarMasks"), "forced", in_row(v)),
    "grammar rule": lambda v: v.throw(v.core.scheduler._rules[0], "ready", lambda one: of_victim(one.new)),
    "request state": lambda v: v.throw(RequestState, "__init__", lambda self, parsed, *_: of_new_state(parsed)),
    "detokenizer": lambda v: v.throw(RequestState, "_push_text", named_victim),
    "text of logprobs": lambda v: v.throw(RequestState, "_position", named_victim),
    "stop strings": lambda v: v.throw(StopSearch, "push", lambda self, *_, **__: self._stops.first.match("\0")),
    "output": lambda v: v.throw(RequestState, "output", named_victim),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("tiny"), tokenizer=True))


@contextmanager
def engine(directory: str, overlap: bool = False) -> Iterator[AsyncLLM]:
    made = AsyncLLM(
        directory, max_num_seqs=8, max_num_batched_tokens=64, num_gpu_blocks_override=128, async_scheduling=overlap
    )
    try:
        yield made
    finally:
        made.close()


async def one(engine: AsyncLLM, prompt: list[int], params: SamplingParams, name: str) -> RequestOutput | Exception:
    last: RequestOutput | None = None
    try:
        async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id=name):
            last = output
    except RequestFailedError as error:
        return error
    assert last is not None and last.finished
    return last


def run(engine: AsyncLLM, *, victim: bool, params: SamplingParams = VICTIM) -> list[RequestOutput | Exception]:
    async def together() -> list[RequestOutput | Exception]:
        asked = [(prompt, asking, f"canary {number}") for number, (prompt, asking) in enumerate(CANARIES)]
        if victim:
            asked.insert(0, (SHARED + [MARK] * 9, params, "victim"))
        return list(await asyncio.gather(*(one(engine, *item) for item in asked)))

    return asyncio.run(together())


def said(output: RequestOutput | Exception) -> list[Any]:
    assert isinstance(output, RequestOutput), output
    return [(item.text, item.token_ids, item.logprobs, item.finish_reason) for item in output.outputs]


@pytest.fixture(scope="module")
def undisturbed(directory: str) -> list[Any]:
    with engine(directory) as alone:
        return [said(output) for output in run(alone, victim=False)]


def test_there_are_twenty_points() -> None:
    assert len(POINTS) >= 20


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_one_fault_fails_one_request(
    point: str, overlap: bool, directory: str, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(directory, overlap) as under_test:
        with monkeypatch.context() as patch:
            victim = Victim(under_test, patch)
            POINTS[point](victim)
            params = HELD if point.startswith("grammar") else VICTIM
            failed, *canaries = run(under_test, victim=True, params=params)
            assert victim.num_thrown >= 1
        if isinstance(failed, RequestOutput):
            assert failed.outputs[0].finish_reason == "error" and failed.error is not None
            assert "secret" not in failed.error
        else:
            assert "Fault" in str(failed) and "secret" not in str(failed)
        assert [said(output) for output in canaries] == undisturbed
        assert [said(output) for output in run(under_test, victim=False)] == undisturbed, "and it goes on"
        under_test.check()
        scheduler = victim.core.scheduler
        assert scheduler._pool.num_free == scheduler._pool.num_blocks
        assert len(scheduler._free_rows) == 8 and not under_test._streams
        assert under_test._engine.queue.num_waiting == 0 and not under_test.observer.timelines._live


CLEARED = ("LogitMasks", "Penalties", "Typical")


def clearing(victim: Victim, point: str) -> Any:
    owners = {"rows": victim.runner._rows, "sampler": victim.runner._sampler}
    return owners[point] if point in owners else feature(victim, point)


async def all_rows(engine: AsyncLLM, params: SamplingParams) -> None:
    for output in await asyncio.gather(*(one(engine, [1, 2], params, f"next {number}") for number in range(8))):
        said(output)


@pytest.mark.parametrize("point", ["rows", "sampler", *CLEARED])
def test_a_fault_while_a_row_is_cleared_reaches_no_request(
    point: str, directory: str, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request of the row has had its end; and the next request of the row finds nothing of it."""
    with engine(directory) as under_test:
        whole = [said(output) for output in run(under_test, victim=True)]
        with monkeypatch.context() as patch:
            victim = Victim(under_test, patch)
            victim.throw(clearing(victim, point), "remove", lambda row: row == victim.row and not victim.num_thrown)
            assert [said(output) for output in run(under_test, victim=True)] == whole
            short = SamplingParams(max_tokens=3, ignore_eos=True, frequency_penalty=0.1)
            for _ in range(2):  # removals travel with the next plan; and all rows are entered again
                asyncio.run(all_rows(under_test, short))
            assert victim.num_thrown == 1 and not victim.runner._dirty_rows
        assert [said(output) for output in run(under_test, victim=False)] == undisturbed
        asyncio.run(all_rows(under_test, SamplingParams(max_tokens=1, temperature=0)))
        for item in CLEARED:
            assert not [held for held in vars(feature(victim, item)).values() if isinstance(held, dict) and held]
        assert not victim.runner._sampler._edited


def test_a_row_that_cannot_be_cleared_is_not_entered(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather the core starts anew, again and again, until those that would enter fail, and at last the engine stops."""
    with engine(directory) as under_test:
        victim = Victim(under_test, monkeypatch)
        left: list[int] = []

        def is_left(row: int) -> bool:
            left.extend([row] * (row == victim.row))
            return row in left

        victim.throw(victim.runner._sampler, "remove", is_left)
        with pytest.raises(Exception, match=r"the engine ((has )?stopped|failed more than once)"):
            run(under_test, victim=True)
            for _ in range(2):
                asyncio.run(all_rows(under_test, SamplingParams(max_tokens=3)))
        assert victim.num_thrown >= 2


def test_a_broken_device_is_no_rows_fault(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no row of several can be computed, the engine is at fault, and says so: to those that were there while the
    core started anew, and then to all."""
    with engine(directory) as under_test:
        victim = Victim(under_test, monkeypatch)
        broken: list[bool] = []

        def breaks(*_: Any) -> bool:
            broken.extend([True] * (len(victim.computed) > 1))
            return bool(broken)

        victim.throw(victim.runner._model, "forward", breaks)
        for output in run(under_test, victim=True):
            assert isinstance(output, RequestOutput) and output.error == FAULTY
        with pytest.raises(Exception, match="the engine stopped"):
            run(under_test, victim=True)
        assert not under_test.is_healthy
