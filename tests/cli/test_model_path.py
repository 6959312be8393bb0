"""A path that exists and is no model: the terminal reads what it is, and the whole path."""

from pathlib import Path

import pytest

from quire.cli import model_path
from quire.cli.main import main
from quire.errors import ModelFileError

CASES = {
    "empty directory": "is an empty directory",
    "model.gguf": "is a file, and not a GGUF file",
    "notes.txt": "is a file, and not a GGUF file",
    "pictures": "is a directory without config.json (it holds a.png, b.png, c.png, ...)",
    "../elsewhere": "there is no ",
}


@pytest.fixture
def paths(tmp_path: Path) -> Path:
    (tmp_path / "empty directory").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGML\3\0\0\0")
    (tmp_path / "notes.txt").write_text("GGU")
    (tmp_path / "pictures").mkdir()
    for file in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / "pictures" / file).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("verb", [["generate", "MODEL", "hi"], ["chat", "MODEL"], ["serve", "--port", "0", "MODEL"]])
def test_every_verb_says_what_it_is(
    paths: Path, name: str, verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(paths)
    assert main([name if word == "MODEL" else word for word in verb]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert CASES[name] in captured.err and str(paths / name) in captured.err


def test_what_may_be_of_the_hub_is_let_through(paths: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paths)
    for model in (None, "org/name", "gpt2", str(tiny)):
        model_path.check(model)
    model_path.check("org/name:model-Q4_K_M.gguf")
    for model in ("a/b:c.bin", "a/b/c", "what is it", "x" * 5000 + " ", "/" + "x" * 5000):
        with pytest.raises(ModelFileError):
            model_path.check(model)


def test_a_prompt_is_no_model_however_long(tiny: Path, paths: Path) -> None:
    assert model_path.is_model(str(tiny))
    for prompt in ("x" * 5000, "a\0b", "", str(paths / "pictures")):
        assert not model_path.is_model(prompt)


def test_gguf_files_are_models_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "sha256-0a1b").write_bytes(b"GGUF")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for model in (tmp_path / "sha256-0a1b", tmp_path / "a.gguf", tmp_path):
        assert model_path.is_model(str(model))
        model_path.check(str(model))
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"the directory holds 2 GGUF models; name the file: a\.gguf, b\.gguf"):
        model_path.check(str(tmp_path))
