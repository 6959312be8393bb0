"""What was typed in earlier conversations, for the arrow keys: one JSON text a line, readable by its owner alone."""

import json
import os
from contextlib import suppress
from pathlib import Path

MOST = 1000
"""Lines kept."""


def path() -> Path:
    """The file, under XDG's directory for state (https://specifications.freedesktop.org/basedir-spec)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local/state") / "quire" / "chat_history"


class History:
    """The lines of a person. A file that cannot be had is done without.

    Args:
        saves: read and write the file; else nothing is kept.
    """

    def __init__(self, *, saves: bool) -> None:
        self._saves = saves

    def lines(self) -> list[str]:
        """What is kept, the oldest first. A file that has grown long is cut."""
        lines: list[str] = []
        if not self._saves:
            return lines
        with suppress(OSError, UnicodeDecodeError):
            for item in path().read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    lines.append(str(json.loads(item)))
            if len(lines) > 2 * MOST:
                self._write(lines[-MOST:], os.O_TRUNC)
        return lines[-MOST:]

    def save(self, line: str) -> None:
        """Keep what was typed for later conversations."""
        if self._saves and line.strip():
            with suppress(OSError):
                self._write([line], os.O_APPEND)

    def _write(self, lines: list[str], mode: int) -> None:
        place = path()
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | mode, 0o600), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)
            file.writelines(json.dumps(line) + "\n" for line in lines)
