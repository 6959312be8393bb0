"""Models on this machine, against a stand-in for the hub and the cache that the hub's own library writes."""

import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from quire.cli.main import main
from quire.errors import ModelFileError
from quire.weights import short_names as names_module
from quire.weights.hub import resolve_model_path
from quire.weights.local_models import LocalModels, is_whole, split_name
from quire.weights.short_names import full_name, short_names
from tests.weights.test_hub import NEW, OLD, WANTED, Hub, content, hub

__all__ = ["hub"]


@pytest.fixture
def models(hub: Hub, tmp_path: Path) -> LocalModels:
    return LocalModels(tmp_path / "cache", hub.endpoint)


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "quire" / "models.toml"
    path.parent.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return path


def test_a_pulled_model_is_listed_found_and_removed(models: LocalModels, hub: Hub) -> None:
    hub.moves = False
    assert models.all() == []
    seen: list[tuple[int, int]] = []
    pulled = models.pull("owner/model:v2", lambda done, total: seen.append((done, total)))
    assert (pulled.id, pulled.commit, pulled.revisions, pulled.revision) == ("owner/model", NEW, ("v2",), "v2")
    assert {file.name for file in pulled.files} == WANTED
    size = sum(len(content(NEW, name)) for name in WANTED)
    assert pulled.size_bytes == size and seen[-1] == (size, size) and len(seen) >= 2
    assert models.pull("owner/model").commit == OLD
    assert [one.commit for one in models.all()] == [OLD, NEW]
    assert [one.revision for one in models.find("Owner/Model")] == ["main", "v2"]
    assert [one.commit for one in models.find(f"owner/model:{NEW[:7]}")] == [NEW]
    with pytest.raises(ModelFileError, match="not on this machine"):
        models.find(f"owner/model:{NEW[:6]}")
    assert models.find(f"owner/model:{NEW[:7]}") == [pulled]
    assert models.remove("owner/model:v2") >= 0
    assert [one.commit for one in models.all()] == [OLD] and not pulled.directory.exists()
    models.remove("owner/model")
    assert models.all() == []
    with pytest.raises(ModelFileError, match="is not on this machine"):
        models.remove("owner/model")


def test_a_second_pull_downloads_nothing_again(models: LocalModels, hub: Hub) -> None:
    models.pull("owner/model:v2")
    files = [item for item in hub.files_asked_for]
    assert models.pull("owner/model:v2").commit == NEW
    assert hub.files_asked_for == files


def test_a_gguf_file_is_pulled_alone(models: LocalModels) -> None:
    pulled = models.pull("owner/model:tiny-Q8_0.gguf")
    assert [file.name for file in pulled.files] == ["tiny-Q8_0.gguf"]
    with pytest.raises(ModelFileError, match="one file"):
        models.remove("owner/model:tiny-Q8_0.gguf")


def test_a_damaged_file_is_named_removed_and_pulled_again(models: LocalModels) -> None:
    pulled = models.pull("owner/model:v2")
    damaged = next(file.path for file in pulled.files if file.name == "model.safetensors")
    whole = damaged.read_bytes()
    damaged.resolve().write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ModelFileError, match=r"damaged.*model\.safetensors"):
        models.pull("owner/model:v2")
    assert not damaged.exists()
    again = models.pull("owner/model:v2")
    assert {file.name for file in again.files} == WANTED and damaged.read_bytes() == whole


def test_hashes_are_those_of_the_hub(tmp_path: Path) -> None:
    """The blob of a large file is called by its SHA-256, others by what `git hash-object` says."""
    data = b"what is up, doc?"
    git = "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # of the book Pro Git, 10.2
    for name in (git, hashlib.sha256(data).hexdigest(), "no-hash"):
        (tmp_path / name).write_bytes(data)
        assert is_whole(tmp_path / name)
        (tmp_path / name).write_bytes(data[:-1] + b"!")
        assert is_whole(tmp_path / name) == (name == "no-hash")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/name", ("owner/name", None)), ("owner/name:v2", ("owner/name", "v2")),
        ("owner/name:a.gguf", ("owner/name:a.gguf", None)), ("qwen3-0.6b", ("Qwen/Qwen3-0.6B", None)),
        ("qwen3-0.6b:main", ("Qwen/Qwen3-0.6B", "main")), ("gpt2", ("gpt2", None)),
    ],
)  # fmt: skip
def test_a_name_may_bring_its_revision(name: str, found: tuple[str, str | None], own_table: Path) -> None:
    assert split_name(name) == found


def test_anyone_may_add_names(own_table: Path, hub: Hub, tmp_path: Path) -> None:
    own_table.write_text('[names]\nmine = "owner/model"\n"qwen3-8b" = "owner/other"\n', encoding="utf-8")
    assert full_name("mine:v2") == "owner/model:v2" and short_names()["qwen3-8b"] == "owner/other"
    directory = resolve_model_path("mine", "v2", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert (directory / "config.json").read_bytes() == content(NEW, "config.json")


@pytest.mark.parametrize(
    "text", ["[names", '[names]\nX = "a/b"\n', "[names]\nx = 3\n", '[names]\nx = "y"\n', "names = 3"]
)
def test_a_table_at_fault_is_named(own_table: Path, text: str) -> None:
    own_table.write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"models\.toml"):
        full_name("anything")
    assert full_name("owner/name") == "owner/name", "an id needs no table"


def test_every_name_of_ours_stands_for_an_id() -> None:
    for name, full in short_names(Path("nowhere")).items():
        assert names_module._NAME.fullmatch(name)
        huggingface_hub.utils.validate_repo_id(full)


def test_the_verbs(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    download, scan = huggingface_hub.snapshot_download, huggingface_hub.scan_cache_dir
    here = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: download(name, **how | here))
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda _: scan(here["cache_dir"]))
    assert not constants.HF_HUB_OFFLINE
    assert main(["list"]) == 0 and capsys.readouterr().out.split() == "NAME REVISION COMMIT SIZE CHANGED".split()
    assert main(["pull", "owner/model:v2"]) == 0
    assert capsys.readouterr().out.startswith(f"owner/model v2 ({NEW[:12]}): 3 files, ")
    assert main(["list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["id"], listed["commit"], listed["revisions"]) == ("owner/model", NEW, ["v2"])
    config = next((tmp_path / "cache").glob("models--owner--model/snapshots/*/config.json"))
    config.resolve().write_text('{"model_type": "llama"}', encoding="utf-8")
    assert main(["show", "owner/model", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["config"] == {"model_type": "llama"} and set(shown["files"]) == WANTED
    assert main(["show", "owner/model"]) == 0 and "model_type llama" in capsys.readouterr().out
    assert main(["rm", "owner/model"]) == 0 and "are free" in capsys.readouterr().out
    assert main(["rm", "owner/model"]) == 1 and "not on this machine" in capsys.readouterr().err
    assert main(["pull", "owner/none"]) == 1 and "no such model" in capsys.readouterr().err
