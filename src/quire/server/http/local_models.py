"""Models on the server's machine that are not served: an operator fetches and removes them, and gives served ones
further names. `quire.weights.local_models` has them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

MOST_ALIASES = 64
NAME_CHARACTERS = 128
"""Of an alias."""
MODEL_CHARACTERS = 256
"""Of what is fetched."""


class LocalModel(Protocol):
    """One revision of a model."""

    @property
    def directory(self) -> Path:
        """Where its files are."""


class LocalModels(Protocol):
    """What a door asks of them. Each may take long, and raises `ModelFileError`."""

    def find(self, name: str) -> Sequence[LocalModel]:
        """The revisions that a name stands for."""

    def pull(self, name: str, show: Callable[[int, int], None]) -> object:
        """Download what is missing. `show` is called with bytes that are there and bytes in all, by any thread; it ends
        the download by raising."""

    def remove(self, name: str) -> int:
        """Delete the revisions that a name stands for; the bytes that are free then."""


@dataclass(slots=True)
class LocalState:
    """What one server knows of them."""

    models: LocalModels | None = None
    """None: nothing is fetched or removed."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names, until the server stops, and the served ones that they stand for."""
    pulling: str = ""
    """What is being fetched: one at a time."""
