"""What is asked for, and how a wrong asking is named."""

import enum
import pickle
from typing import Any, Literal

import pydantic
import pytest

from quire import SamplingParams
from quire.errors import InvalidRequestError
from quire.structured_params import MAX_CHOICES, MAX_SOURCE_BYTES, StructuredOutputsParams


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "exactly one of"),
        ({"json": "{}", "regex": "a"}, "two: json and regex"),
        ({"json": 3}, "structured_outputs.json must be a schema: an object, true or false, or its text, not int"),
        ({"json": {"a": {1, 2}}}, "structured_outputs.json must hold JSON values"),
        ({"json": float("nan")}, "structured_outputs.json"),
        ({"json": int}, "pydantic"),
        ({"yaml": int}, "structured_outputs.yaml must be a schema"),
        ({"yaml": 3}, "structured_outputs.yaml must be a schema: an object"),
        ({"yaml": {"a": {1, 2}}}, "structured_outputs.yaml must hold JSON values"),
        ({"yaml": "{}", "json": "{}"}, "two: json and yaml"),
        ({"yaml": "{}", "whitespace_pattern": " "}, "whitespace_pattern belongs to json, json_object, str"),
        ({"yaml": "{}", "disable_any_whitespace": True}, "disable_any_whitespace belongs to json, json_object, str"),
        ({"json": ""}, "structured_outputs.json must be text that is not empty"),
        ({"json": [1]}, "structured_outputs.json must be a schema: an object, true or false, or its text, not list"),
        ({"json": '"' + "x" * MAX_SOURCE_BYTES + '"'}, f"at most {MAX_SOURCE_BYTES} bytes"),
        ({"regex": "\ud800"}, "valid Unicode"),
        ({"regex": 7}, "structured_outputs.regex"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": "yes"}, "structured_outputs.choice must be a list"),
        ({"choice": ["a", 1]}, "got int"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": [str(number) for number in range(MAX_CHOICES + 1)]}, f"at most {MAX_CHOICES}"),
        ({"json_object": "yes"}, "structured_outputs.json_object"),
        ({"json_object": False}, "exactly one of"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern belongs to json"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "disable_any_whitespace belongs to json"),
        ({"json": "{}", "disable_any_whitespace": 1}, "true or false"),
        ({"json": "{}", "disable_any_whitespace": True, "whitespace_pattern": " "}, "excludes"),
        ({"json": "{}", "whitespace_pattern": "x" * 300}, "at most 256 bytes"),
        ({"jsonn": "{}"}, "did you mean 'json'"),
    ],
)
def test_a_wrong_asking_is_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(structured_outputs=values)  # type: ignore[arg-type]
    assert text in str(caught.value) and caught.value.param == "structured_outputs"


def test_nothing_follows_a_complete_answer() -> None:
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), ignore_eos=True)
    with pytest.raises(InvalidRequestError, match="must be an object"):
        SamplingParams(structured_outputs="json")  # type: ignore[arg-type]


def test_types_of_python_are_shapes() -> None:
    assert StructuredOutputsParams(choice=Literal["yes", "no"]).choice == ["yes", "no"]  # type: ignore[arg-type]
    assert StructuredOutputsParams(choice=Colour).choice == ["red", "green"]
    assert StructuredOutputsParams(yaml=Person).yaml == StructuredOutputsParams(json=Person).json
    made = StructuredOutputsParams(json=Person)
    assert made == StructuredOutputsParams(json=Person.model_json_schema()) and made.kind == "json"
    assert StructuredOutputsParams(choice=["a", "b", "a"]).choice == ["a", "b"]
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301 - our own bytes
