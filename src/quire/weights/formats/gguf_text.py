"""What a GGUF header says of its tokenizer, as plain values for those who make one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.weights.formats.gguf_file import GgufArray
from quire.weights.formats.gguf_parts import GgufParts


@dataclass(frozen=True, slots=True)
class GgufTokenizerValues:
    """The keys `tokenizer.*`, arrays as lists; none of a file without a tokenizer."""

    name: str
    """Of the file, for errors."""
    values: Mapping[str, Any]
    architecture: str


def read_gguf_tokenizer_values(path: Path, known: GgufParts | None = None) -> GgufTokenizerValues:
    """Read them.

    Args:
        known: the model's headers, if they were read.

    Raises:
        ModelFileError: a file is missing or damaged, or a string is not UTF-8.
    """
    with GgufParts(path, known) as parts:
        found = {
            key: value.items if isinstance(value, GgufArray) else value
            for key, value in parts.values.items()
            if key.startswith("tokenizer.")
        }
        # A model for ids alone says so in place of its vocabulary.
        has_none = found.get("tokenizer.ggml.model", "none") in ("none", "no_vocab")
        architecture = str(parts.values.get("general.architecture"))
        return GgufTokenizerValues(parts.name, {} if has_none else found, architecture)
