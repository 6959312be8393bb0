"""The text that models are measured on, and how it is cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigurationError

PACKAGED = Path(__file__).with_name("eval_text.txt")
"""Written for this purpose alone: no model has seen it, and nothing is calibrated on it."""
OF_EMBEDDED = Path(__file__).with_name("eval_text_demo.txt")
"""What the embedded model, in float32, answers to questions that it knows: of other texts it can make nothing."""
MAX_TEXT_BYTES = 16 * 2**20
LEAST_PREDICTED = 100
"""Of fewer tokens the 99th percentile is the largest value."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read together, and which of them are predicted: those after index `first`."""

    token_ids: Sequence[int]
    first: int

    @property
    def num_predicted(self) -> int:
        """Tokens whose probability counts."""
        return len(self.token_ids) - 1 - self.first


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ConfigurationError: it cannot be read, is not UTF-8, is empty or exceeds 16 MiB.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise _bad(f"{path} cannot be read: {(error.strerror or type(error).__name__).lower()}") from None
    if len(data) > MAX_TEXT_BYTES:
        raise _bad(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB: give a part of it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _bad(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None
    if not text.strip():
        raise _bad(f"{path} is empty")
    return text


def windows_of(token_ids: Sequence[int], context: int, stride: int, prefix: Sequence[int] = ()) -> list[Window]:
    """A text as overlapping windows in which each of its tokens is predicted once, after as much as fits before it.

    ::

        context 8, stride 4    |0 1 2 3 4 5 6 7|               1 to 7 are predicted,
                                       |4 5 6 7 8 9 10 11|     then 8 to 11

    Args:
        token_ids: the text without what a tokenizer puts before it.
        context: tokens of a window, `prefix` among them.
        stride: tokens from the beginning of one window to that of the next, at most the room beside `prefix`.
        prefix: what every window begins with (BOS). Without it the first token of a window that overlaps none cannot be
            predicted.

    Raises:
        ConfigurationError: fewer than 100 tokens would be predicted.
    """
    room, found, done = context - len(prefix), list[Window](), 0
    if not 1 <= stride <= room or context < 2:
        raise ConfigurationError(
            f"stride must be from 1 to {max(room, 1)}, what a context of {context} holds", field="stride"
        )
    for begin in range(0, len(token_ids), stride):
        end = min(begin + room, len(token_ids))
        first = len(prefix) + max(done - begin, 0) - 1
        window = Window((*prefix, *token_ids[begin:end]), max(first, 0))
        if window.num_predicted > 0:
            found.append(window)
        done = end
        if end == len(token_ids):
            break
    predicted = sum(window.num_predicted for window in found)
    if predicted < LEAST_PREDICTED:
        raise _bad(f"too short: {predicted} tokens would be predicted, and {LEAST_PREDICTED} are the least")
    return found


def _bad(text: str) -> ConfigurationError:
    return ConfigurationError(f"text {text}", field="text")
