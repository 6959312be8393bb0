"""The directory of a model's files: as given, or of a repository of the hub in the local cache."""

import re
from pathlib import Path

from quire.errors import ConfigurationError, ModelFileError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_TOKENIZER_FILES = ("*.json", "*.jinja")
_MODEL_FILES = ("*.safetensors", *_TOKENIZER_FILES)
# Files of folders are other formats or modules, `consolidated` is a second copy of the weights.
_IGNORED = ("*/*", "consolidated*")


def resolve_model_directory(
    model: str, revision: str | None = None, *, endpoint: str | None = None, cache_dir: Path | None = None
) -> Path:
    """The directory with the files of `model`, downloaded first if it is the id of a repository on the hub.

    A branch or tag is resolved to a commit once, and every file is of that commit. Only safetensors, JSON and
    chat templates are downloaded: never code, never pickles. What the hub's own library honours holds here:
    its cache, `HF_TOKEN`, `HF_HUB_OFFLINE`.

    Args:
        model: a directory or a hub id (`owner/name`).
        revision: branch, tag or commit on the hub; None is the default branch.
        endpoint: another hub; None is the library's.
        cache_dir: another cache; None is the library's.

    Raises:
        ModelFileError: no such directory or repository, not reachable, no access: in one line.
        ConfigurationError: a revision of a local directory.
    """
    return _resolve(model, revision, _MODEL_FILES, endpoint, cache_dir)


def resolve_tokenizer_directory(tokenizer: str, revision: str | None = None) -> Path:
    """As `resolve_model_directory`, without the weights."""
    return _resolve(tokenizer, revision, _TOKENIZER_FILES, None, None)


def _resolve(
    name: str, revision: str | None, patterns: tuple[str, ...], endpoint: str | None, cache_dir: Path | None
) -> Path:
    if name and Path(name).is_dir():
        if revision is not None:
            raise ConfigurationError("revision is for models of the hub; this one is a directory", field="revision")
        return Path(name)
    if not _HUB_ID.fullmatch(name):
        raise ModelFileError(f"no directory {Path(name).name!r}, and it is not the id of a model on the hub")
    return _download(name, revision, patterns, endpoint, cache_dir)


def _download(
    repo_id: str, revision: str | None, patterns: tuple[str, ...], endpoint: str | None, cache_dir: Path | None
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
        )
    except errors.GatedRepoError:
        reason = "access to it must be granted first, on its page at the hub, to the account of your HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = "the hub has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "there is no such directory, and the hub has no such model (or it is private)"
    except errors.LocalEntryNotFoundError:
        if huggingface_hub.is_offline_mode():
            reason = "it is not in the local cache, and HF_HUB_OFFLINE is set"
        else:
            reason = "the hub cannot be reached, and it is not in the local cache"
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        reason = f"the hub answered with an error ({type(error).__name__})"
    except OSError as error:
        reason = f"the files could not be written ({error.strerror or type(error).__name__})"
    else:
        return Path(directory)
    raise ModelFileError(f"{wanted}: {reason}")
