"""A reader that falls behind loses nothing: what it reads, joined, is what was put, in that order."""

import asyncio
import random
from typing import Any

import pytest

from quire.engine.inputs import InputProcessor, RequestLimits
from quire.engine.stream import MAX_UNREAD, Stream, joined
from quire.outputs import CompletionOutput, Logprob, RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams

LIMITS = RequestLimits(max_model_len=64, vocab_size=320, eos_token_ids=(), seed=0, has_priorities=False)


def stream_of(kind: RequestOutputKind) -> Stream:
    params = SamplingParams(output_kind=kind, detokenize=False)
    return Stream(InputProcessor(None, LIMITS).parse([1], params))


def output_of(*choices: CompletionOutput, finished: bool = False, cached: int = 0) -> RequestOutput:
    return RequestOutput("x", None, [1], list(choices), finished, num_cached_tokens=cached)


def difference(index: int, number: int, *, logprobs: bool = True, reason: str | None = None) -> CompletionOutput:
    """One token, `number`, with its text and its log-probability."""
    found = [{number: Logprob(-float(number), 1, str(number))}] if logprobs else None
    return CompletionOutput(index, f"<{number}>", [number], -float(number), found, reason, "end" if reason else None)


class Reader:
    """What has been read of each sequence, joined as a caller would."""

    def __init__(self) -> None:
        self.sequences: dict[int, list[Any]] = {}
        self.num_reads = 0
        self.last: RequestOutput | None = None

    async def read(self, stream: Stream) -> None:
        self.last = await stream.get(None)
        self.num_reads += 1
        assert [item.index for item in self.last.outputs] == sorted({item.index for item in self.last.outputs})
        for item in self.last.outputs:
            known = self.sequences.setdefault(item.index, ["", [], [], None, None, None])
            known[0] += item.text
            known[1] += item.token_ids
            known[2] = None if item.logprobs is None else [*known[2], *item.logprobs]
            known[3:] = item.cumulative_logprob, item.finish_reason, item.stop_reason


@pytest.mark.parametrize("logprobs", [True, False])
async def test_differences_are_joined_for_a_slow_reader(logprobs: bool) -> None:
    draw = random.Random(6)
    for _ in range(40):
        stream, reader, number = stream_of(RequestOutputKind.DELTA), Reader(), 0
        expected: dict[int, list[Any]] = {}
        for step in range(draw.randint(1, 90)):
            choices = []
            for index in sorted(draw.sample(range(3), draw.randint(1, 3))):
                number += 1
                item = difference(index, number, logprobs=logprobs, reason=draw.choice([None, None, "stop"]))
                choices.append(item)
                known = expected.setdefault(index, ["", [], [] if logprobs else None, None, None, None])
                known[0] += item.text
                known[1] += item.token_ids
                if logprobs:
                    known[2] += item.logprobs
                known[3:] = item.cumulative_logprob, item.finish_reason, item.stop_reason
            stream.put(output_of(*choices, cached=step))
            assert len(stream._unread) <= MAX_UNREAD
            while len(stream._unread) and draw.random() < 0.3:
                await reader.read(stream)
        while len(stream._unread):
            await reader.read(stream)
        assert reader.sequences == expected
        assert reader.last is not None and reader.last.num_cached_tokens == step


async def test_one_by_one_as_long_as_few_are_unread() -> None:
    stream = stream_of(RequestOutputKind.DELTA)
    for number in range(MAX_UNREAD):
        stream.put(output_of(difference(0, number)))
    assert len(stream._unread) == MAX_UNREAD
    for number in range(MAX_UNREAD):
        assert (await stream.get(None)).outputs[0].token_ids == [number]
    for number in range(MAX_UNREAD + 1):
        stream.put(output_of(difference(0, number)))
    assert len(stream._unread) == 1
    assert (await stream.get(None)).outputs[0].token_ids == list(range(MAX_UNREAD + 1))


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
async def test_of_whole_outputs_the_last_is_enough(kind: RequestOutputKind) -> None:
    stream = stream_of(kind)
    outputs = [output_of(CompletionOutput(0, "x" * count, [7] * count)) for count in range(MAX_UNREAD + 1)]
    for output in outputs:
        stream.put(output)
    assert await stream.get(None) is outputs[-1]
    assert len(stream._unread) == 0


async def test_a_failure_comes_after_what_was_made_before_it() -> None:
    stream = stream_of(RequestOutputKind.DELTA)
    stream.put(output_of(difference(0, 1)))
    stream.put(output_of(difference(0, 2)))
    stream.put(RuntimeError("the engine has stopped"))
    for number in (1, 2):
        assert (await stream.get(None)).outputs[0].token_ids == [number]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await stream.get(None)


async def test_a_reader_waits_for_the_next() -> None:
    """For an output, for a failure, or until its deadline, which a past one does not outlive."""
    stream = stream_of(RequestOutputKind.DELTA)
    late = asyncio.ensure_future(stream.get(asyncio.get_running_loop().time()))
    for _ in range(10):
        await asyncio.sleep(0)
    assert late.done() and isinstance(late.exception(), TimeoutError)
    waiting = asyncio.ensure_future(stream.get(None))
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.put(output_of(difference(0, 3)))
    assert (await waiting).outputs[0].token_ids == [3]
    waiting = asyncio.ensure_future(stream.get(None))
    await asyncio.sleep(0)
    assert not waiting.done(), "the event of the output before is over"
    stream.put(ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        await waiting


def test_one_output_is_joined_as_it_is() -> None:
    one = output_of(difference(0, 1), difference(2, 2))
    assert joined([one]) is one
    two = joined([one, output_of(difference(2, 3), finished=True)])
    assert two.finished
    assert [(item.index, item.text, item.token_ids) for item in two.outputs] == [(0, "<1>", [1]), (2, "<2><3>", [2, 3])]
