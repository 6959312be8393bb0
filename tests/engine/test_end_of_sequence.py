"""The tokens that end an answer: the tokenizer's own, and those of the model's configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire.compose.text import compose_text
from quire.config import EngineArgs
from quire.errors import ModelFileError
from tests.text.small_tokenizers import byte_level, write_directory

CONFIG: dict[str, Any] = {"config.json": {}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),
        ({"generation_config.json": {"eos_token_id": 4}}, (1, 4)),
        ({"generation_config.json": {"eos_token_id": [7, 4, 1]}, "config.json": {"eos_token_id": 9}}, (1, 7, 4)),
        ({"generation_config.json": {"eos_token_id": []}, "config.json": {"eos_token_id": 9}}, (1, 9)),
        ({"config.json": {"eos_token_id": [1, 9]}}, (1, 9)),
        ({"config.json": {"text_config": {"eos_token_id": 3}}}, (1, 3)),
        ({"tokenizer_config.json": {}, "config.json": {"eos_token_id": 9, "bos_token_id": 0}}, (9,)),
        ({"tokenizer_config.json": {}}, ()),
    ],
)
def test_what_ends_an_answer(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    directory = write_directory(tmp_path, byte_level(), files=CONFIG | files)
    assert compose_text(EngineArgs(), directory).eos_token_ids == expected


@pytest.mark.parametrize(
    ("name", "value"), [("generation_config.json", -1), ("config.json", "2"), ("config.json", 2**31)]
)
def test_a_value_that_is_no_token_is_named_with_its_file(tmp_path: Path, name: str, value: Any) -> None:
    directory = write_directory(tmp_path, byte_level(), files=CONFIG | {name: {"eos_token_id": value}})
    with pytest.raises(ModelFileError, match=f"^{name}: eos_token_id"):
        compose_text(EngineArgs(), directory)


def test_without_a_tokenizer_the_configuration_alone_says_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 9]}), encoding="utf-8")
    assert compose_text(EngineArgs(), tmp_path).eos_token_ids == (7, 9)
