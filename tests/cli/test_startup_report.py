"""`quire generate --startup-report`: every stage once, and together the whole."""

import re
from pathlib import Path

import pytest

from quire.cli.main import main
from tests.tiny.checkpoints import make_tiny


def test_the_stages_of_a_start_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    words = ["generate", str(model), "hello", "--max-tokens", "3", "--temperature", "0", "--quiet"]
    assert main([*words, "--startup-report"]) == 0
    reported = capsys.readouterr()
    lines = [(float(ms), name) for ms, name in re.findall(r"^ +(-?[\d.]+) ms  (.+)$", reported.err, re.MULTILINE)]
    assert [name.split(",")[0].split(":")[0] for _, name in lines] == [
        "interpreter", "imports of the engine", "configuration", "operations", "weights", "cache", "tokenizer",
        "prompt and first text", "in all",
    ]  # fmt: skip
    assert sum(ms for ms, _ in lines[:-1]) == pytest.approx(lines[-1][0], abs=1.0)
    assert main(words) == 0
    plain = capsys.readouterr()
    assert plain.out == reported.out and plain.err == "", "the next start says nothing"


@pytest.mark.parametrize("flags", [["--url", "http://127.0.0.1:1"], ["--core-process"]])
def test_another_process_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--startup-report", *flags]) == 2
    assert "startup_report is of an engine in this process" in capsys.readouterr().err
