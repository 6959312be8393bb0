"""Every field is checked; every refusal names the field."""

import copy
import dataclasses
import inspect
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config import EngineArgs
from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams

REFUSED: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for value in (math.nan, math.inf, -math.inf, "1", None, True, [])
    ),
    ("temperature", -0.1),
    ("temperature", 101),
    ("top_p", 0),
    ("top_p", 1.01),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 2.1),
    ("n", 0),
    ("n", 129),
    ("n", 1.0),
    ("n", True),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", 2**31),
    ("max_tokens", 0),
    ("max_tokens", 2**31),
    ("min_tokens", -1),
    ("seed", 2**63),
    ("seed", 1.5),
    ("logprobs", 21),
    ("logprobs", -1),
    ("prompt_logprobs", 21),
    ("stop", [""]),
    ("stop", 5),
    ("stop", ["x"] * 65),
    ("stop", ["a" * 1025]),
    ("stop", ["\ud800"]),
    ("stop", b"x"),
    ("bad_words", [1]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", "12"),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [True]),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: 101}),
    ("ignore_eos", 1),
    ("detokenize", None),
    ("output_kind", 2),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refusals_name_the_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams.from_mapping({name: value})
    assert caught.value.param == name
    assert name in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidRequestError, match="unknown sampling parameter 'top_kk'; did you mean 'top_k'"):
        SamplingParams.from_mapping({"top_kk": 3})


def test_fields_that_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(InvalidRequestError, match="stop"):
        SamplingParams(stop="x", detokenize=False)


def test_accepted_forms() -> None:
    params = SamplingParams(top_k=-1, temperature=1e-7, stop="x", stop_token_ids=(5, 3, 5), logit_bias={7: 1})
    assert (params.top_k, params.temperature, params.stop) == (0, 0.0, ["x"])
    assert params.stop_token_ids == [3, 5]
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(max_tokens=None, min_tokens=3).max_tokens is None


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("temperature", [0.0, 100.0]),
        ("top_p", [1e-9, 1.0]),
        ("min_p", [0.0, 1.0]),
        ("presence_penalty", [-2.0, 2.0]),
        ("frequency_penalty", [-2.0, 2.0]),
        ("repetition_penalty", [0.001, 2.0]),
        ("n", [1, 128]),
        ("top_k", [0, 2**31 - 1]),
        ("seed", [-(2**63), 2**63 - 1, None]),
        ("max_tokens", [1, 2**31 - 1, None]),
        ("logprobs", [0, 20, None]),
        ("prompt_logprobs", [0, 20, None]),
        ("stop", [["é" * 512] * 64]),
        ("bad_words", [["x"] * 256]),
        ("stop_token_ids", [[0, 2**31 - 1], list(range(4096))]),
        ("logit_bias", [{0: -100.0, 1: 100.0}]),
    ],
)
def test_the_edges_are_inside(name: str, edges: list[Any]) -> None:
    for value in edges:
        assert getattr(SamplingParams.from_mapping({name: value}), name) == value


def test_one_past_the_edges_of_lists_is_outside() -> None:
    for name, value in (
        ("stop", ["é" * 513]),  # bytes, not characters
        ("bad_words", ["x"] * 257),
        ("stop_token_ids", list(range(4097))),
        ("logit_bias", dict.fromkeys(range(4097), 1.0)),
        ("allowed_token_ids", list(range(4097))),
    ):
        with pytest.raises(InvalidRequestError, match="at most") as caught:
            SamplingParams.from_mapping({name: value})
        assert caught.value.param == name
    with pytest.raises(InvalidRequestError, match="at most 128 token ids"):
        SamplingParams(logprobs=1, logprob_token_ids=list(range(129)))


def test_greedy_begins_below_vllms_epsilon() -> None:
    assert SamplingParams(temperature=1e-5).temperature == 1e-5
    assert SamplingParams(temperature=0.99e-5).temperature == 0.0


def test_fields_that_need_each_other() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(logprobs=0, logprob_token_ids=[3, 1]).logprob_token_ids == [1, 3]
    with pytest.raises(InvalidRequestError, match="needs logprobs"):
        SamplingParams(logprob_token_ids=[1])
    assert SamplingParams(stop=[], detokenize=False).stop == []


@given(
    st.dictionaries(
        st.sampled_from(["temperature", "top_p", "n", "seed", "stop", "logit_bias", "top_k", "logprobs"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.integers(), max_size=3),
        ),
        max_size=4,
    )
)
def test_anything_is_accepted_or_refused_by_name(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams.from_mapping(values)
    except InvalidRequestError as error:
        assert error.param in (*values, "min_tokens", "stop")
    else:
        assert math.isfinite(params.temperature)
        assert 0 < params.top_p <= 1


@pytest.mark.parametrize(
    ("owner", "name", "nearest"),
    [
        (SamplingParams, "max_token", "max_tokens"),
        (EngineArgs, "max_num_seq", "max_num_seqs"),
        (SamplingParams, "zz", ""),
    ],
)
def test_an_unexpected_keyword_names_the_nearest(owner: Any, name: str, nearest: str) -> None:
    """A TypeError, as Python has it; positional arguments are Python's own."""
    with pytest.raises(TypeError) as caught:
        owner(**{name: 3})
    assert repr(name) in str(caught.value)
    assert ("did you mean" in str(caught.value)) is bool(nearest) and nearest in str(caught.value)
    with pytest.raises(TypeError, match="positional"):
        owner(3)
    found = owner()
    assert copy.deepcopy(found) == copy.copy(found) == dataclasses.replace(found) == found
    assert list(inspect.signature(owner).parameters) == [item.name for item in dataclasses.fields(owner)]
