"""Whether an engine is still what was built: every byte of its files, then what it answers."""

from collections.abc import Callable, Iterator
from pathlib import Path

from quire.build.builder import record_of
from quire.weights.formats.engine_dir import Golden, Manifest


def wrong_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """The files whose content differs.

    Raises:
        ModelFileError: one cannot be read.
    """
    for name, record in manifest.files.items():
        if record_of(directory / name).sha256 != record.sha256:
            yield name


def wrong_answers(
    manifest: Manifest, instruction_set: str, answer: Callable[[Golden], list[int]]
) -> tuple[list[Golden], int]:
    """Golden prompts that this machine answers otherwise, and how many were tried: those of its instruction set."""
    tried = [golden for golden in manifest.golden if golden.instruction_set == instruction_set]
    return [golden for golden in tried if answer(golden) != golden.token_ids], len(tried)
