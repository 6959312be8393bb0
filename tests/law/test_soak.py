"""`scripts/soak` asks what every server of its own can answer, and sees each difference."""

import copy
import random
from typing import Any

import pytest

from quire.cli.arguments import Parser, add_engine, engine_values
from quire.config import EngineArgs
from scripts.served import Answer, Part
from scripts.soak import difference
from scripts.soak_weather import MAX_MODEL_LEN, NUM_LONG, NUM_SHORT, as_flags, make_families, make_settings

WHOLE = Answer(
    {
        0: Part([5, 6, 7], [-0.5, -1.0, -2.0], [{"a": -0.5}, {"b": -1.0}, {"c": -2.0}], None, "abc", "length"),
        1: Part([8], [-0.25], [{"d": -0.25}], [None, {"5": -1.0}], "d", "stop", "x"),
    },
    "done",
)


def test_an_equal_answer_has_no_difference() -> None:
    assert difference(copy.deepcopy(WHOLE), WHOLE) is None


@pytest.mark.parametrize(
    ("sequence", "field", "value", "position"),
    [
        (0, "token_ids", [5, 9, 7], 1),
        (0, "token_ids", [5, 6], 2),
        (0, "logprobs", [-0.5, -1.0, -2.0000002], 2),
        (1, "top_logprobs", [{"e": -0.25}], 0),
        (1, "prompt_logprobs", [None, {"5": -1.5}], 1),
        (1, "prompt_logprobs", None, None),
        (0, "text", "abd", None),
        (0, "finish_reason", "stop", None),
        (1, "stop_reason", None, None),
    ],
)
def test_the_first_difference_is_told(sequence: int, field: str, value: Any, position: int | None) -> None:
    found = copy.deepcopy(WHOLE)
    setattr(found.parts[sequence], field, value)
    told = difference(found, WHOLE)
    assert told is not None
    assert (told["sequence"], told["field"], told.get("position")) == (sequence, field, position)


def test_what_was_lost_is_a_difference() -> None:
    cut, short = copy.deepcopy(WHOLE), copy.deepcopy(WHOLE)
    cut.end = "cut off"
    del short.parts[1]
    assert difference(cut, WHOLE) is not None and difference(short, WHOLE) is not None


def test_every_request_fits_every_server() -> None:
    for seed in range(60):
        for family in make_families(seed, 16):
            assert len(family) == NUM_LONG + NUM_SHORT
            for body in family:
                prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
                assert all(len(prompt) + body["max_tokens"] <= MAX_MODEL_LEN for prompt in prompts)
        settings = make_settings(random.Random(seed))
        parser = Parser()
        add_engine(parser)
        args = EngineArgs.from_mapping(engine_values(parser.parse_args(as_flags(settings))))
        assert all(getattr(args, name) == value for name, value in settings.items())
        assert args.num_gpu_blocks_override is not None
        assert args.num_gpu_blocks_override * args.block_size >= MAX_MODEL_LEN
