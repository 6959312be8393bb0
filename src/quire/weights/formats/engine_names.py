"""Names of an engine directory's files, and whether a directory is one. The side that knows text reads this alone."""

from pathlib import Path

MANIFEST, WEIGHTS, BUILDING = "engine.json", "weights.quire", ".building"


def is_engine(directory: Path) -> bool:
    """Whether there is a manifest here, or the beginning of an engine that was never finished."""
    return (directory / MANIFEST).exists() or (directory / BUILDING).exists()
