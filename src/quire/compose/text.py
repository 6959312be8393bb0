"""The side that knows text, from a model's files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.config import EngineArgs
from quire.text.tokenizer import Tokenizer
from quire.weights.formats.gguf_names import header_path
from quire.weights.generation_config import load_generation_defaults
from quire.weights.hub import resolve_tokenizer_directory

if TYPE_CHECKING:
    from quire.weights.formats.gguf_parts import GgufParts


@dataclass(frozen=True, slots=True)
class TextParts:
    """What is known of a model before its weights are."""

    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    """What ends an answer: the tokenizer's own token, then those of the model's configuration, each once."""
    default_params: Mapping[str, Any]
    """Sampling defaults of `generation_config.json`."""


def compose_text(args: EngineArgs, path: Path, known: "GgufParts | None" = None) -> TextParts:
    """Load tokenizer, template and defaults of a directory or a GGUF file.

    Args:
        known: of a GGUF file, its headers, if they were read.

    Raises:
        ConfigurationError: naming the argument or the file at fault.
    """
    header = header_path(path)
    if header is not None and known is None:
        from quire.weights.formats.gguf_parts import GgufParts

        with GgufParts(header) as known:
            pass  # once for both of what follows
    tokenizer = _load_tokenizer(args, path, header, known)
    defaults = load_generation_defaults(path, known)
    own = None if tokenizer is None else tokenizer.eos_token_id
    eos = dict.fromkeys((*(() if own is None else (own,)), *defaults.eos_token_ids))
    return TextParts(tokenizer, tuple(eos), defaults.sampling)


def _load_tokenizer(
    args: EngineArgs, path: Path, header_file: Path | None, known: "GgufParts | None"
) -> Tokenizer | None:
    if args.tokenizer is not None:
        return Tokenizer.from_directory(resolve_tokenizer_directory(args.tokenizer))
    if header_file is not None:
        # Not above: it brings numpy, which this side can do without.
        from quire.text.gguf_tokenizer import gguf_tokenizer
        from quire.weights.formats.gguf_text import read_gguf_tokenizer_values

        header = read_gguf_tokenizer_values(header_file, known)
        return Tokenizer(gguf_tokenizer(header.name, header.values, header.architecture)) if header.values else None
    if not (path / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_directory(path)
