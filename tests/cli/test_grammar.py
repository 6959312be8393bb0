"""`quire grammar check` as it is run from outside."""

import io
import json
import os
from pathlib import Path

import pytest

from quire.cli.main import main

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def test_instances_are_accepted_or_rejected_with_the_place(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    (tmp_path / "answer").write_text('{"a": 22}\n')
    assert main(["grammar", "check", "--json-schema", str(file), '{"a": 1}', f"@{tmp_path / 'answer'}"]) == 0
    shown = capsys.readouterr().out
    assert 'shortest answer: {"a":0}' in shown and shown.count("accepted") == 2
    assert main(["grammar", "check", "--json-schema", SCHEMA, "--json", '{"a": 1}', '{"a": "x"}', '{"a": 1']) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(item["instance"], item["accepted"]) for item in found] == [
        ('{"a": 1}', True), ('{"a": "x"}', False), ('{"a": 1', False)
    ]  # fmt: skip
    assert found[0]["reason"] is None and "at byte 5" in found[1]["reason"] and "not complete" in found[2]["reason"]


def test_yaml_is_checked_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "answer.yaml").write_text("a: 22\n")
    given = ["grammar", "check", "--yaml-schema", SCHEMA]
    assert main([*given, "a: 1\nb:\n  - x", f"@{tmp_path / 'answer.yaml'}"]) == 0
    shown = capsys.readouterr().out
    assert "held: yaml schema" in shown and "shortest answer: a: 0" in shown
    assert main([*given, "--json", "a: x", "a: 1\na: 2", "a: 1"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["accepted"] for item in found] == [False, False, True] and "not allowed" in found[1]["reason"]
    assert main(["grammar", "check", "--yaml-schema", '{"uniqueItems": true}', "a"]) == 2
    assert main([*given, "--whitespace-pattern", " ", "a: 1"]) == 2
    assert "--whitespace-pattern belongs to json" in capsys.readouterr().err


def test_other_shapes(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    grammar = tmp_path / "sum.gbnf"
    grammar.write_text('root ::= [0-9]+ ("+" [0-9]+)*')
    assert main(["grammar", "check", "--grammar", str(grammar), "--tokenizer", str(tiny), "1+22", "7"]) == 0
    assert "held: grammar in GBNF" in capsys.readouterr().out
    reader, writer = os.pipe()  # what a shell gives for <(...): it can be read once
    os.write(writer, grammar.read_bytes())
    os.close(writer)
    assert main(["grammar", "check", "--grammar", f"/dev/fd/{reader}", "7"]) == 0
    os.close(reader)
    assert "held: grammar in GBNF" in capsys.readouterr().out
    assert main(["grammar", "check", "--regex", "[0-9]{3}", "123"]) == 0
    assert main(["grammar", "check", "--choice", "yes", "no", "--json", "--", "maybe"]) == 1


def test_generate_holds_its_answer(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    tail = ["--quiet", "--model", str(tiny), "--max-tokens", "60"]
    assert main(["generate", "hello", "--json-schema", str(file), *tail]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["a"], int)
    assert main(["generate", "hello", "--choice", "yes", "no", *tail]) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no")
    assert main(["generate", "hello", "--disable-any-whitespace", *tail]) == 2
    assert "--disable-any-whitespace needs --json-schema" in capsys.readouterr().err


def test_chat_holds_every_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", "--quiet", "--model", str(tiny), "--max-tokens", "60", "--choice", "yes", "no"]) == 0
    lines = capsys.readouterr().out.split()
    assert len(lines) == 2 and {*lines} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--json-schema", '{"not": {}}'], "the keyword 'not' at # cannot be held"),
        (["--regex", "(a"], "unclosed group"),
        (["--json-schema", "/absent.json"], ": /absent.json: no text can be read there: no such file or directory\n"),
        (["--grammar", "/"], ": /: no text can be read there: is a directory\n"),
    ],
)
def test_a_shape_that_is_refused(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grammar", "check", *words, "x"]) == 2
    assert text in capsys.readouterr().err
