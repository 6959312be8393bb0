"""What ends a sequence on the text side: stop strings, their minimum, the text of stop tokens, and the core's work."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import quire.llm
from quire import LLM, CompletionOutput, SamplingParams
from quire.core.plan import StepRecord
from quire.engine.channel import LocalChannel
from quire.engine.request_state import SequenceText
from quire.text.detokenizer import StopStrings
from quire.text.tokenizer import Tokenizer
from tests.tiny.checkpoints import END_OF_TEXT

MAX_TOKENS = 200
ALPHABET = list(range(0x61, 0x7B))


class Core:
    """An engine whose core works in this process, and the records of the steps that it computed."""

    def __init__(self, llm: LLM, records: list[StepRecord]) -> None:
        self.llm = llm
        self._records = records

    def ask(self, *params: SamplingParams, prompt: list[int] | None = None) -> list[CompletionOutput]:
        outputs = self.llm.generate([prompt or [10, 11]] * len(params), list(params), use_tqdm=False)
        return [item.outputs[0] for item in outputs]

    def take_work(self) -> dict[str, int]:
        """Tokens computed for each request since the last time, by the core's id, in the order of their arrival."""
        work: dict[str, int] = {}
        for record in self._records:
            for item in record.scheduled:
                work[item.request_id] = work.get(item.request_id, 0) + item.num_tokens
        self._records.clear()
        return work

    def num_running(self) -> float:
        return {item.name: item.value for item in self.llm.get_metrics()}["quire:num_requests_running"]


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def core(tiny_model: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    records: list[StepRecord] = []
    collect: Callable[[LocalChannel], Any] = LocalChannel.collect

    def recorded(channel: LocalChannel) -> Any:
        outputs = collect(channel)
        records.extend(item.record for item in outputs if item.record is not None)
        return outputs

    monkeypatch.setattr(LocalChannel, "collect", recorded)
    with LLM(model=str(tiny_model), async_scheduling=request.param, max_model_len=256) as llm:
        yield Core(llm, records)


def test_a_stop_string_ends_the_work_of_the_core(core: Core) -> None:
    """The core stops with the token that completes the string; with overlap it may have begun one more."""
    base: dict[str, Any] = dict(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, allowed_token_ids=ALPHABET)
    (free,) = core.ask(SamplingParams(**base))
    core.take_work()
    stop = free.text[9:12]
    end = free.text.index(stop) + len(stop)  # a token is a character here
    stopped, other = core.ask(SamplingParams(**base, stop=[stop]), SamplingParams(**base | {"max_tokens": 60}))
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (free.text[: end - len(stop)], "stop", stop)
    assert len(stopped.token_ids) == end and other.text == free.text[:60]
    first, second = core.take_work().values()
    assert first in (2 + end - 1, 2 + end), "its prompt of two tokens, and what it generated"
    assert second in (2 + 60 - 1, 2 + 60)
    # Nothing of it is left for a later request to run beside.
    assert core.num_running() == 0
    core.ask(SamplingParams(**base | {"max_tokens": 3}))
    assert list(core.take_work().values()) in ([2 + 3 - 1], [2 + 3])


def test_the_last_of_the_work_ends_too(core: Core) -> None:
    """A request alone: when its output is final, the core has none."""
    base: dict[str, Any] = dict(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, allowed_token_ids=ALPHABET)
    (free,) = core.ask(SamplingParams(**base))
    for params in (dict(stop=[free.text[3:6]]), dict(stop=["zzzzzz", free.text[5]]), dict(repetition_detection=dict(
        max_pattern_size=1, min_count=2), logit_bias={0x61: 100.0})):  # fmt: skip
        (found,) = core.ask(SamplingParams(**base | params))
        assert found.finish_reason in ("stop", "repetition") and len(found.token_ids) < 10
        assert core.num_running() == 0


def test_what_was_begun_is_dropped_when_the_caller_breaks_off(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupt none of its requests runs on beside the next ones."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    base: dict[str, Any] = dict(temperature=0.0, ignore_eos=True)
    short, long = SamplingParams(**base, max_tokens=3), SamplingParams(**base, max_tokens=MAX_TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(quire.llm, "progress_bar", lambda *_, **options: nullcontext(interrupt))
        with pytest.raises(KeyboardInterrupt):
            core.ask(short, long, long)
    core.take_work()
    assert core.num_running() == 0
    core.ask(short)
    assert len(core.take_work()) == 1


# The text of what ends a sequence.


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_the_text_of_the_end_of_sequence(core: Core, skip: bool, include: bool) -> None:
    """As in vLLM: it is shown where special tokens are shown and the stop is included, and nowhere else."""
    params: dict[str, Any] = dict(temperature=0.0, skip_special_tokens=skip, include_stop_str_in_output=include)
    wants_end = {0x61: 90.0, END_OF_TEXT: 100.0}
    (found,) = core.ask(SamplingParams(**params, min_tokens=2, logit_bias=wants_end))
    assert found.token_ids == [0x61, 0x61, END_OF_TEXT]
    assert found.text == ("aa<|endoftext|>" if include and not skip else "aa")
    assert (found.finish_reason, found.stop_reason) == ("stop", None)
    # Where it does not end the sequence it is a special token like any other.
    (found,) = core.ask(SamplingParams(**params, max_tokens=2, ignore_eos=True, logit_bias={END_OF_TEXT: 100.0}))
    assert (found.text, found.finish_reason) == ("" if skip else "<|endoftext|>" * 2, "length")


@pytest.mark.parametrize("include", [True, False])
def test_the_text_of_a_stop_token(core: Core, include: bool) -> None:
    params = SamplingParams(
        temperature=0.0, min_tokens=3, logit_bias={0x61: 90.0, 0x62: 100.0}, stop_token_ids=[0x62],
        include_stop_str_in_output=include,
    )  # fmt: skip
    (found,) = core.ask(params)
    assert (found.text, found.token_ids) == ("aaab" if include else "aaa", [0x61] * 3 + [0x62])
    assert (found.finish_reason, found.stop_reason) == ("stop", 0x62)


@pytest.mark.parametrize("min_tokens", range(8))
def test_a_stop_string_before_the_minimum_ends_nothing(core: Core, min_tokens: int) -> None:
    """The sequence is "aaaaaa...": it ends at the first token that both completes a stop string and reaches the
    minimum."""
    params: dict[str, Any] = dict(temperature=0.0, max_tokens=12, min_tokens=min_tokens, logit_bias={0x61: 100.0})
    (found,) = core.ask(SamplingParams(**params, stop=["aaa"]))
    count = max(3, min_tokens)
    assert (len(found.token_ids), found.text, found.stop_reason) == (count, "a" * (count - 3), "aaa")


def expected_end(text: str, stops: list[str], min_tokens: int) -> tuple[int, str] | None:
    """By brute force: the token (a character) at which the sequence ends, and the string that ended it."""
    for end in range(max(1, min_tokens), len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_may_begin_before_the_minimum(tiny_model: Path, include: bool) -> None:
    tokenizer = Tokenizer.from_directory(tiny_model)
    for text, stops in (
        ("xxabyyabzz", ["ab"]),
        ("xabcdabcde", ["abcd", "bc", "e"]),
        ("aabaabaabaab", ["baab", "aaab"]),
    ):
        for min_tokens in range(len(text) + 1):
            params = SamplingParams(
                stop=stops, min_tokens=min_tokens, max_tokens=50, include_stop_str_in_output=include
            )  # fmt: skip
            state = SequenceText(tokenizer, params, StopStrings(stops, include), [10])
            pieces, matched, count = [], None, 0
            while matched is None and count < len(text):
                piece, matched = state.push([ord(text[count])])
                pieces.append(piece)
                count += 1
            expected = expected_end(text, stops, min_tokens)
            if expected is None:
                assert matched is None
                assert "".join([*pieces, state.flush()[0]]) == text
            else:
                assert (count, matched) == expected
                assert "".join(pieces) == text[: count if include else count - len(expected[1])]
