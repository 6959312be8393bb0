"""What a path that was given as a model is, where it is none. At a terminal a path may be shown whole."""

import os
import re
from pathlib import Path

from quire.errors import ModelFileError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_GGUF = b"GGUF"


def is_model(path: str) -> bool:
    """Whether there is a model in this directory."""
    return os.path.isfile(os.path.join(path, "config.json"))  # pathlib raises where a name is too long


def may_be_model(text: str) -> bool:
    """Whether there is such a path, or may be such a repository on the hub."""
    return os.path.exists(text) or bool(_HUB_ID.fullmatch(text))


def check(model: str | None) -> None:
    """Let the embedded model (None), a model's directory and what may be a hub id pass.

    Raises:
        ModelFileError: a path that is no model: what it is instead, with the whole path.
    """
    if model is None:
        return
    path = Path(model)
    if not may_be_model(model):
        raise ModelFileError(f"there is no {path.absolute()}, and {model!r} is not the id of a model on the hub")
    if os.path.exists(model) and not is_model(model):
        raise ModelFileError(f"{path.absolute()} {_what(path)}; a model is a directory with {_NEEDED}")


_NEEDED = "config.json, *.safetensors and tokenizer.json"


def _what(path: Path) -> str:
    try:
        if not path.is_dir():
            with path.open("rb") as file:
                is_gguf = file.read(len(_GGUF)) == _GGUF
            return "is a GGUF file, which this version does not load" if is_gguf else "is a file"
        names = sorted(item.name for item in path.iterdir())
    except OSError as error:
        return f"cannot be read ({(error.strerror or type(error).__name__).lower()})"
    if not names:
        return "is an empty directory"
    if any(name.endswith(".gguf") for name in names):
        return "holds a GGUF file, which this version does not load"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"is a directory without config.json (it holds {shown})"
