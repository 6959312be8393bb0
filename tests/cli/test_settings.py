"""Settings of `quire serve` from flags, environment and a file: which wins, and what is said of a wrong one."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.cli import serve, settings
from quire.cli.arguments import Parser, engine_values
from quire.cli.config_file import read_config
from quire.cli.main import make_parser
from quire.errors import ConfigurationError


def options(words: list[str], environment: dict[str, str], said: list[str] | None = None) -> argparse.Namespace:
    """What `quire serve WORDS` is run with."""
    parser = Parser(prog="quire serve", allow_abbrev=False)
    serve.add(parser)
    found = settings.completed(words, parser, environment, (said if said is not None else []).append)
    namespace: argparse.Namespace = make_parser(["serve"]).parse_args(["serve", *found])
    return namespace


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "quire.yaml"
    path.write_text(
        "# what runs here\nport: 1\nmodel: from-file\nhost: 0.0.0.0\nserved-model-name: [a, 'b c']\n"
        "limit:\n  - prompts=3\n  - messages=4\nenforce_eager: true\nenable-prefix-caching: false\n"
        "max-num-seqs: 1k\napi_key: 007\n"
    )
    return path


def test_a_flag_goes_before_the_environment_and_that_before_the_file(file: Path) -> None:
    config = ["--config", str(file)]
    environment = {"QUIRE_PORT": "2", "QUIRE_MODEL": "from-environment", "HOME": "/", "QUIRE_ISA": "avx2"}
    assert options([], {}).port is None
    assert options(config, {}).port == 1
    assert options(config, environment).port == 2
    assert options([*config, "--port", "3"], environment).port == 3
    assert options([*config, "--port=3"], environment).port == 3
    for words, model in (
        (config, "from-file"),
        ([], None),
        (["--model", "flag"], "flag"),
        (["positional", *config], "positional"),
        ([*config, "positional"], "positional"),
    ):
        assert engine_values(options(words, {})).get("model") == model
    assert engine_values(options(config, environment))["model"] == "from-environment"
    assert engine_values(options(["positional"], environment))["model"] == "positional"
    by_name = options([], {"QUIRE_CONFIG": str(file), "QUIRE_CONTEXT_LENGTH": "9"})
    assert by_name.port == 1 and engine_values(by_name)["max_model_len"] == 9, "other engines' names too"


def test_every_kind_of_flag_is_read(file: Path) -> None:
    found = options(["--config", str(file)], {"QUIRE_API_KEY": '["x", "y,z"]', "QUIRE_QUIET": "true"})
    assert (found.host, found.served_model_name, found.limit) == (
        "0.0.0.0",
        ["a", "b c"],
        ["prompts=3", "messages=4"],
    )
    assert engine_values(found) == {
        "model": "from-file",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 1000,
    }
    assert (found.api_key, found.quiet) == (["x", "y,z"], True)
    assert options(["--config", str(file)], {}).api_key == ["007"]
    flags = ["--config", str(file), "--limit", "prompts=9", "--api-key", "k", "--no-enforce-eager"]
    over = options(flags, {"QUIRE_API_KEY": "one"})
    assert (over.limit, over.api_key, over.enforce_eager) == (["prompts=9"], ["k"], False), "lists are not added up"
    assert options([], {"QUIRE_ALLOWED_ORIGINS": "*"}).allowed_origins == ["*"]


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"QUIRE_API_KEY": ""}, "QUIRE_API_KEY is empty"),
        ({"QUIRE_PORT": "many"}, "QUIRE_PORT must be a"),
        ({"QUIRE_QUIET": "yes"}, "QUIRE_QUIET must be true or false"),
        ({"QUIRE_ENFORCE_EAGER": "1"}, "QUIRE_ENFORCE_EAGER must be true or false"),
        ({"QUIRE_LOG_FORMAT": "xml"}, "QUIRE_LOG_FORMAT must be one of text, json"),
        ({"QUIRE_CONFIG": "/nowhere"}, "cannot be read"),
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        options([], environment)


def test_variables_that_are_no_flags_are_said() -> None:
    said: list[str] = []
    others = {"QUIRETTE": "x", "QUIRE_CI_LOADED": "1", "QUIRE_SERVICE_HOST": "10.0.0.1"}  # of other programs
    found = options([], {"QUIRE_PROT": "1", "QUIRE_PORT": "tcp://10.0.0.1:80", **others}, said)
    assert found.port is None and len(said) == 2
    assert "did you mean QUIRE_PORT?" in said[1] and "Kubernetes" in said[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prot: 1", "line 1 of .*: unknown flag 'prot'; did you mean 'port'?"),
        ("port: 1\n\nport: 2", "line 3 of .*: port stands there twice"),
        ("port: many", r"port \(line 1 of .*\) must be a"),
        ("port: [1, 2]", "must be one value, not a list"),
        ("model:\n  name: x", "line 2 of .*: expected `key: value`"),
        ("model: {name: x}", "line 1"),
        ("model: &x y", "line 1"),
        ("allowed-origins: *", "must stand in quotes"),
        ("model: |\n  x", "line 1"),
        ("- port", "line 1"),
        ("limit: [a, b", "a list is .* on one line"),
        ("limit: [a b, [c]]", "line 1"),
        ("config: other", "unknown flag 'config'"),
        ('{"port": {"a": 1}}', "is not flat JSON"),
        ('{"port": ', "is not flat JSON"),
        ('{"port": ' + "[" * 100_000, "is not flat JSON: it is nested too deeply"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=problem):
        options(["--config", str(path)], {})


def test_a_file_that_is_not_there_or_is_no_text_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nofile\.yaml: no such file or directory"):
        options(["--config", str(tmp_path / "nofile.yaml")], {})
    (tmp_path / "x.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="it is not UTF-8"):
        options(["--config", str(tmp_path / "x.yaml")], {})


SAME: list[str] = [
    "a: b\nc: d e # f\n# g\n\nh: 'i''s #1'\nj: \"k\\tl\"\n",
    "---\na: http://x:80/y\nb: [c, 'd, e', \"f\", 1]\n",
    "a:\n- b\n-  c # d\n- 'e: f'\ng: /h/i_j-k.l\n",
    "a: -1\nb: 0.5\nc: true\nd: null\ne: ~\nf:\n",
    '{"a": 1, "b": ["c", true], "d": null}',
    "a: b:c\nd: e=f\ng: 1k\nh: '*'\ni: []\n",
]


@pytest.mark.parametrize("text", SAME)
def test_what_is_read_is_what_yaml_reads(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value).lower() if isinstance(value, bool) else str(value)

    expected = {key: plain(value) for key, value in yaml.safe_load(text).items() if value not in (None, [])}
    assert {key: value for key, (value, _) in read_config(str(path)).values.items()} == expected
