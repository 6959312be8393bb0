"""Several models of `quire serve`: what words and file make of them, and what is refused before anything is loaded."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.cli import serve, settings
from quire.cli.arguments import Parser
from quire.cli.config_file import read_config
from quire.cli.main import main, make_parser
from quire.cli.serve_models import Plan, plan_of
from quire.errors import ConfigurationError


def planned(words: list[str], environment: dict[str, str] | None = None) -> Plan | None:
    """What `quire serve WORDS` would start."""
    parser = Parser(prog="quire serve", allow_abbrev=False)
    serve.add(parser)
    found = settings.completed(words, parser, environment or {}, lambda text: None)
    options: argparse.Namespace = make_parser(["serve"]).parse_args(["serve", *found])
    return plan_of(options)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> list[str]:
        path = tmp_path / "quire.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_words_name_models_and_flags_hold_for_each() -> None:
    assert planned([]) is None and planned(["org/a"]) is None and planned(["--model", "org/a"]) is None
    plan = planned(["org/a", "--max-model-len", "2k", "/models/b", "--gpu-memory-utilization", "0.7", "--threads", "6"])
    assert plan is not None and (plan.memory_share, plan.threads) == (0.7, 6)
    assert [one.names for one in plan.models] == [("a",), ("b",)]
    assert [one.accepted for one in plan.models] == [{"a", "org/a"}, {"b", "/models/b"}]
    assert [(one.args.model, one.args.max_model_len, one.args.core_process) for one in plan.models] == [
        ("org/a", 2000, True), ("/models/b", 2000, True),
    ]  # fmt: skip
    assert [(one.args.gpu_memory_utilization, one.args.threads) for one in plan.models] == [(0.9, None)] * 2
    named = planned(["x/m", "y/m", "--served-model-name", "one", "two"])
    assert named is not None and [one.accepted for one in named.models] == [{"one"}, {"two"}]
    embedded = planned(["quire-demo", "org/a"], {"QUIRE_MODEL": "other"})
    assert embedded is not None and embedded.models[0].args.model is None


def test_entries_of_a_file_have_settings_of_their_own(file: Any) -> None:
    text = (
        "max_num_seqs: 8\nthreads: 4\nmodels:\n  - model: org/a\n    served_model_name: [small, s]\n    threads: 1\n"
        "    gpu_memory_utilization: 0.2\n  # the other\n  - served-model-name: large\n    model: org/b\n"
        "    context_length: 1k\n    enable_prefix_caching: false\n    max_num_seqs: 2\nport: 1\n"
    )
    plan = planned(file(text))
    assert plan == planned([], {"QUIRE_CONFIG": file(text)[1]}) and plan is not None and plan.threads == 4
    a, b = plan.models
    assert (a.names, a.memory_share, a.args.threads, a.args.max_num_seqs) == (("small", "s"), 0.2, 1, 8)
    assert (b.names, b.memory_share, b.args.threads, b.args.max_num_seqs) == (("large",), None, None, 2)
    assert (b.args.max_model_len, b.args.enable_prefix_caching) == (1000, False)
    as_json = '{"models": [{"model": "org/a", "threads": 2}, {"model": "org/b"}]}'
    found = planned(file(as_json))
    assert found is not None and [one.args.threads for one in found.models] == [2, None]


@pytest.mark.parametrize(
    "text",
    [
        "models:\n- model: a\n  port: 1\n-  model: b # c\nx: y\n",
        "models:\n  - model: 'a: b'\n    served_model_name: [c, \"d\"]\n  - model: e\n    seed: null\n",
        "a:\n- b\nmodels:\n - model: c\nd: [e]\n",
        '{"models": [{"model": "a", "names": ["b"]}], "c": 1}',
    ],
)
def test_what_is_read_is_what_yaml_reads(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        def one(value: Any) -> Any:
            return [str(item) for item in value] if isinstance(value, list) else str(value)

        return {key: one(value) for key, value in values.items() if value not in (None, []) and key != "models"}

    expected, found = yaml.safe_load(text), read_config(str(path))
    assert [{key: value for key, (value, _) in entry.items()} for entry in found.models] == [
        plain(entry) for entry in expected["models"]
    ]
    assert {key: value for key, (value, _) in found.values.items()} == plain(expected)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models:\n  - model: a\n    prot: 1", "line 3 of .*: unknown flag 'prot'"),
        ("models:\n  - model: a\n    max_model_ln: 1", "unknown flag 'max_model_ln'; did you mean 'max-model-len'"),
        ("models:\n  - model: a\n    port: 1", "unknown flag 'port'"),
        ("models:\n  - threads: 1", "entry 1 of models .* needs `model`"),
        ("models:\n  - model: a\n    threads: many", r"threads \(line 3 of .*\) must be a whole number"),
        ("models:\n  - model: a\n    threads: 0", r"model 1 \(a\): threads must be a whole number between 1 and 1024"),
        ("models:\n  - model: a\n    model: b", "line 3 of .*: model stands there twice"),
        ("models:\n  - model: a\n     threads: 1", "line 3 of .*: the keys of an entry"),
        ("models:\n  - model: a\n    served_model_name:\n      - b", "served_model_name has no value on its line"),
        ("models:\n  - quire-demo", "line 2 of .*: an entry of models is `- model: quire-demo`, not `- quire-demo`"),
        ("models:\n  - [a]", "line 2 of .*: expected `- key: value`"),
        ("models:\nport: 1", "models in .* has no entry below it"),
        ("models: []", "models in .* has no entry"),
        ("models: null", "models in .* must be entries"),
        ('{"models": []}', "models has no entry"),
        ('{"models": null}', "models has no entry"),
        ("models:\n    model: a", "line 2 of .*: the keys of an entry"),
        ("models: [a, b]", "models in .* must be entries"),
        ("models:\n  - model: a\nmodels:\n  - model: b", "line 3 of .*: models stands there twice"),
        ('{"models": ["a"]}', "models must be a list of objects"),
        ("models:\n  - model: x/a\n  - model: y/a", "'a' would be that of models 1 and 2"),
        ("models:\n  - model: a\n    served_model_name: b\n  - model: b", "'b' would be that of models 1 and 2"),
        ("models:\n  - model: a\n    served_model_name: ''", "served_model_name '' would be that of model 1"),
        ("models:\n  - model: a\n    core_process: false", "core_process must be true"),
        ("models:\n  - model: a\n    record: r\n  - model: b\n    record: r", "record names one file for two models"),
        ("model: c\nmodels:\n  - model: a", "models stand in .*, and `model`"),
        ("served_model_name: c\nmodels:\n  - model: a", "served_model_name is of one model"),
        ("record: c\nmodels:\n  - model: a", "record is of one model"),
    ],
)
def test_a_wrong_file_is_refused_by_key_and_line(file: Any, text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        planned(file(text))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a", "b", "--served-model-name", "x"], "served_model_name must be one name for each of 2 models, got 1"),
        (["a", "b", "--served-model-name", "x", "x"], "'x' would be that of models 1 and 2"),
        (["a", "a"], "'a' would be that of models 1 and 2"),
        (["a", "b", "--tokenizer", "c"], "tokenizer is of one model"),
        (["a", "b", "--record", "c"], "record is of one model"),
        (["a", "b", "--model", "c"], "model and several words"),
        (["a", "b", "--no-core-process"], "core_process must be true"),
        (["/nowhere/a", "b"], "there is no /nowhere/a"),
    ],
)
def test_wrong_words_end_with_one_line_and_nothing_begins(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*args: Any) -> Any:
        raise AssertionError("a model was begun")

    monkeypatch.setattr("quire.compose.served.begin", begin)
    assert main(["serve", "--port", "0", *words]) in (1, 2)
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1


def test_a_word_beside_entries_of_a_file_is_refused(file: Any) -> None:
    with pytest.raises(ConfigurationError, match="models stand in"):
        planned(["c", *file("models:\n  - model: a\n  - model: b")])
