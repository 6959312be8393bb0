"""Judged by what others wrote: compressed-tensors' own compressors, and the dequantisation of fp8 in transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from quire.models.parameters import Concatenated
from quire.ops.reference import ReferenceOps
from quire.ops.types import QuantizedWeight
from quire.weights.formats.quantized.config import read_quantization
from quire.weights.formats.quantized.source import QuantizedWeights
from quire.weights.formats.safetensors import CheckpointWeights
from quire.weights.source import Target
from tests.weights.quantized_files import make_quantized
from tests.weights.test_quantized_checkpoints import FORMATS, TOKENS, logits_of

SHAPE = (96, 160)


def read(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: str = "bfloat16") -> Any:
    """The module `a` as Quire reads it: float32 values, and whether it stays in a format of the engine."""
    save_file({f"a.{name}": tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    quantization = read_quantization(directory, {"quantization_config": config})
    assert quantization is not None
    kinds: Any = dtype
    with CheckpointWeights(directory) as checkpoint:
        source = QuantizedWeights(checkpoint, quantization, Target(kinds, ("int8", "int8_w8a8", "int4", "fp8"), None))
        found: Any = source.matrix(Concatenated((("a.weight", SHAPE),)))
    if isinstance(found, QuantizedWeight):
        spread = np.repeat(found.scales, found.group_size, axis=1)[:, : SHAPE[1]]
        return found.values.astype(np.float32) * spread, True
    return found.astype(np.float32), False


TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    ("format", "weights", "inputs", "is_kept"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None, True),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, None, False),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None, False),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, None, None),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None, False),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, TOKEN | {"type": "int"}, None),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, TOKEN | {"type": "float"}, True),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, TOKEN | {"type": "float"}, True),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
            TOKEN | {"type": "float"},
            False,
        ),
    ],
)
def test_what_compressed_tensors_wrote_has_the_bits_that_it_reads(
    format: str, weights: dict[str, Any], inputs: dict[str, Any] | None, is_kept: bool | None, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=QuantizationArgs(**inputs) if inputs else None
    )
    torch.manual_seed(5)
    weight = (torch.randn(SHAPE) * 0.05).to(torch.bfloat16)
    rows, size = {"channel": (1, SHAPE[1]), "tensor": SHAPE, "group": (1, args.group_size or 1)}.get(
        str(args.strategy), tuple(args.block_structure or (1, 1))
    )
    blocks = weight.reshape(SHAPE[0] // rows, rows, SHAPE[1] // size, size)
    scale, zero = calculate_qparams(blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3)), args)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
    compressor: Any = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"].to(torch.float32).numpy()
    group = json.loads(scheme.model_dump_json())
    config = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": []}
    found, kept = read(tmp_path, config, packed)
    # The library rounds each product to bfloat16, as does the engine when it unpacks; what stays is not rounded.
    rounded = torch.from_numpy(found).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(rounded, expected)
    assert is_kept is None or kept == is_kept
    assert np.abs(expected - weight.to(torch.float32).numpy()).max() < 0.03


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_blocks_of_fp8_have_the_bits_that_transformers_reads(scales: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(6)
    weight = (torch.randn(SHAPE) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    grid = (torch.rand(3, 5) * 0.01 + 1e-4).to(scales)
    expected = Fp8Dequantize(None)._dequantize_one(weight, grid, torch.float32)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"}
    found, kept = read(tmp_path, config, {"weight": weight, "weight_scale_inv": grid}, "float32")
    assert not kept and np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("name", ["fp8 blocks", "W4A16", "W8A16", "fp8 compressed blocks"])
def test_the_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The whole model in float32, as transformers loads and dequantises the same files."""
    extra: dict[str, Any] = {}
    if name == "fp8 blocks":
        extra["quantization_config"] = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    else:
        pytest.importorskip("compressed_tensors")
    quantized, _ = make_quantized("llama", FORMATS[name], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32, **extra).eval()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = logits_of(quantized, ReferenceOps(np))
    assert np.abs(found - expected).max() < 1e-4 and np.ptp(expected) > 1
