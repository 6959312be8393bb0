"""The text that a calibration runs over, and its contexts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigurationError, ModelFileError
from quire.weights.json_file import open_regular, printable

PACKAGED = Path(__file__).parent / "calibration.txt"
"""English prose about software, conversations, code, Chinese: written for this project."""
CONTEXT, MAX_TOKENS, MIN_TOKENS = 512, 16_384, 1024
MAX_TEXT_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Contexts:
    """Tokens to run over."""

    token_ids: Sequence[Sequence[int]]
    """Of each context."""
    name: str
    """Of the text."""

    @property
    def num_tokens(self) -> int:
        """In all of them."""
        return sum(map(len, self.token_ids))


def read_contexts(path: Path, encode: Callable[[str], list[int]], longest: int) -> Contexts:
    """Contexts of one length, evenly spread over the text where it has more than `MAX_TOKENS`.

    Args:
        encode: the model's tokenizer.
        longest: positions that the model has.

    Raises:
        ConfigurationError: no such file, too large, not UTF-8, or too short; it names `calibrate`.
    """
    name = "the packaged text" if path == PACKAGED else printable(path.name)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        text = data.decode("utf-8")
    except ModelFileError as error:
        raise ConfigurationError(f"calibrate: {error.message}", field="calibrate") from None
    except UnicodeDecodeError as error:
        if len(data) <= MAX_TEXT_BYTES:
            raise ConfigurationError(
                f"calibrate: {name} is not UTF-8 at byte {error.start:,}", field="calibrate"
            ) from None
    if len(data) > MAX_TEXT_BYTES:
        raise ConfigurationError(f"calibrate: {name} has more than {MAX_TEXT_BYTES:,} bytes", field="calibrate")
    tokens, length = encode(text), min(CONTEXT, longest)
    if len(tokens) < MIN_TOKENS:
        words = f"calibrate: {name} has {len(tokens):,} tokens; at least {MIN_TOKENS:,} are needed"
        raise ConfigurationError(words, field="calibrate")
    whole = len(tokens) // length
    count = min(whole, MAX_TOKENS // length)
    starts = [whole * i // count * length for i in range(count)]
    return Contexts([tokens[start : start + length] for start in starts], name)
