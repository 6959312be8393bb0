"""Short names of models on the hub: a table of ours, and one that anyone may add to."""

import os
import re
import tomllib
from pathlib import Path

from quire.errors import ModelFileError

OURS = Path(__file__).with_name("short_names.toml")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def user_table() -> Path:
    """Where a person's own names stand."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "quire" / "models.toml"


def short_names(own: Path | None = None) -> dict[str, str]:
    """Name -> id on the hub.

    Args:
        own: a person's table; None: `user_table()`. It need not be there.

    Raises:
        ModelFileError: it is not of this form; the name at fault.
    """
    path = user_table() if own is None else own
    return _read(OURS) | (_read(path) if path.is_file() else {})


def full_name(name: str) -> str:
    """The id that a name stands for; of another name, the name itself. What follows a colon stays behind it."""
    head, colon, rest = name.partition(":")
    if _NAME.fullmatch(head) is None:
        return name  # it is a path or an id: no file is read for it
    return short_names().get(head, head) + colon + rest


def _read(path: Path) -> dict[str, str]:
    try:
        names = tomllib.loads(path.read_text(encoding="utf-8")).get("names", {})
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path.name}, the table of short names, cannot be read as TOML") from error
    for name, full in names.items() if isinstance(names, dict) else [("names", names)]:
        if not isinstance(full, str) or _NAME.fullmatch(name) is None or "/" not in full:
            raise ModelFileError(f"{path.name}: {name!r} must be lower case, and stand for owner/name of the hub")
    return dict(names)
