"""The parts of one GGUF model: a file, or a set whose names end in `-00001-of-0000N.gguf`."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quire.errors import ModelFileError
from quire.weights.formats.gguf_file import GgufFile, GgufTensor
from quire.weights.formats.gguf_names import part_paths
from quire.weights.json_file import printable


class GgufParts:
    """All files of one model, open: the values of the first, the tensors of all. A context manager."""

    def __init__(self, path: Path, known: "GgufParts | None" = None) -> None:
        """
        Args:
            path: any part.
            known: the same model, read before and closed meanwhile: no header is read twice.

        Raises:
            ModelFileError: a part is missing or damaged, or the parts do not belong together.
        """
        self.files: list[GgufFile] = []
        self.home: dict[str, GgufFile] = {}
        try:
            for part, before in zip_longest(part_paths(path), () if known is None else known.files):
                self._add(GgufFile(part, before))
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
                stated_text = f"split.count {stated[0]} and split.no {stated[1]}, counted from 0"
                named = f"{number} of {len(self.files)}"
                raise ModelFileError(f"{file.name}: its header says {stated_text}; its name says {named}")
        total = self.files[0].values.get("split.tensors.count", len(self.home))
        if total != len(self.home):
            raise ModelFileError(f"{self.files[0].name}: split.tensors.count is {total}; there are {len(self.home)}")
