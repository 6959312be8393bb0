"""From deltas of tokens to outputs: what a caller of each kind sees, and when."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quire.core.plan import TokenDelta, TokenLogprobs
from quire.engine import request_state
from quire.engine.inputs import InputProcessor, RequestLimits
from quire.engine.request_state import RequestState
from quire.outputs import Logprob, RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.text.detokenizer import StopStrings
from quire.text.tokenizer import Tokenizer
from tests.text.small_tokenizers import fallback_bpe, no_decoder, write_directory

LIMITS = RequestLimits(max_model_len=256, vocab_size=320, eos_token_ids=(256,), seed=0, has_priorities=False)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    """Token `b` is the byte `b`."""
    return Tokenizer.from_directory(tiny_model)


def state_of(tokenizer: Tokenizer, prompt: Sequence[int] = (10, 11, 12), **params: Any) -> RequestState:
    parsed = InputProcessor(tokenizer, LIMITS).parse(list(prompt), SamplingParams(**{"max_tokens": 50, **params}))
    return RequestState(parsed, tokenizer, arrival_s=3.0)


def delta(state: RequestState, text: str, index: int = 0, **more: Any) -> TokenDelta:
    """A delta of a sequence; a character of `text` is a token."""
    request_id = state.parsed.sequences[index].request_id
    return TokenDelta(request_id, tuple(map(ord, text)), **more)


def logprobs_of(text: str, value: float = -0.5) -> tuple[TokenLogprobs, ...]:
    """For each character: its own, then the best, which is another one."""
    return tuple(TokenLogprobs((ord(one), 0x2A), (value, -0.25), (7, 1)) for one in text)


def texts(output: RequestOutput | None) -> list[tuple[int, str]]:
    assert output is not None
    return [(item.index, item.text) for item in output.outputs]


def test_a_cumulative_stream_says_everything_each_time(tokenizer: Tokenizer) -> None:
    state = state_of(tokenizer, n=2)
    state.apply(delta(state, "ab", 0))
    assert texts(state.output()) == [(0, "ab"), (1, "")]
    state.apply(delta(state, "c", 1))
    assert texts(state.output()) == [(0, "ab"), (1, "c")]
    state.apply(delta(state, "d", 0, finish_reason="length"))
    output = state.output()
    assert texts(output) == [(0, "abd"), (1, "c")] and output is not None and not output.finished
    state.apply(delta(state, "e", 1, finish_reason="length"))
    output = state.output()
    assert texts(output) == [(0, "abd"), (1, "ce")] and output is not None and output.finished
    assert [item.token_ids for item in output.outputs] == [[97, 98, 100], [99, 101]]
    assert output.metrics is not None and output.metrics.arrival_s == 3.0


def test_a_final_stream_says_it_once(tokenizer: Tokenizer) -> None:
    state = state_of(tokenizer, n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    state.apply(delta(state, "ab", 0, finish_reason="length"))
    assert state.output() is None
    state.apply(delta(state, "c", 1))
    assert state.output() is None
    state.apply(delta(state, "d", 1, finish_reason="length"))
    assert texts(state.output()) == [(0, "ab"), (1, "cd")]


def test_a_stream_of_differences_says_what_is_new(tokenizer: Tokenizer) -> None:
    """Text, tokens and log-probabilities of those sequences alone that have changed, each once."""
    state = state_of(tokenizer, n=3, logprobs=1, output_kind=RequestOutputKind.DELTA)
    given: dict[int, list[Any]] = {index: ["", [], []] for index in range(3)}
    expected: dict[int, list[Any]] = {index: ["", [], []] for index in range(3)}
    draw, totals = random.Random(1), [0.0, 0.0, 0.0]
    for step in range(40):
        talking = draw.sample(range(3), draw.randint(1, 3)) if step < 39 else [0, 1, 2]
        for index in talking:
            text = "".join(draw.choices("abcdef", k=draw.randint(1, 2)))
            reason = "length" if step == 39 else None
            state.apply(delta(state, text, index, logprobs=logprobs_of(text, -0.5 - index), finish_reason=reason))
            expected[index][0] += text
            expected[index][1] += map(ord, text)
            expected[index][2] += [
                {ord(one): Logprob(-0.5 - index, 7, one), 0x2A: Logprob(-0.25, 1, "*")} for one in text
            ]
            totals[index] += (-0.5 - index) * len(text)
        output = state.output()
        assert output is not None and [item.index for item in output.outputs] == sorted(talking)
        for item in output.outputs:
            given[item.index][0] += item.text
            given[item.index][1] += item.token_ids
            given[item.index][2] += item.logprobs or []
            assert item.cumulative_logprob == totals[item.index], "of all tokens so far, by the chosen ones"
        assert output.finished == (step == 39)
    assert given == expected


def test_a_request_without_text_or_logprobs_has_none(tokenizer: Tokenizer) -> None:
    state = state_of(tokenizer, detokenize=False)
    state.apply(delta(state, "ab", finish_reason="length"))
    output = state.output()
    assert output is not None
    (item,) = output.outputs
    assert (item.text, item.token_ids, item.logprobs, item.cumulative_logprob) == ("", [97, 98], None, None)
    assert output.prompt_logprobs is None


def test_prompt_logprobs_are_those_of_the_first_sequence(tokenizer: Tokenizer) -> None:
    """Each sequence of the core computes them; the request has one list, which may come in parts."""
    state = state_of(tokenizer, n=2, prompt_logprobs=1)
    state.apply(delta(state, "", 1, prompt_logprobs=logprobs_of("xy", -9.0)))
    state.apply(delta(state, "", 0, prompt_logprobs=logprobs_of("v")))
    state.apply(delta(state, "a", 0, prompt_logprobs=logprobs_of("w")))
    output = state.output()
    assert output is not None
    best = Logprob(-0.25, 1, "*")
    assert output.prompt_logprobs == [
        None, {ord("v"): Logprob(-0.5, 7, "v"), 0x2A: best}, {ord("w"): Logprob(-0.5, 7, "w"), 0x2A: best}
    ]  # fmt: skip


def test_a_token_that_is_among_the_best_is_there_once(tokenizer: Tokenizer) -> None:
    state = state_of(tokenizer, logprobs=2)
    state.apply(delta(state, "a", logprobs=(TokenLogprobs((97, 98, 97), (-0.5, -0.1, -0.5), (2, 1, 2)),)))
    output = state.output()
    assert output is not None and output.outputs[0].logprobs is not None
    assert list(output.outputs[0].logprobs[0].items()) == [(97, Logprob(-0.5, 2, "a")), (98, Logprob(-0.1, 1, "b"))]


def test_what_the_cache_gave_is_said_to_the_end_and_is_not_what_siblings_shared(tokenizer: Tokenizer) -> None:
    state = state_of(tokenizer, n=2)
    for index, cached in ((1, 48), (0, 16), (1, 48), (0, 0)):
        state.apply(delta(state, "a", index, num_cached_tokens=cached))
    output = state.output()
    assert output is not None and output.num_cached_tokens == 16


@pytest.mark.parametrize("reason", ["length", "stop", "abort", "error"])
def test_text_that_was_held_comes_at_the_end(tokenizer: Tokenizer, reason: str) -> None:
    """What may have begun a stop string, and half of a character."""
    state = state_of(tokenizer, stop=["bcd"])
    assert state.apply(delta(state, "abc")) is None
    assert texts(state.output()) == [(0, "a")]
    half = "\xe5" + ("x" if reason == "stop" else "")  # a stop token's own text is not shown
    assert state.apply(delta(state, half, finish_reason=reason)) == reason
    assert texts(state.output()) == [(0, "abc\ufffd")]
    assert state.finished


def test_a_stop_string_at_the_end_is_the_reason(tokenizer: Tokenizer) -> None:
    """The last token that `max_tokens` allows completes it."""
    state = state_of(tokenizer, stop=["bc"])
    state.apply(delta(state, "ab"))
    assert state.apply(delta(state, "c", finish_reason="length")) == "stop"
    output = state.output()
    assert output is not None
    (item,) = output.outputs
    assert (item.text, item.finish_reason, item.stop_reason) == ("a", "stop", "bc")


def test_after_its_end_a_sequence_takes_nothing(tokenizer: Tokenizer) -> None:
    """Steps in flight may bring more of a sequence that a stop string ended."""
    state = state_of(tokenizer, n=2, stop=["b"])
    assert state.apply(delta(state, "ab", 0)) == "stop"
    assert state.apply(delta(state, "c", 0)) is None
    assert state.apply(delta(state, "d", 0, finish_reason="length")) is None
    assert not state.finished
    assert state.apply(delta(state, "c", 1, finish_reason="length")) == "length"
    output = state.output()
    assert output is not None and output.finished
    assert [(item.text, item.finish_reason, item.stop_reason) for item in output.outputs] == [
        ("a", "stop", "b"), ("c", "length", None)
    ]  # fmt: skip
    assert output.outputs[0].token_ids == [97, 98]


def test_the_first_error_is_told(tokenizer: Tokenizer) -> None:
    state = state_of(tokenizer, n=3)
    state.apply(delta(state, "", 0, finish_reason="length"))
    state.apply(delta(state, "", 1, finish_reason="error", error="first"))
    state.apply(delta(state, "", 2, finish_reason="error", error="second"))
    output = state.output()
    assert output is not None and output.error == "first"
    assert [item.finish_reason for item in output.outputs] == ["length", "error", "error"]


def test_counts_and_times_of_each_sequence(tokenizer: Tokenizer) -> None:
    state = state_of(tokenizer, n=2)
    first, second = (new.request_id for new in state.parsed.sequences)
    assert state.token_came(first, 10.0) is None
    assert state.token_came(second, 11.0) is None
    assert state.token_came(first, 12.5) == 2.5
    for text, index, counts in (("ab", 0, (2, 0, 2)), ("cdef", 1, (2, 4, 4)), ("ghi", 0, (5, 4, 5))):
        state.apply(delta(state, text, index))
        assert (state.num_tokens(first), state.num_tokens(second), state.longest) == counts


@pytest.mark.parametrize("min_tokens", [0, 4, 5, 6])
def test_a_repetition_ends_a_sequence_after_the_minimum(tokenizer: Tokenizer, min_tokens: int) -> None:
    """The text that was held for a stop string belongs to it."""
    state = state_of(
        tokenizer, min_tokens=min_tokens, stop=["aa!"], repetition_detection={"max_pattern_size": 1, "min_count": 4}
    )  # fmt: skip
    reasons = [state.apply(delta(state, "a")) for _ in range(max(4, min_tokens))]
    assert reasons == [None] * (len(reasons) - 1) + ["repetition"]
    output = state.output()
    assert output is not None
    (item,) = output.outputs
    assert (item.text, item.finish_reason, item.stop_reason) == (
        "a" * len(reasons), "repetition", "repetition_detected"
    )  # fmt: skip


@pytest.mark.parametrize("spaces", [True, False])
def test_spaces_between_special_tokens_are_as_asked(tmp_path: Path, spaces: bool) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, no_decoder()))
    ids = tokenizer.encode("<s> </s> hello", add_special_tokens=False)
    params = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
    state = state_of(tokenizer, ids[2:], **params)
    state.apply(TokenDelta(state.parsed.sequences[0].request_id, tuple(ids), finish_reason="length"))
    assert texts(state.output()) == [(0, " <s> </s> hello" if spaces else " <s></s> hello")]


def test_the_text_goes_on_from_the_prompt(tmp_path: Path) -> None:
    """A SentencePiece model writes a space before each word but the first of a text."""
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, fallback_bpe()))
    limits = RequestLimits(256, tokenizer.vocab_size, (), 0, has_priorities=False)
    hello, world = (tokenizer.encode(word, add_special_tokens=False) for word in ("hello", "world"))
    parsed = InputProcessor(tokenizer, limits).parse(hello, SamplingParams())
    state = RequestState(parsed, tokenizer, 0.0)
    state.apply(TokenDelta(parsed.sequences[0].request_id, tuple(world), finish_reason="length"))
    assert texts(state.output()) == [(0, " world")]


def test_stop_strings_are_prepared_once_for_all_sequences(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Counted(StopStrings):
        def __init__(self, *arguments: Any) -> None:
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(request_state, "StopStrings", Counted)
    state = state_of(tokenizer, n=3, temperature=1.0, stop=["bc", "cd"])
    assert len(made) == 1
    for index, text in enumerate(("abcd", "acd", "ab")):
        state.apply(delta(state, text, index, finish_reason="length"))
    assert texts(state.output()) == [(0, "a"), (1, "a"), (2, "ab")]
