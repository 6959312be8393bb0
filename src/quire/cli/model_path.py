"""What a path that was given as a model is, where it is none. At a terminal a path may be shown whole."""

import os
import re
from pathlib import Path

from quire.errors import ModelFileError
from quire.weights.formats.gguf_names import find_gguf, is_gguf

_SIGNS = "config.json", "engine.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+\.gguf)?", re.ASCII)


def is_model(path: str) -> bool:
    """Whether this is a directory with a model, or a GGUF file, whatever its name."""
    if any(os.path.isfile(os.path.join(path, name)) for name in _SIGNS):  # pathlib raises where a name is too long
        return True
    if os.path.isdir(path):
        return any(name.endswith(".gguf") for name in os.listdir(path))
    return os.path.isfile(path) and is_gguf(Path(path))


def may_be_model(text: str) -> bool:
    """Whether there is such a path, or may be such a repository on the hub, or a GGUF file in one."""
    return os.path.exists(text) or bool(_HUB_ID.fullmatch(text))


def check(model: str | None) -> None:
    """Let the embedded model (None), a directory of a model, a GGUF file and what may be a hub id pass.

    Raises:
        ModelFileError: a path that is no model: what it is instead, with the whole path.
    """
    if model is None:
        return
    path = Path(model)
    if not may_be_model(model):
        raise ModelFileError(f"there is no {path.absolute()}, and {model!r} is not the id of a model on the hub")
    if not os.path.exists(model):
        return
    if not is_model(model):
        raise ModelFileError(f"{path.absolute()} {_what(path)}; a model is {_NEEDED}")
    if path.is_dir() and not (path / "config.json").is_file():
        find_gguf(path)  # raises where there are several


_NEEDED = "a GGUF file, or a directory with config.json, *.safetensors and tokenizer.json"


def _what(path: Path) -> str:
    try:
        if not path.is_dir():
            return "is a file, and not a GGUF file"
        names = sorted(item.name for item in path.iterdir())
    except OSError as error:
        return f"cannot be read ({(error.strerror or type(error).__name__).lower()})"
    if not names:
        return "is an empty directory"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"is a directory without config.json (it holds {shown})"
