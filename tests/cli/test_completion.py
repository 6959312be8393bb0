"""What TAB completes, in the shells themselves, where they are installed."""

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from quire.cli.completion import SHELLS
from quire.cli.main import VERBS, main, make_parser

TRY = """source "$0"
COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _quire; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("completion")


def script(scripts: Path, shell: str, capsys: pytest.CaptureFixture[str]) -> Path:
    path = scripts / shell
    if not path.exists():
        assert main(["completion", shell]) == 0
        path.write_text(capsys.readouterr().out)
    return path


def found(shell: str, path: Path, words: list[str]) -> set[str]:
    """What is offered for the last word."""
    commands = {
        "bash": ["bash", "--norc", "-c", TRY, str(path), "quire", *words],
        "fish": ["fish", "--no-config", "-c", f"source {path}; complete -C 'quire {' '.join(words)}'"],
    }
    done = subprocess.run(commands[shell], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return {line.split("\t")[0] for line in done.stdout.splitlines()}


CASES: list[tuple[list[str], set[str]]] = [
    ([""], set(VERBS)),
    (["se"], {"serve"}),
    (["serve", "--allowed"], {"--allowed-origins", "--allowed-methods", "--allowed-headers", "--allowed-hosts"}),
    (["serve", "--log-format", ""], {"text", "json"}),
    (["bench", ""], {"throughput", "latency", "startup", "core", "structured", "serve", "compare"}),
    (["bench", "throughput", "--comp"], {"--compare"}),
    (["bench", "throughput", "--compare", ""], {"transformers"}),
    (["completion", ""], set(SHELLS)),
    (["chat", "serve", "--no-h"], {"--no-history"}),
]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(("words", "expected"), CASES)
def test_tab(
    scripts: Path, shell: str, words: list[str], expected: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert found(shell, script(scripts, shell, capsys), words) == expected


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_every_verb_is_offered(scripts: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    parser = make_parser([verb])
    (verbs,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    flags = {flag for one in verbs.choices[verb]._actions for flag in one.option_strings}
    assert found("bash", script(scripts, "bash", capsys), [verb, "-"]) == flags


def test_zsh_reads_its_script(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    subprocess.run(["zsh", "-n", str(script(scripts, "zsh", capsys))], check=True)
