"""What there is to write. Each exercise has the number of its section in docs/course."""

from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigurationError

SKELETONS = Path(__file__).with_name("skeletons")


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise."""

    section: str
    title: str
    name: str
    """Of the learner's file, of its skeleton, and of the module with its checks."""
    wanted: tuple[str, ...]
    """What the file must define."""

    @property
    def file_name(self) -> str:
        """As `start` writes it."""
        return f"{self.name}.py"

    @property
    def skeleton(self) -> Path:
        """The file to begin with."""
        return SKELETONS / self.file_name


_TABLE = (
    Exercise("1.2", "KV-cache arithmetic", "kv_cache", ("bytes_per_token", "blocks_for", "sequences_that_fit")),
    Exercise("2.1", "a block manager", "block_manager", ("BlockManager",)),
    Exercise("2.2", "a scheduler", "scheduler", ("Scheduler",)),
    Exercise("3.2", "a sampler", "sampler", ("penalized", "probabilities", "sample")),
    Exercise("3.3", "a quantiser", "quantiser", ("quantize", "dequantize")),
)
EXERCISES = {one.section: one for one in _TABLE}
"""Section -> exercise."""


def find(section: str) -> Exercise:
    """The exercise of a section. Raises ConfigurationError where there is none."""
    if section not in EXERCISES:
        text = f"section {section[:40]} has no exercise; there are: {', '.join(EXERCISES)}"
        raise ConfigurationError(text, field="section")
    return EXERCISES[section]
