"""Random checkpoints in the shapes that the benchmarks use. Speed does not depend on what the weights say.

    python benchmarks/make_checkpoint.py m135 DIRECTORY        SmolLM2-135M's shape, 270 MB in bfloat16
    python benchmarks/make_checkpoint.py m1b DIRECTORY         Llama-3.2-1B's shape, 2,470 MB
    python benchmarks/make_checkpoint.py 7b DIRECTORY          Llama-2-7B's shape, 13,480 MB
    python benchmarks/make_checkpoint.py tiny DIRECTORY        for trying the benchmarks themselves, 0.2 MB

Needs torch and transformers (`pip install "quire[test]"`); numbers are drawn on a GPU where there is one. There is no
tokenizer: the workloads are token ids. Tensors are written a few gigabytes at a time.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SHARD_BYTES = 4 << 30


def _shape(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }


SHAPES = {
    "m135": _shape(49152, 576, 1536, 30, 9, 3) | {"rope_theta": 100000.0, "tie_word_embeddings": True},
    "m1b": _shape(128256, 2048, 8192, 16, 32, 8) | {"rope_theta": 500000.0, "tie_word_embeddings": True},
    "7b": _shape(32000, 4096, 11008, 32, 32, 32) | {"rope_theta": 10000.0, "tie_word_embeddings": False},
    "tiny": _shape(640, 64, 96, 2, 4, 2) | {"rope_theta": 10000.0, "tie_word_embeddings": False},
}


def write(name: str, directory: Path) -> int:
    """A checkpoint of shape `name`; the number of its parameters."""
    config = LlamaConfig(
        max_position_embeddings=16384, architectures=["LlamaForCausalLM"], dtype="bfloat16", **SHAPES[name]
    )
    with torch.device("meta"):
        tensors: dict[str, Any] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    files: dict[str, str] = {}
    shard: dict[str, Any] = {}
    held = 0
    for index, (key, tensor) in enumerate(tensors.items()):
        drawn = torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.ndim > 1:
            drawn = torch.empty(tensor.shape, dtype=torch.bfloat16, device=generator.device)
            drawn = drawn.normal_(0.0, 0.02, generator=generator).cpu()
        shard[key], held = drawn, held + 2 * drawn.numel()
        if held >= SHARD_BYTES or index == len(tensors) - 1:
            file = f"model-{len(set(files.values())) + 1:05}.safetensors"
            save_file(shard, directory / file, metadata={"format": "pt"})
            files |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    size = sum(tensor.numel() for tensor in tensors.values())
    index_json = {"metadata": {"total_size": 2 * size}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json))
    config.save_pretrained(directory)
    return size


def main() -> None:
    """Write the checkpoint that the command line names."""
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    size = write(sys.argv[1], Path(sys.argv[2]))
    print(f"{size / 1e6:.0f} million parameters in {sys.argv[2]}")


if __name__ == "__main__":
    main()
