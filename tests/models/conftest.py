"""Tiny checkpoints made once for each test session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny.checkpoints import make_tiny

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny` that makes each checkpoint once."""
    made: dict[str, Path] = {}

    def make(family: str, **settings: Any) -> Path:
        key = f"{family} {sorted(settings.items())}"
        if key not in made:
            made[key] = make_tiny(family, tmp_path_factory.mktemp(family), **settings)
        return made[key]

    return make
