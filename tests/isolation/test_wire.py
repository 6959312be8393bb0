"""Frames: what goes in comes out; what is not a message breaks the connection, and nothing else."""

import math
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from quire.config import EngineArgs
from quire.core.plan import ScheduledRequest, Stalled, StepRecord, TokenDelta, TokenLogprobs
from quire.core.request import NewRequest, PenaltySpec, ResumeState
from quire.engine.channel import CoreInfo, CoreOutputs, Gauges
from quire.errors import InvalidRequestError
from quire.isolation.core_server import check_new
from quire.isolation.wire import (
    Abort,
    Add,
    Begun,
    Check,
    Command,
    ProtocolError,
    Ready,
    Report,
    Start,
    StartFailed,
    Stepped,
    Unframer,
    encode,
    max_command_bytes,
)
from quire.outputs import Decision
from tests.core.harness import new_request

FULL = replace(
    new_request(
        "7.1", [1, 2, 3], 9, priority=-2, salt="s", eos=(3,), seed=2**64 - 1, temperature=0.7, top_k=5,
        stop_token_ids=(3, 4), logit_bias=((1, -2.5),), allowed_token_ids=(1, 2), bad_words=((1,), (2, 3)),
        num_logprobs=2, num_prompt_logprobs=0, penalties=PenaltySpec(presence=-2.0), min_tokens=2,
    ),
    resume=ResumeState((5, 6), 2, 1), arrival_s=12.25, needs_output_tokens=True,
)  # fmt: skip
INFO = CoreInfo(64, 13, (Decision("dtype", "bfloat16", "so", ["float32: slow"]),), "fingerprint")
RECORD = StepRecord(
    4, 1.5, (ScheduledRequest("7.1", 0, 3),), (Stalled("8", "budget", "7.1"),), 1, 2, 3, 4, 5, 6, 7,
)  # fmt: skip
LOGPROBS = TokenLogprobs((5, 6), (-0.1, float("-inf")), (1, 1))
OUTPUTS = CoreOutputs(
    (TokenDelta("7.1", (5,), (LOGPROBS,), (LOGPROBS,), 1, "stop", 5, None),),
    RECORD,
    Gauges(1, 2, 0.5, (("grammar", 1),)),
)
COMMANDS: list[Any] = [Add(FULL), Abort("7.1"), Check()]
REPORTS: list[Any] = [
    Ready(INFO),
    StartFailed("ModelFileError", "no", None),
    Begun(("7.1",), 1.5, math.inf),
    Stepped(OUTPUTS),
]


@pytest.mark.parametrize(("kind", "messages"), [(Command, COMMANDS), (Report, REPORTS)])
def test_messages_arrive_whole_however_they_are_cut(kind: Any, messages: list[Any]) -> None:
    data, rng = b"".join(map(encode, messages)), random.Random(1)
    for _ in range(20):
        frames, start = Unframer(kind, 10**6), 0
        found: list[Any] = []
        while start < len(data):
            end = start + rng.randint(1, 90)
            found += frames.feed(data[start:end])
            start = end
        assert found == messages


def test_what_starts_a_core() -> None:
    start = Start(EngineArgs(model="m", max_num_seqs=3, core_process=False), "/d")
    assert list(Unframer(Start, 10**6).feed(encode(start))) == [start]
    wrong = msgspec.msgpack.encode(["start", {"max_num_seqs": 0}, "/d"])
    with pytest.raises(ProtocolError, match="max_num_seqs"):
        list(Unframer(Start, 10**6).feed(len(wrong).to_bytes(4, "big") + wrong))


def test_random_bytes_are_refused_and_nothing_worse() -> None:
    rng, good = random.Random(2), b"".join(map(encode, COMMANDS))
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            for message in Unframer(Command, 10**6).feed(bytes(data)):
                assert isinstance(message, Add | Abort | Check)
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    "body",
    [
        ["add", {}],
        ["add"],
        ["abort", 5],
        ["stepped", OUTPUTS],
        ["unknown"],
        [],
        {"type": "abort"},
        "abort",
        ["add", {**msgspec.to_builtins(FULL), "prompt_token_ids": [1.5]}],
        ["add", {**msgspec.to_builtins(FULL), "max_tokens": "9"}],
    ],
)
def test_only_declared_types_are_messages(body: Any) -> None:
    data = msgspec.msgpack.encode(body)
    with pytest.raises(ProtocolError):
        list(Unframer(Command, 10**6).feed(len(data).to_bytes(4, "big") + data))


def test_a_frame_that_is_too_long_is_refused_by_its_header() -> None:
    with pytest.raises(ProtocolError, match="at most 1000"):
        list(Unframer(Command, 1000).feed((1001).to_bytes(4, "big")))


@pytest.mark.parametrize("max_model_len", [64, 1_500_000])
def test_the_longest_request_that_a_core_may_get_fits_its_frames(max_model_len: int) -> None:
    """Of the largest token ids, and with its lists full."""
    tokens = tuple(range(2**31 - 4096, 2**31))
    spec = FULL.sampling._replace(
        stop_token_ids=tokens, allowed_token_ids=tokens, logit_bias=tuple((token, -99.5) for token in tokens),
        bad_words=((2**31 - 1,) * 257,) * 512,
    )  # fmt: skip
    new = replace(FULL, prompt_token_ids=(2**31 - 1,) * max_model_len, sampling=spec)
    frames = Unframer(Command, max_command_bytes(max_model_len))
    data = encode(Add(new))
    assert list(frames.feed(data)) == [Add(new)]
    assert max_command_bytes(max_model_len) < 2 * max(len(data), 2**22), "and is no larger than it must be"


def test_the_core_takes_what_the_door_lets_in() -> None:
    check_new(FULL, INFO)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt_token_ids": (13,)}, "prompt_token_ids"),
        ({"prompt_token_ids": (-1,)}, "prompt_token_ids"),
        ({"resume": ResumeState((13,))}, "resume"),
        ({"resume": ResumeState((), -1)}, "resume"),
        ({"resume": ResumeState((), 0, 64)}, "resume"),
        ({"resume": ResumeState((), 64, 0)}, "resume"),
        ({"caller": "x" * 65}, "caller"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"eos_token_ids": tuple(range(13))}, "eos_token_ids"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"penalties": PenaltySpec(frequency=3.0)}, "frequency_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"num_logprobs": 21}, "logprobs"),
        ({"num_prompt_logprobs": -1}, "prompt_logprobs"),
        ({"stop_token_ids": (13,)}, "stop_token_ids"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"logit_bias": ((13, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("inf")),)}, "logit_bias"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"bad_words": ((13,),)}, "bad_words"),
        ({"bad_words": ((1,),) * 513}, "bad_words"),
        ({"needs_output_tokens": False}, "needs_output_tokens"),
    ],
)
def test_the_core_refuses_what_the_door_would_have_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_new(_changed(changes), INFO)
    assert caught.value.param == field


def _changed(changes: dict[str, Any]) -> NewRequest:
    spec = {name: value for name, value in changes.items() if name in FULL.sampling._fields}
    rest = {name: value for name, value in changes.items() if name not in spec}
    return replace(FULL, sampling=FULL.sampling._replace(**spec), **rest)
