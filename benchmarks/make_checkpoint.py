"""Random checkpoints in the shapes that the benchmarks use. Speed does not depend on what the weights say.

    python benchmarks/make_checkpoint.py m135 DIRECTORY        SmolLM2-135M's shape, 270 MB in bfloat16
    python benchmarks/make_checkpoint.py m1b DIRECTORY         Llama-3.2-1B's shape, 2,470 MB

Needs torch and transformers (`pip install "quire[test]"`). There is no tokenizer: the workloads are token ids.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES = {
    "m135": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope_theta": 100000.0,
    },
    "m1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 500000.0,
    },
}


def main() -> None:
    """Write the checkpoint that the command line names."""
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=True, **SHAPES[sys.argv[1]])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(Path(sys.argv[2]))
    print(f"{model.num_parameters() / 1e6:.0f} million parameters in {sys.argv[2]}")


if __name__ == "__main__":
    main()
