"""Settings shared by all tests: no network, and hypothesis without wall-clock deadlines."""

import os

from hypothesis import settings

# Before any test imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy machine must not fail a test; in CI the same commit must give the same answer twice.
settings.register_profile("quire", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("quire")
