"""Quantised checkpoints (GPTQ, AWQ, compressed-tensors, fp8) as one `WeightSource`; imported for no others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEYS = ("quantization_config", "compression_config")
"""Of config.json; the second is what compressed-tensors wrote first."""
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Where tools have written it before it went into config.json, and the method that it is then."""


def states_quantization(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a parsed `config.json`, or a file beside it, says that weights are quantised."""
    return any(config.get(key) is not None for key in KEYS) or any((directory / name).exists() for name in FILES)
