"""Bodies in and answers out, field by field: what JSON's types leave open, where a limit lies, what is listed."""

import random
from typing import Any

import msgspec
import pytest

from quire.engine.queue import ANYBODY
from quire.errors import InvalidRequestError, PromptTooLongError
from quire.outputs import CompletionOutput, Logprob, PositionLogprobs
from quire.sampling_params import SamplingParams
from quire.server.doors.openai import choice_parts
from quire.server.doors.openai.bodies import COMPLETION
from quire.server.doors.openai.parse import (
    ChatCall,
    CompletionCall,
    bound_logprobs,
    parse_chat,
    parse_completion,
    truncate_prompt,
)
from quire.server.http.errors import ApiError
from quire.server.http.keys import cache_namespace, caller_name
from quire.server.http.limits import Limits

DEFAULTS = SamplingParams(temperature=0.5, top_k=7)
HELLO = [{"role": "user", "content": "hello"}]


def completion(**body: Any) -> CompletionCall:
    return parse_completion({"prompt": "x", **body}, DEFAULTS, Limits())


def chat(**body: Any) -> ChatCall:
    return parse_chat({"messages": HELLO, **body}, DEFAULTS, Limits())


@pytest.mark.parametrize(
    ("name", "value", "is_taken"),
    [
        ("parallel_tool_calls", True, True),
        ("parallel_tool_calls", 1, False),
        ("length_penalty", 1, True),
        ("length_penalty", 1.0, True),
        ("length_penalty", True, False),
        ("tools", [], True),
        ("tools", None, True),
        ("audio", None, True),
        ("audio", {}, False),
    ],
)
def test_a_field_that_is_not_honoured_may_ask_for_nothing(name: str, value: Any, is_taken: bool) -> None:
    """`true` is not 1 in JSON, nor is 0 `false`."""
    if is_taken:
        assert chat(**{name: value}) == chat()
        return
    with pytest.raises(InvalidRequestError) as caught:
        chat(**{name: value})
    assert caught.value.param == name


def test_two_names_of_one_field_must_agree() -> None:
    body = {"max_tokens": 5, "max_completion_tokens": 5, "n_predict": None, "sampling_seed": 3}
    assert COMPLETION.read({"prompt": "x", **body}, Limits()).sampling == {"max_tokens": 5, "seed": 3}
    for body in (
        {"max_tokens": 5, "max_new_tokens": 6},
        {"random_seed": 1, "sampling_seed": 2},
        {"num_predict": 1, "n_predict": True},
    ):
        first, second = body
        with pytest.raises(InvalidRequestError, match=f"{second} and {first} are one field and differ"):
            COMPLETION.read({"prompt": "x", **body}, Limits())


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_minus_one_is_as_much_as_fits(name: str) -> None:
    for call in (completion(**{name: -1}), chat(**{name: -1})):
        assert call.params.max_tokens is call.asked_max_tokens is None
    assert completion().params.max_tokens == 16


def test_a_null_is_a_field_left_out() -> None:
    assert completion(**dict.fromkeys(set(COMPLETION.known()) - {"prompt"})) == completion()


def test_the_models_own_settings_fill_what_is_left_out_and_nothing_else() -> None:
    assert (completion().params.temperature, completion().params.top_k) == (0.5, 7)
    found = completion(temperature=0, top_k=0, top_p=0.25).params
    assert (found.temperature, found.top_k, found.top_p) == (0.0, 0, 0.25)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ({"5": 1, "7": -2.5}, {5: 1.0, 7: -2.5}),
        ({"0005": 1}, {5: 1.0}),
        ({"5": 1, "05": 2}, None),
        ({"5": 1, "5 ": 2}, None),
        ({"-5": 1}, None),
        ({"1e1": 1}, None),
        ({"٣": 1}, None),
        ({"12345678901": 1}, None),
        ({"": 1}, None),
    ],
)
def test_a_bias_names_each_token_once_by_its_number(bias: dict[str, Any], expected: Any) -> None:
    if expected is not None:
        assert completion(logit_bias=bias).params.logit_bias == expected
        return
    with pytest.raises(InvalidRequestError) as caught:
        completion(logit_bias=bias)
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("echo", "logprobs", "prompt_logprobs", "expected"),
    [
        (False, 3, None, None),
        (False, None, 2, 2),
        (True, None, None, None),
        (True, 3, None, 3),
        (True, 3, 1, 3),
        (True, 1, 4, 4),
        (True, 0, None, 0),
    ],
)
def test_echo_with_logprobs_has_those_of_the_prompt_too(
    echo: bool, logprobs: int | None, prompt_logprobs: int | None, expected: int | None
) -> None:
    """As many as the larger of both; and `prompt_logprobs` are shown only where they were asked for."""
    call = completion(echo=echo, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    assert (call.params.prompt_logprobs, call.logprobs) == (expected, logprobs)
    assert call.wants_prompt_logprobs is (prompt_logprobs is not None)


def test_no_tokens_are_asked_for_with_echo_alone() -> None:
    call = completion(echo=True, max_tokens=0)
    assert call.prompt_only and call.params.max_tokens == 1
    assert not completion(echo=True, max_tokens=1).prompt_only
    for body in ({"max_tokens": 0}, {"echo": False, "max_tokens": 0}, {"echo": True, "max_tokens": False}):
        with pytest.raises(InvalidRequestError) as caught:
            completion(**body)
        assert caught.value.param == "max_tokens"


LENGTH = 20


@pytest.mark.parametrize("num_tokens", [1, 5, 15, 16, 19, 20, 25])
@pytest.mark.parametrize("asked", [None, 1, 4, 5, 20])
@pytest.mark.parametrize(
    ("truncate", "side"),
    [(None, None), (3, None), (3, "left"), (3, "right"), (-1, None), (-1, "right"), (30, None)],
)
def test_a_prompt_fits_is_cut_as_asked_or_is_refused(
    num_tokens: int, asked: int | None, truncate: int | None, side: str | None
) -> None:
    tokens = list(range(num_tokens))
    call = completion(max_tokens=asked, truncate_prompt_tokens=truncate, truncation_side=side)
    kept = tokens
    if truncate is not None:
        most = max(1, LENGTH - (asked or 1)) if truncate == -1 else truncate
        kept = tokens[:most] if side == "right" else tokens[max(0, num_tokens - most) :]
    if asked is None or len(kept) + asked <= LENGTH or len(kept) >= LENGTH:
        assert list(truncate_prompt(tokens, call, LENGTH)) == kept, "too long by itself is the engine's to refuse"
        return
    with pytest.raises(PromptTooLongError) as caught:
        truncate_prompt(tokens, call, LENGTH)
    assert caught.value.param == "max_tokens" and f"at most {LENGTH - len(kept)}" in str(caught.value)


NAMES = choice_parts.TokenNames(lambda token_id: chr(token_id).encode(), as_ids=False)


def sent(value: Any) -> Any:
    """What a client reads of it."""
    return msgspec.json.decode(msgspec.json.encode(value))


def position(*ranks: tuple[int, float, int]) -> PositionLogprobs:
    return {token_id: Logprob(logprob, rank, chr(token_id)) for token_id, logprob, rank in ranks}


def test_the_best_are_listed_best_first_and_no_more_than_were_asked_for() -> None:
    """The chosen token comes beside them, wherever it stands: in a list of its own there, in the same one here."""
    tokens = [(ord("z"), -5.0, 90), (ord("a"), -0.5, 1), (ord("c"), -2.0, 3), (ord("b"), -1.0, 2)]
    dice = random.Random(1)
    for top, expected in ((0, []), (1, ["a"]), (2, ["a", "b"]), (3, ["a", "b", "c"])):
        dice.shuffle(tokens)
        chosen = CompletionOutput(0, "z", [ord("z")], logprobs=[position(*tokens)])
        (entry,) = sent(choice_parts.chat_logprobs(chosen, top, (), NAMES)["content"])
        assert (entry["token"], entry["logprob"], entry["bytes"]) == ("z", -5.0, [122])
        assert [item["token"] for item in entry["top_logprobs"]] == expected
        found = choice_parts.completion_logprobs([(ord("z"), position(*tokens))], top, (), [0], NAMES)
        assert list(sent(found["top_logprobs"])[0]) == ["z", *expected]
    chosen = CompletionOutput(0, "a", [ord("a")], logprobs=[position(*tokens)])
    (entry,) = sent(choice_parts.chat_logprobs(chosen, 2, (ord("c"), ord("z")), NAMES)["content"])
    assert [item["token"] for item in entry["top_logprobs"]] == ["c", "z"], "the tokens that were named"


def test_a_token_without_logprobs_has_nulls() -> None:
    one = position((ord("é"), -1.0, 1))
    tokens = [(ord("x"), None), (ord("é"), one), (ord("é"), one)]
    found = sent(choice_parts.completion_logprobs(tokens, 1, (), [5, 6, 7], NAMES))
    assert found["text_offset"] == [5, 6, 7] and found["tokens"] == ["x", "é", "é"]
    assert found["token_logprobs"] == [None, -1.0, -1.0] and found["top_logprobs"][0] is None


def test_what_has_no_number_in_json_has_the_least() -> None:
    never = position((ord("a"), float("-inf"), 1), (ord("b"), -20000.0, 2))
    chosen = CompletionOutput(0, "a", [ord("a")], logprobs=[never])
    (entry,) = sent(choice_parts.chat_logprobs(chosen, 2, (), NAMES)["content"])
    assert [entry["logprob"], *(item["logprob"] for item in entry["top_logprobs"])] == [-9999.0] * 3
    assert choice_parts.completion_logprobs([(ord("a"), never)], 2, (), [0], NAMES)["token_logprobs"] == [-9999.0]
    (shown,) = sent(choice_parts.prompt_logprobs([never]))
    assert shown["97"] == {"logprob": -9999.0, "rank": 1, "decoded_token": "a"}
    assert sent(choice_parts.prompt_logprobs(None)) is None and sent(choice_parts.prompt_logprobs([None])) == [None]


def test_prefix_caches_are_apart_for_each_caller_and_salt() -> None:
    """However the two run into each other: no two pairs have one name."""
    pairs = [(caller, salt) for caller in ("", "a", "ab", caller_name("k")) for salt in ("", "a", "b", "ab", "\0b")]
    names = [cache_namespace(*pair) for pair in pairs]
    assert len(set(names)) == len(names)
    assert cache_namespace(ANYBODY.name, "") == "" and all(len(name) == 32 for name in names if name)
    assert len({"k", caller_name("k"), caller_name("l")}) == 3 and len(caller_name("k")) == 32


def bounded(call: CompletionCall | ChatCall, *lengths: int) -> int | None:
    return bound_logprobs(call, lengths, 4096, Limits().with_values({"logprobs": 1000})).max_tokens


def test_logprobs_are_counted_over_prompts_and_sequences() -> None:
    """1,000 in all: each place of an answer names the chosen token and the best, or those of `logprob_token_ids`."""
    assert bounded(completion(max_tokens=100, logprobs=9), 50) == 100
    assert bounded(completion(max_tokens=4000), 50, 60) == 4000, "none are asked for"
    with pytest.raises(ApiError, match=r"limited to 1,000 .*, got 1,010") as caught:
        bounded(completion(max_tokens=101, logprobs=9), 50)
    assert (caught.value.param, caught.value.code) == ("logprobs", "too_many_logprobs")
    with pytest.raises(ApiError, match="got 2,200"):
        bounded(completion(max_tokens=55, logprobs=9, n=2), 50, 60)
    with pytest.raises(ApiError, match="got 1,300"):
        bounded(completion(max_tokens=100, logprobs=2, logprob_token_ids=list(range(12))), 50)
    with pytest.raises(ApiError, match="got 1,020"):
        bounded(completion(max_tokens=1, prompt_logprobs=19, n=3), 17)
    with pytest.raises(ApiError, match="got 1,010") as caught:
        bounded(chat(max_tokens=101, logprobs=True, top_logprobs=9), 50)
    assert caught.value.param == "top_logprobs"
    assert bounded(completion(max_tokens=4000, logprobs=0), 3996) == 4000, "100 fit into the model, and they count"


def test_an_answer_without_a_length_ends_where_its_logprobs_do() -> None:
    assert bounded(chat(logprobs=True, top_logprobs=9), 50) == 100
    assert bounded(chat(logprobs=True, top_logprobs=9, n=3), 50) == 33
    assert bounded(chat(logprobs=True, top_logprobs=9, prompt_logprobs=4), 50) == 75
    assert bounded(chat(), 50) is None
    with pytest.raises(ApiError, match="got 1,500"):
        bounded(chat(logprobs=True, top_logprobs=9, min_tokens=150), 50)
