"""The files of GGUF models by their names and first bytes: known without reading a header, and without numpy."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from quire.errors import ModelFileError
from quire.weights.json_file import open_regular, printable

MAGIC = b"GGUF"
HEADER = "model.header"
"""In an engine directory: what the header of the GGUF file said that it was built from."""
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MAX_PARTS = 1000


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF does, whatever its name: Ollama calls them `sha256-...`."""
    if not os.path.isfile(path):  # pathlib raises where a name is too long
        return False
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def header_path(path: Path) -> Path | None:
    """The file whose GGUF header says what a model is: a GGUF file itself, or that of an engine that was built of one;
    None where `config.json` says it."""
    if is_gguf(path):
        return path
    return path / HEADER if is_gguf(path / HEADER) else None


def find_gguf(directory: Path) -> Path | None:
    """The one model of a directory, by its first part; None where no file ends in `.gguf`.

    Raises:
        ModelFileError: there are several.
    """
    found = sorted(item for item in directory.iterdir() if item.suffix == ".gguf")
    models = {_PART.sub(r"\g<stem>-\g<count>", item.name): item for item in reversed(found)}
    if len(models) > 1:
        names = ", ".join(printable(item.name) for item in found[:5])
        raise ModelFileError(f"the directory holds {len(models)} GGUF models; name the file: {names}")
    return next(iter(models.values()), None)


def part_names(name: str) -> list[str]:
    """All file names of the model that a part belongs to: itself alone, unless its name is one of a set.

    Raises:
        ModelFileError: the name counts wrongly.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_PARTS:
        raise ModelFileError(f"{printable(name)}: its name must count from 1 to at most {MAX_PARTS}")
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def part_paths(path: Path) -> Sequence[Path]:
    """All files of the model that a part belongs to.

    Raises:
        ModelFileError: one is missing.
    """
    found = [path.with_name(name) for name in part_names(path.name)]
    for part in found:
        if not part.is_file():
            beside = f", one of {len(found)} parts of this model," if len(found) > 1 else ""
            raise ModelFileError(f"{printable(part.name)}{beside} is missing")
    return found
