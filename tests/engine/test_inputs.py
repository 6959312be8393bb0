"""What a prompt and its parameters become for the core, and where the limits lie: to the token."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from quire.core.request import NewRequest
from quire.engine.inputs import InputProcessor, ParsedRequest, RequestLimits
from quire.engine.queue import Caller
from quire.errors import InvalidRequestError, PromptTooLongError
from quire.sampling_params import SamplingParams
from quire.text.tokenizer import Tokenizer
from tests.text.small_tokenizers import KINDS, write_directory

LIMITS = RequestLimits(max_model_len=20, vocab_size=320, eos_token_ids=(256,), seed=0, has_priorities=False)


def processor(tokenizer: Tokenizer | None = None, **limits: Any) -> InputProcessor:
    values = {name: getattr(LIMITS, name) for name in RequestLimits.__slots__}
    return InputProcessor(tokenizer, RequestLimits(**values | limits))


def parse(prompt: Any, inputs: InputProcessor | None = None, *, arguments: Any = None, **params: Any) -> ParsedRequest:
    found = SamplingParams(**{"detokenize": False, **params})
    return (inputs or processor()).parse(prompt, found, **arguments or {})


def one(prompt: Any = (1, 2), inputs: InputProcessor | None = None, **params: Any) -> NewRequest:
    (new,) = parse(prompt, inputs, **params).sequences
    return new


def splitmix64(state: int, count: int) -> list[int]:
    """Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), figure 17's constants."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        found.append(mixed ^ mixed >> 31)
    return found


def test_each_request_without_a_seed_has_its_own() -> None:
    """The stream of splitmix64 from the engine's seed: known answers, and more of them by a reference."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4) == published
    for seed in (0, 1234567, 2**63 - 1):
        inputs = processor(seed=seed)
        found = []
        for number in range(30):
            found.append(one(inputs=inputs).sampling.seed)
            if number == 10:  # one with a seed has a number too
                assert one(inputs=inputs, seed=5).sampling.seed == 5
                found.append(splitmix64(seed, 12)[-1])
        assert found == splitmix64(seed, 31)


def test_seeds_of_n_sequences_follow_one_another() -> None:
    for seed, expected in ((5, [5, 6, 7]), (-1, [2**64 - 1, 0, 1]), (-(2**63), [2**63, 2**63 + 1, 2**63 + 2])):
        parsed = parse([1, 2], seed=seed, n=3)
        assert [new.sampling.seed for new in parsed.sequences] == expected
    first = splitmix64(0, 1)[0]
    assert [new.sampling.seed for new in parse([1, 2], n=2).sequences] == [first, first + 1]


def test_ids_are_numbers_of_the_engines_own() -> None:
    inputs = processor()
    parsed = [parse([1], inputs), parse([1], inputs, n=2, arguments={"request_id": "x"}), parse([1], inputs)]
    assert [[new.request_id for new in item.sequences] for item in parsed] == [["0"], ["1.0", "1.1"], ["2"]]
    assert [(item.number, item.request_id) for item in parsed] == [(0, "0"), (1, "x"), (2, "2")]


def test_the_room_of_a_prompt() -> None:
    """`max_model_len` is 20: prompt and output together, and at least one token of output."""
    assert one([7] * 5, max_tokens=None).max_tokens == 15
    assert one([7] * 5, max_tokens=14).max_tokens == 14
    assert one([7] * 5, max_tokens=15).max_tokens == 15
    assert one([7] * 5, max_tokens=16).max_tokens == 15
    assert one([7] * 19, max_tokens=None).max_tokens == 1
    for length in (20, 21):
        with pytest.raises(
            PromptTooLongError,
            match=rf"^This model's maximum context length is 20 tokens.*{length + 16} tokens \({length} in .* most 19",
        ) as caught:
            one([7] * length)
        assert caught.value.param == "prompt"
    assert one([7] * 5, min_tokens=15, max_tokens=None).sampling.min_tokens == 15
    with pytest.raises(
        PromptTooLongError,
        match=r"^This model's maximum context length is 20 tokens.*\(5 in .*min_tokens may be at most 15",
    ) as caught:
        one([7] * 5, min_tokens=16, max_tokens=None)
    assert caught.value.param == "min_tokens"


def test_text_too_large_is_refused_before_it_is_tokenised(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of this model has at most as many bytes as the longest special token, 13."""
    tokenizer = Tokenizer.from_directory(tiny_model)
    assert tokenizer.max_token_bytes == len("<|endoftext|>") == 13
    inputs = processor(tokenizer)
    encoded: list[str] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: encoded.append(text) or encode(text, **options))
    longest = "<|endoftext|>" * 20  # exactly 20 tokens: of that size some text could fit, with 19 tokens more so
    with pytest.raises(PromptTooLongError, match="20 tokens"):
        one(longest, inputs)
    assert encoded == [longest]
    with pytest.raises(
        PromptTooLongError, match=r"^This model's maximum context length is 20 tokens.* 261 bytes, and at most 260"
    ):
        one(longest + "x", inputs)
    with pytest.raises(PromptTooLongError, match="262 bytes"):  # bytes, not characters
        one("分" * 87 + "x", inputs)
    assert encoded == [longest]
    assert one("x" * 19, inputs).prompt_token_ids == (0x78,) * 19


def test_token_ids_end_at_the_width_of_the_logits() -> None:
    for field, value in (
        ("stop_token_ids", [320]), ("allowed_token_ids", [3, 320]), ("logit_bias", {320: 1.0}),
        ("logprob_token_ids", [320]),
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError, match="from 0 to 319, got '320'") as caught:
            one(**{field: value, "logprobs": 1})
        assert caught.value.param == field
    with pytest.raises(InvalidRequestError, match="from 0 to 319, got '320'"):
        one([1, 320])
    for item in (-1, True, 1.0, "1", None):
        with pytest.raises(InvalidRequestError, match="prompt_token_ids must hold token ids"):
            one([1, item])
    spec = one(
        [319, 0], stop_token_ids=[319], allowed_token_ids=[0, 319], logit_bias={319: 1.0}, logprob_token_ids=[319],
        logprobs=1,
    ).sampling  # fmt: skip
    assert (spec.allowed_token_ids, spec.logit_bias, spec.logprob_token_ids) == ((0, 319), ((319, 1.0),), (319,))


def test_tokens_that_stop() -> None:
    """The end of sequence stops without a `stop_reason`, which the core tells from `eos_token_ids`; one that the caller
    names has its id as the reason, unless it is the end of sequence."""
    for params, stops, ends in (
        ({}, (256,), (256,)),
        ({"stop_token_ids": [9, 3]}, (3, 9, 256), (256,)),
        ({"stop_token_ids": [256]}, (256,), (256,)),
        ({"ignore_eos": True}, (), ()),
        ({"ignore_eos": True, "stop_token_ids": [256, 4]}, (4, 256), ()),
    ):
        new = one(**params)
        assert (new.sampling.stop_token_ids, new.eos_token_ids) == (stops, ends), params


def test_every_number_arrives_under_its_own_name() -> None:
    values: dict[str, Any] = {
        "temperature": 0.9, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "min_tokens": 2,
    }  # fmt: skip
    penalties = {"presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.4}
    spec = one(**values, **penalties, logprobs=3, prompt_logprobs=4, logit_bias={5: 2.0, 3: 1.0}).sampling
    assert {name: getattr(spec, name) for name in values} == values
    assert {f"{name}_penalty": value for name, value in spec.penalties._asdict().items()} == penalties
    assert (spec.num_logprobs, spec.num_prompt_logprobs, spec.logit_bias) == (3, 4, ((3, 1.0), (5, 2.0)))
    assert one(top_k=2**31 - 1).sampling.top_k == 320
    bare = one().sampling
    assert (bare.num_logprobs, bare.num_prompt_logprobs, bare.logit_bias, bare.bad_words) == (None, None, (), ())


@pytest.mark.parametrize("kind", KINDS)
def test_bad_words_are_banned_as_the_tokenizer_writes_them(tmp_path: Path, kind: str) -> None:
    """At the beginning of a text and after a space, without the tokens that begin a prompt; spaces that the caller put
    before the word make no difference. The judge is transformers' tokenizer."""
    directory = write_directory(tmp_path, KINDS[kind]())
    tokenizer, judge = Tokenizer.from_directory(directory), PreTrainedTokenizerFast.from_pretrained(str(directory))
    inputs = processor(tokenizer, vocab_size=tokenizer.vocab_size)
    words = ["hello", " world", "  a", "system user", "你好"]
    expected = set()
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            expected.add(tuple(judge.encode(text, add_special_tokens=False)))
    assert set(one([1], inputs, bad_words=words).sampling.bad_words) == expected - {()}
    assert judge.encode("hello") == judge.encode("hello", add_special_tokens=False) or kind.startswith("fallback")


def test_bad_words_need_a_tokenizer() -> None:
    with pytest.raises(InvalidRequestError, match="needs a tokenizer") as caught:
        one(bad_words=["x"])
    assert caught.value.param == "bad_words"
    with pytest.raises(InvalidRequestError, match="detokenize must be false"):
        one(detokenize=True)
    with pytest.raises(InvalidRequestError, match="no tokenizer: send prompt_token_ids"):
        one("x")


def test_allowed_tokens_must_leave_one_to_begin_with(tiny_model: Path) -> None:
    inputs = processor(Tokenizer.from_directory(tiny_model))
    a, b, end = ord("a"), ord("b"), 256
    for allowed, params in (
        ([a], {"bad_words": ["a"]}),
        ([a, b], {"bad_words": ["a", "b"]}),
        ([end], {"min_tokens": 1}),
        ([a, end], {"min_tokens": 1, "bad_words": ["a"]}),
        ([a], {"min_tokens": 1, "stop_token_ids": [a]}),
    ):
        with pytest.raises(InvalidRequestError, match="no token to begin with") as caught:
            one([1], inputs, allowed_token_ids=allowed, **params)
        assert caught.value.param == "allowed_token_ids"
    for allowed, params in (
        ([a, b], {"bad_words": ["a"]}),
        ([a], {"bad_words": ["ab", "aa"]}),
        ([end], {}),
        ([a], {"stop_token_ids": [a]}),
        ([end], {"min_tokens": 1, "ignore_eos": True}),
        ([a, end], {"min_tokens": 1}),
    ):
        assert one([1], inputs, allowed_token_ids=allowed, **params).sampling.allowed_token_ids == tuple(
            sorted(allowed)
        )


def test_priorities_and_salts() -> None:
    served = processor(has_priorities=True)
    for value in (2**31 - 1, -(2**31) + 1, 0):
        assert parse([1], served, arguments={"priority": value}).sequences[0].priority == value
    for value in (2**31, -(2**31), True, 1.0, "1"):
        with pytest.raises(InvalidRequestError, match="priority"):
            parse([1], served, arguments={"priority": value})
    with pytest.raises(InvalidRequestError, match="scheduling_policy='priority'"):
        parse([1], arguments={"priority": 1})
    assert parse([1], arguments={"cache_salt": "é" * 128}).sequences[0].cache_salt == "é" * 128
    for salt in ("é" * 128 + "x", 5, None, "half a pair: \ud800"):
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            parse([1], arguments={"cache_salt": salt})
    assert parse([1], arguments={"request_id": "é" * 512}).request_id == "é" * 512
    for request_id in ("é" * 512 + "x", 5, "\udfff"):
        with pytest.raises(InvalidRequestError, match="request_id"):
            parse([1], arguments={"request_id": request_id})
    parsed = parse([1, 2], arguments={"arrival_s": 4.5, "caller": Caller("x", 3)}, n=2)
    found = [(new.arrival_s, new.prompt_token_ids, new.caller, new.caller_weight) for new in parsed.sequences]
    assert found == [(4.5, (1, 2), "x", 3)] * 2
    assert (one().caller, one().caller_weight, one().cache_salt, one().priority) == ("", 1, "", 0)


def test_token_ids_that_are_there_are_the_prompt(tiny_model: Path) -> None:
    inputs = processor(Tokenizer.from_directory(tiny_model))
    parsed = parse({"prompt": "x", "prompt_token_ids": [1, 2]}, inputs)
    assert (parsed.prompt, parsed.sequences[0].prompt_token_ids) == (None, (1, 2))
    parsed = parse({"prompt": "x", "prompt_token_ids": None}, inputs)
    assert (parsed.prompt, parsed.sequences[0].prompt_token_ids) == ("x", (0x78,))
    for prompt in ({"prompt": "x", "prompt_token_ids": []}, {"prompt_token_ids": []}, [], ""):
        with pytest.raises(InvalidRequestError, match="prompt must hold at least one token"):
            parse(prompt, inputs)
    for prompt in (None, 5, b"x", {"prompt": None}, {"prompt": ["x"]}, {}):
        with pytest.raises(InvalidRequestError, match="prompt must be text") as caught:
            parse(prompt, inputs)
        assert caught.value.param == "prompt"


def test_a_text_whose_token_the_model_does_not_have_is_refused_as_an_id_is(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the embedding has rows: such an id would read past its end."""
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, KINDS["byte_level"]()))
    ids = tokenizer.encode("zé")
    inputs = processor(tokenizer, vocab_size=max(ids))
    fitting = processor(tokenizer, vocab_size=max(ids) + 1)
    assert fitting.encode("zé") == ids and one("zé", fitting).prompt_token_ids == tuple(ids)
    for call in (lambda: inputs.encode("zé"), lambda: one("zé", inputs)):
        with pytest.raises(
            InvalidRequestError, match=f"prompt holds .* token {max(ids)} .* end at {max(ids) - 1}"
        ) as caught:
            call()
        assert caught.value.param == "prompt"
    assert inputs.encode("") == []
    words = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("zé", " zé")]
    assert set(one([1], fitting, bad_words=["zé"]).sampling.bad_words) == {
        item for item in words if max(item) <= max(ids)
    }
    assert not one([1], inputs, bad_words=["zé"]).sampling.bad_words, "it is never generated"


def test_bad_words_that_were_encoded_before_are_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, KINDS["byte_level"]()))
    inputs = processor(tokenizer, vocab_size=tokenizer.vocab_size)
    params: dict[str, Any] = {"bad_words": ["one", "two"]}
    words = inputs.encode_bad_words(SamplingParams(**params))
    expected = one([1], inputs, **params).sampling.bad_words
    monkeypatch.setattr(tokenizer, "encode", None)
    assert parse([1], inputs, arguments={"bad_words": words}, **params).sequences[0].sampling.bad_words == expected
    assert parse([1], inputs, arguments={"bad_words": ()}, **params).sequences[0].sampling.bad_words == ()
