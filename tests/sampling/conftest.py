"""Providers for known logits, and a tiny float32 model with transformers as its judge."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.ops.types import Ops
from tests.sampling.known_rows import PROVIDERS
from tests.tiny.checkpoints import make_tiny


@pytest.fixture(scope="session", params=PROVIDERS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return PROVIDERS[request.param]()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that its logits are those of transformers but for the order of additions."""
    return make_tiny("llama", tmp_path_factory.mktemp("float32") / "llama", tokenizer=True)


@pytest.fixture(scope="session")
def judge(model: Path) -> Any:
    """The same model in transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
