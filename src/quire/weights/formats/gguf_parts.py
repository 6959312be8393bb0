"""The parts of one GGUF model: a file, or a set whose names end in `-00001-of-0000N.gguf`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.errors import ModelFileError
from quire.weights.formats.gguf_file import MAGIC, GgufFile, GgufTensor
from quire.weights.json_file import open_regular, printable

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MAX_PARTS = 1000


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF does, whatever its name: Ollama calls them `sha256-...`."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


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


class GgufParts:
    """All files of one model, open: the values of the first, the tensors of all. A context manager."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: any part.

        Raises:
            ModelFileError: a part is missing or damaged, or the parts do not belong together.
        """
        self.files: list[GgufFile] = []
        self.home: dict[str, GgufFile] = {}
        try:
            for part in part_paths(path):
                self._add(GgufFile(part))
            self._check_counts()
        except BaseException:
            self.close()
            raise
        self.name = self.files[0].name
        self.values: Mapping[str, Any] = self.files[0].values
        self.tensors: Mapping[str, GgufTensor] = {name: file.tensors[name] for name, file in self.home.items()}

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> "GgufParts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, file: GgufFile) -> None:
        self.files.append(file)
        for tensor in file.tensors:
            if tensor in self.home:
                raise ModelFileError(f"{file.name}: {printable(tensor)} is in {self.home[tensor].name} too")
            self.home[tensor] = file

    def _check_counts(self) -> None:
        """What the headers say of the set must be what its names say."""
        for number, file in enumerate(self.files):
            stated = file.values.get("split.count", len(self.files)), file.values.get("split.no", number)
            if stated == (0, 0):  # not split
                stated = 1, 0
            if stated != (len(self.files), number):
                text = f"split.count {stated[0]} and split.no {stated[1]}, counted from 0"
                raise ModelFileError(f"{file.name}: its header says {text}; its name says {number} of {len(self.files)}")
        total = self.files[0].values.get("split.tensors.count", len(self.home))
        if total != len(self.home):
            raise ModelFileError(f"{self.files[0].name}: split.tensors.count is {total}; there are {len(self.home)}")


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
