"""Settings shared by all tests: no network, and hypothesis without wall-clock deadlines."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if not os.path.exists("/dev/nvidia0"):
    # Triton reads it when it is first imported, which may be by torch.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a shell runs in its background ignores these, and so would all that tests start and send them to.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# Before any test imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy machine must not fail a test; in CI the same commit must give the same answer twice.
settings.register_profile(
    "quire", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quire")

PATIENCE_S = float(os.environ.get("QUIRE_TEST_PATIENCE_S", "120"))
"""How long a test waits for what comes before it fails: long, so that only what never comes fails it."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer checkpoint in bfloat16 with a byte-level tokenizer and a chat template."""
    from tests.tiny.checkpoints import make_tiny

    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", dtype="bfloat16", tokenizer=True)
