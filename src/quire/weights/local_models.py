"""Models on this machine: those in the hub's own cache folder. They are pulled, listed, looked at and removed here, for
the command line and for a server's doors, which are handed a `LocalModels`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import ModelFileError
from quire.weights.hub import PACKAGED, resolve_model_path
from quire.weights.short_names import full_name

CHUNK_BYTES = 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")
Show = Callable[[int, int], None]
"""Called with bytes that are there, and bytes in all as far as they are known."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file of a model."""

    name: str
    size_bytes: int
    path: Path


@dataclass(frozen=True, slots=True)
class LocalModel:
    """One revision of a model, as far as it was downloaded."""

    id: str
    commit: str
    revisions: tuple[str, ...]
    """Branches and tags that were this commit when they were last looked up."""
    size_bytes: int
    modified_s: float
    """Since the epoch."""
    files: tuple[LocalFile, ...]
    directory: Path

    @property
    def revision(self) -> str:
        """The shortest name of the revision."""
        return "main" if "main" in self.revisions else next(iter(sorted(self.revisions)), self.commit[:12])


class LocalModels:
    """The models of one cache folder.

    Args:
        cache_dir: another folder; None is the hub's own (HF_HUB_CACHE).
        endpoint: another hub; None is the library's.
    """

    def __init__(self, cache_dir: Path | None = None, endpoint: str | None = None) -> None:
        self._cache_dir, self._endpoint = cache_dir, endpoint

    def all(self) -> list[LocalModel]:
        """Every revision of every model, by name."""
        found = [
            _model(repo.repo_id, revision)
            for repo in self._repos()
            for revision in sorted(repo.revisions, key=lambda one: str(one.commit_hash))
        ]
        return sorted(found, key=lambda one: (one.id.lower(), one.commit))

    def find(self, name: str) -> list[LocalModel]:
        """The revisions that `ID[:revision]`, or a short name, stands for.

        Raises:
            ModelFileError: there is none on this machine.
        """
        model, revision = split_name(name)
        found = [one for one in self.all() if one.id.lower() == model.partition(":")[0].lower()]
        if revision is not None:
            begins = revision if len(revision) > 6 else "more digits"  # since `rm` removes what they stand for
            found = [one for one in found if revision in one.revisions or one.commit.startswith(begins)]
        if not found and name in PACKAGED:
            raise ModelFileError(f"{name} is a package, and not of the hub: quire inspect {name} says what is in it")
        if not found:
            raise ModelFileError(f"{name} is not on this machine: quire list shows what is, quire pull gets it")
        return found

    def pull(self, name: str, show: Show | None = None) -> LocalModel:
        """Download what of a model is missing, and check every file that it has.

        What an earlier pull left half done is gone on with. A file whose bytes are not those that the hub named is
        removed, so that the next pull gets it anew.

        Args:
            name: `ID[:revision]`, a short name, or `ID:FILE.gguf`.
            show: is called as bytes come.

        Raises:
            ModelFileError: no such model, no access, no connection, or a damaged file, which is named.
        """
        model, revision = split_name(name)
        options: dict[str, Any] = {"endpoint": self._endpoint, "cache_dir": self._cache_dir, "show": show}
        path = resolve_model_path(model, revision, **options)
        directory = path if path.is_dir() else path.parent
        pulled = next((one for one in self.all() if one.directory == directory), None)
        if pulled is None:
            raise ModelFileError(f"{name} is a model of this machine already, and not one of the hub")
        damaged = [file for file in pulled.files if not is_whole(file.path)]
        for file in damaged:
            file.path.resolve().unlink(missing_ok=True)
            file.path.unlink(missing_ok=True)
        if damaged:
            names = ", ".join(file.name for file in damaged)
            raise ModelFileError(f"{pulled.id}: damaged on its way, and removed: {names}; pull it again")
        return pulled

    def remove(self, name: str) -> int:
        """Delete the revisions that a name stands for; the bytes that are free then.

        Raises:
            ModelFileError: there is none, or the name is of one file of a model.
        """
        import huggingface_hub

        if split_name(name)[0].endswith(".gguf"):
            raise ModelFileError(f"{name} is one file of a model: remove the model, by its id")
        commits = [one.commit for one in self.find(name)]
        info = huggingface_hub.scan_cache_dir(self._cache_dir)
        strategy = info.delete_revisions(*commits)
        strategy.execute()
        return int(strategy.expected_freed_size)

    def _repos(self) -> Iterator[Any]:
        # Slow to import, and not needed where nothing is asked.
        import huggingface_hub
        from huggingface_hub.errors import CacheNotFound

        try:
            info = huggingface_hub.scan_cache_dir(self._cache_dir)
        except CacheNotFound:
            return
        yield from (repo for repo in info.repos if repo.repo_type == "model")


def split_name(name: str) -> tuple[str, str | None]:
    """`ID[:revision]` as the model and its revision; `ID:FILE.gguf` names a file, and no revision."""
    model = full_name(name)
    head, _, rest = model.partition(":")
    return (model, None) if not rest or rest.endswith(".gguf") else (head, rest)


def is_whole(path: Path) -> bool:
    """Whether a file of the cache has the bytes that the hub named: its blob is called by their hash, SHA-256 of large
    files and git's SHA-1 of others. A file that is not called so is taken for whole."""
    blob = path.resolve()
    size = blob.stat().st_size
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif _COMMIT.fullmatch(blob.name):
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        return True
    with blob.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == blob.name


def _model(repo_id: str, revision: Any) -> LocalModel:
    files = sorted(revision.files, key=lambda one: str(one.file_path))
    directory = Path(revision.snapshot_path)
    return LocalModel(
        id=repo_id,
        commit=revision.commit_hash,
        revisions=tuple(sorted(revision.refs)),
        size_bytes=revision.size_on_disk,
        modified_s=revision.last_modified,
        files=tuple(
            LocalFile(str(one.file_path.relative_to(directory)), one.size_on_disk, one.file_path) for one in files
        ),
        directory=directory,
    )
