"""The generated pages: they are what the code says, and an edit is seen."""

import argparse
from pathlib import Path

import pytest

from quire.sampling_params import SamplingParams
from scripts import reference_pages


def test_the_reference_is_fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["reference_pages", "--check"])
    assert reference_pages.main() == 0
    monkeypatch.setattr(reference_pages, "FOLDER", tmp_path / "reference")
    assert reference_pages.main() == 1
    monkeypatch.setattr("sys.argv", ["reference_pages"])
    assert reference_pages.main() == 0
    (tmp_path / "reference/cli.md").write_text("# Changed\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["reference_pages", "--check"])
    assert reference_pages.main() == 1


def test_every_field_and_every_flag_is_there() -> None:
    pages = reference_pages.pages()
    for name in SamplingParams.__dataclass_fields__:
        assert f"| `{name}` |" in pages["python.md"]
    for name in ("LLM.generate", "AsyncLLM.generate", "AsyncLLM.shutdown", "EngineArgs", "PromptTooLongError"):
        assert name in pages["python.md"]
    for flag in ("--max-num-seqs", "--port", "--api-key", "--reps", "--json", "--no-enable-prefix-caching"):
        assert f"`{flag}`" in pages["cli.md"]


def test_a_parameter_is_written_as_in_the_source() -> None:
    source = "class A:\n    async def f(self, a: int, *, b: str = 'x', **rest: Any) -> list[int]:\n        '''Count.'''"
    node = reference_pages.ast.parse(source).body[0].body[0]  # type: ignore[attr-defined]
    assert (
        reference_pages._member(node)[0]
        == "```python\nasync f(a: int, *, b: str = 'x', **rest: Any) -> list[int]\n```\n"
    )


def test_a_hidden_flag_stays_hidden() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seen", help="a | b")
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    assert reference_pages._flags(parser, {})[2:] == ["| `--seen` SEEN | a \\| b |", ""]
