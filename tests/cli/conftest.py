"""A tiny model for the command line."""

from pathlib import Path

import pytest

from tests.tiny.checkpoints import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny-model"), tokenizer=True)
