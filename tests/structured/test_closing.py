"""Every answer closes: random weights at a high temperature, with budgets from the shortest answer upwards. The judges
are jsonschema-rs and Python's own parsers."""

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from quire import LLM, RequestOutput, SamplingParams
from quire.errors import InvalidRequestError
from quire.structured_params import StructuredOutputsParams
from tests.structured.yaml_texts import read

SCHEMAS: dict[str, Any] = {
    "flat": {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 2}, "age": {"type": "integer", "minimum": 5}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "free": {"type": "object"},
    "nested": {
        "type": "array",
        "items": {"type": "object", "properties": {"x": {"enum": ["left", "right"]}, "y": {}}, "required": ["x"]},
        "minItems": 2,
    },
    "tree": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"type": "number"},
                    "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
            }
        },
        "$ref": "#/$defs/tree",
    },
    "unequal": {  # one branch is far longer than the other
        "anyOf": [
            {
                "type": "object",
                "properties": {"list": {"type": "array", "items": {"type": "integer"}, "minItems": 30}},
                "required": ["list"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"none": {"const": True}},
                "required": ["none"],
                "additionalProperties": False,
            },
        ]
    },
    "pattern": {"type": "string", "pattern": "^[a-z]{2,9}-[0-9]+$"},
}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Any:
    with LLM(model=str(tiny_model), max_num_seqs=16, max_model_len=512) as llm:
        yield llm


def answers(llm: LLM, shape: Any, budgets: list[int], seed: int = 0) -> list[RequestOutput]:
    params = [
        SamplingParams(temperature=2.0, seed=seed + index, max_tokens=budget, structured_outputs=shape)
        for index, budget in enumerate(budgets)
    ]
    return llm.generate([f"prompt {index}" for index in range(len(budgets))], params, use_tqdm=False)


def least(llm: LLM, shape: Any) -> int:
    """What the refusal of a budget of one token says."""
    with pytest.raises(InvalidRequestError) as refused:
        answers(llm, shape, [1])
    found = re.search(r"needs (\d+) tokens .*; 1 are allowed", refused.value.message)
    assert found is not None, refused.value.message
    assert refused.value.param == "structured_outputs"
    return int(found[1])


def test_of_a_list_those_that_fit_are_answered(llm: LLM) -> None:
    refused, answered = answers(llm, StructuredOutputsParams(json=SCHEMAS["flat"]), [1, 200])
    assert refused.outputs[0].finish_reason == "error" and not refused.outputs[0].token_ids
    assert refused.error is not None and "1 are allowed" in refused.error
    assert answered.outputs[0].finish_reason == "stop" and answered.error is None


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_budget_that_holds_an_answer_gives_a_whole_one(llm: LLM, name: str) -> None:
    shape = StructuredOutputsParams(json=SCHEMAS[name])
    needed = least(llm, shape)
    rng = random.Random(name)
    budgets = [*range(needed, needed + 12), *(rng.randrange(needed, 300) for _ in range(28))]
    for budget, output in zip(budgets, answers(llm, shape, budgets), strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop" and len(answer.token_ids) <= budget, (budget, answer.text)
        # A number may be too large for a double: JSON has no bound.
        value = json.loads(answer.text, parse_float=lambda text: 1.5)
        jsonschema_rs.validate(SCHEMAS[name], value)


@pytest.mark.parametrize("name", ["flat", "nested", "tree", "unequal"])
def test_yaml_closes_as_json_does(llm: LLM, name: str) -> None:
    shape = StructuredOutputsParams(yaml=SCHEMAS[name])
    needed = least(llm, shape)
    rng = random.Random(name)
    budgets = [*range(needed, needed + 8), *(rng.randrange(needed, 300) for _ in range(12))]
    for budget, output in zip(budgets, answers(llm, shape, budgets), strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop" and len(answer.token_ids) <= budget, (budget, answer.text)
        jsonschema_rs.validate(SCHEMAS[name], read(answer.text))


def test_regular_expressions_choices_and_grammars_close(llm: LLM) -> None:
    for values, pattern in (
        ({"regex": "[a-z]+[0-9]{3}(xy)*!"}, "[a-z]+[0-9]{3}(xy)*!"),
        ({"choice": ["maybe not", "yes", "no way"]}, "maybe not|yes|no way"),
        ({"grammar": 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'}, r"[0-9+()]+"),
    ):
        shape = StructuredOutputsParams(**values)  # type: ignore[arg-type]
        needed = least(llm, shape)
        for output in answers(llm, shape, [*range(needed, needed + 10), 40, 80, 200]):
            text = output.outputs[0].text
            assert output.outputs[0].finish_reason == "stop" and re.fullmatch(pattern, text), text
            assert text.count("(") == text.count(")")


def test_the_length_of_the_model_is_a_budget_too(llm: LLM) -> None:
    shape, prompt = StructuredOutputsParams(json=SCHEMAS["flat"]), list(range(20, 250)) * 2 + [7] * 20
    params = SamplingParams(temperature=2.0, seed=3, max_tokens=None, structured_outputs=shape)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop" and len(output.outputs[0].token_ids) <= 512 - len(prompt)
    jsonschema_rs.validate(SCHEMAS["flat"], json.loads(output.outputs[0].text))


def test_forced_text_takes_fewer_steps_and_gives_the_same_tokens(llm: LLM) -> None:
    """With log-probabilities each token is sampled for itself; without, what is forced is appended."""
    digit = {"type": "integer", "maximum": 9, "minimum": 0}
    keys = [f"a rather long key {index}" for index in range(4)]
    schema = {
        "type": "object",
        "properties": dict.fromkeys(keys, digit),
        "required": keys,
        "additionalProperties": False,
    }
    shape = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    base: dict[str, Any] = dict(temperature=1.0, seed=5, max_tokens=200, structured_outputs=shape)
    (one,) = llm.generate(["x"], SamplingParams(**base), use_tqdm=False)
    (each,) = llm.generate(["x"], SamplingParams(**base, logprobs=1), use_tqdm=False)
    assert one.outputs[0].token_ids == each.outputs[0].token_ids
    assert one.outputs[0].logprobs is None and len(each.outputs[0].logprobs or ()) == len(each.outputs[0].token_ids)
    jsonschema_rs.validate(schema, json.loads(one.outputs[0].text))
