"""What the demo model is to know, read from the TOML files beside this one."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Topic:
    """One term: the forms of its name, what it is, why it matters."""

    names: list[str]
    what: str
    why: str

    @property
    def detail(self) -> str:
        """The long answer, which is both short ones."""
        return f"{self.what} {self.why}" if self.what.isascii() else self.what + self.why


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two topics differ."""

    first: Topic
    second: Topic
    answer: str


@dataclass(frozen=True, slots=True)
class Knowledge:
    """All that the model says in one language. The mappings keep the shape of their TOML tables."""

    language: str
    topics: list[Topic]
    comparisons: list[Comparison]
    talk: dict[str, Any]
    questions: dict[str, list[Any]]
    stories: dict[str, list[str]]


def read_toml(name: str) -> dict[str, Any]:
    """Return the content of a data file of this folder."""
    return tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))


def load_knowledge(language: str) -> Knowledge:
    """Return the knowledge of one of LANGUAGES; KeyError if a comparison names an unknown topic."""
    topics = {key: Topic(**table) for key, table in read_toml(f"facts_{language}.toml").items()}
    talk = read_toml(f"talk_{language}.toml")
    comparisons = [
        Comparison(topics[entry["pair"][0]], topics[entry["pair"][1]], entry["answer"]) for entry in talk["compare"]
    ]
    return Knowledge(
        language=language,
        topics=list(topics.values()),
        comparisons=comparisons,
        talk=talk,
        questions=read_toml("questions.toml")[language],
        stories=read_toml(f"stories_{language}.toml"),
    )
