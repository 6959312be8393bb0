"""Tiny quantised checkpoints, packed by plain loops over integers: what public descriptions of the formats say."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.checkpoints import make_tiny

Parts = dict[str, torch.Tensor]
Written = tuple[Parts, np.ndarray[Any, Any]]
"""The tensors of a module by the ends of their names, and the float32 weight `[out, in]` that they stand for."""


def words(numbers: Any, bits: int) -> torch.Tensor:
    """Each row of `numbers [n, m]` as one number of `bits * m` bits, the first lowest, in words `[n, ...]` of int32."""
    rows = []
    for row in numbers:
        whole = sum(int(number) << (bits * i) for i, number in enumerate(row))
        size = -(-len(row) * bits // 32)
        rows.append(np.frombuffer(whole.to_bytes(4 * size, "little"), "<i4"))
    return torch.from_numpy(np.stack(rows).astype(np.int32))


@dataclass(frozen=True)
class Gptq:
    """AutoGPTQ's: words along the inputs; version 1 stores each zero point less one."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    act_order: bool = False
    version: int = 1

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        found = {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.symmetric}
        found |= {"desc_act": self.act_order, "lm_head": False, "damp_percent": 0.1, "static_groups": False}
        return found if self.version == 1 else found | {"checkpoint_format": "gptq_v2", "pack_dtype": "int32"}

    def write(self, shape: tuple[int, int], rng: np.random.Generator, std: float) -> Written:
        """A random module."""
        out, inputs = shape
        size = inputs if self.group_size == -1 else self.group_size
        groups, largest = -(-inputs // size), 2**self.bits - 1
        q = rng.integers(0, largest + 1, shape)
        if self.bits == 8 and self.symmetric:
            q = np.maximum(q, 1)
        zeros = np.full((groups, out), 2 ** (self.bits - 1))
        if not self.symmetric:
            zeros = rng.integers(0, largest + 1, (groups, out))
        scales = random_scales(rng, (groups, out), std / 2 ** (self.bits - 1)).to(torch.float16)
        index = rng.permutation(inputs) // size if self.act_order else np.arange(inputs) // size
        weight = (q - zeros[index].T).astype(np.float32) * scales.numpy().astype(np.float32)[index].T
        stored = (zeros - (1 if self.version == 1 else 0)) % (largest + 1)
        return {
            "qweight": words(q, self.bits).T.contiguous(),
            "qzeros": words(stored, self.bits),
            "scales": scales,
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }, weight


@dataclass(frozen=True)
class Awq:
    """AutoAWQ's GEMM layout: words along the outputs, eight numbers of each in the order 0 2 4 6 1 3 5 7."""

    group_size: int = 32
    symmetric: bool = False

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        found = {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": True}
        return found | {"version": "gemm", "modules_to_not_convert": None}

    def write(self, shape: tuple[int, int], rng: np.random.Generator, std: float) -> Written:
        """A random module."""
        out, inputs = shape
        groups = -(-inputs // self.group_size)
        q = rng.integers(0, 16, shape)
        zeros = np.full((groups, out), 8) if self.symmetric else rng.integers(0, 16, (groups, out))
        scales = random_scales(rng, (groups, out), std / 8).to(torch.float16)
        index = np.arange(inputs) // self.group_size
        weight = (q - zeros[index].T).astype(np.float32) * scales.numpy().astype(np.float32)[index].T
        return {"qweight": self.pack(q.T), "qzeros": self.pack(zeros), "scales": scales}, weight

    @staticmethod
    def pack(numbers: Any) -> torch.Tensor:
        """`numbers [n, out]` -> int32 `[n, out / 8]`."""
        packed = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
        for column in range(packed.shape[1]):
            for i, nth in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, column] |= numbers[:, 8 * column + nth].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(packed.view(np.int32))


@dataclass(frozen=True)
class Compressed:
    """compressed-tensors: packed, or one number an element."""

    format: str = "pack-quantized"
    bits: int = 4
    strategy: str = "group"
    group_size: int | None = 32
    symmetric: bool = True
    kind: str = "int"
    activations: dict[str, Any] | None = None
    block: tuple[int, int] | None = None
    ignore: tuple[str, ...] = ("lm_head",)
    scale_dtype: torch.dtype = torch.bfloat16

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        weights = {"num_bits": self.bits, "type": self.kind, "symmetric": self.symmetric, "strategy": self.strategy}
        weights |= {"group_size": self.group_size, "block_structure": self.block and list(self.block)}
        weights |= {"dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": self.activations}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "config_groups": {"group_0": group | {"output_activations": None}},
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "global_compression_ratio": 1.5,
        }

    def write(self, shape: tuple[int, int], rng: np.random.Generator, std: float) -> Written:
        """A random module."""
        out, inputs = shape
        rows, size = {
            "tensor": (out, inputs),
            "channel": (1, inputs),
            "group": (1, self.group_size),
            "block": self.block,
        }[self.strategy] or (1, 1)
        grid = -(-out // rows), -(-inputs // (size or 1))
        half = 2 ** (self.bits - 1)
        scales = random_scales(rng, grid, std / (half if self.kind == "int" else 300)).to(self.scale_dtype)
        at = np.arange(out)[:, None] // rows, np.arange(inputs) // (size or 1)
        spread = scales.to(torch.float32).numpy()[at]
        parts: Parts = {"weight_scale": scales if self.strategy != "tensor" else scales.reshape(1)}
        if self.kind == "float":
            numbers = torch.from_numpy(rng.normal(0, 100, shape).clip(-448, 448)).to(torch.float8_e4m3fn)
            return parts | {"weight": numbers}, numbers.to(torch.float32).numpy() * spread
        q = rng.integers(-half, half, shape) if self.bits < 8 else rng.integers(-127, 128, shape)
        zeros = np.zeros(grid, np.int64) if self.symmetric else rng.integers(-half, half, grid)
        weight = (q - zeros[at]).astype(np.float32) * spread
        packs = self.format == "pack-quantized"
        if not self.symmetric:
            packed = words((zeros + half).T, self.bits).T.contiguous() if packs else torch.from_numpy(zeros)
            parts["weight_zero_point"] = packed if packs else packed.to(torch.int8)
        if packs:
            parts |= {"weight_packed": words(q + half, self.bits), "weight_shape": torch.tensor(shape)}
        else:
            parts["weight"] = torch.from_numpy(q.astype(np.int8))
        return parts, weight


@dataclass(frozen=True)
class Fp8:
    """Of DeepSeek and Qwen (blocks, `weight_scale_inv`), of FBGEMM (rows) and of AutoFP8 (one scale)."""

    method: str = "fp8"
    block: tuple[int, int] | None = (32, 32)
    static: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        found: dict[str, Any] = {"quant_method": self.method, "modules_to_not_convert": ["lm_head"]}
        if self.method == "fp8":
            found |= {
                "activation_scheme": "static" if self.static else "dynamic",
                "weight_block_size": self.block and list(self.block),
            }
        if self.method == "modelopt":
            found = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
        return found | self.settings

    def write(self, shape: tuple[int, int], rng: np.random.Generator, std: float) -> Written:
        """A random module."""
        strategy = "block" if self.block else "channel" if self.method == "fbgemm_fp8" else "tensor"
        one = Compressed("float-quantized", 8, strategy, None, kind="float", block=self.block)
        parts, weight = Compressed(**{**one.__dict__, "scale_dtype": torch.float32}).write(shape, rng, std)
        if self.block:
            parts["weight_scale_inv"] = parts.pop("weight_scale")
        if self.static or self.method == "modelopt":
            parts["input_scale"] = torch.tensor(0.02)
        return parts, weight


Format = Gptq | Awq | Compressed | Fp8
TOKEN_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TOKEN_FP8 = TOKEN_INT8 | {"type": "float"}
STATIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> torch.Tensor:
    """Positive scales about `size`."""
    return torch.from_numpy((size * rng.uniform(0.5, 1.5, shape)).astype(np.float32))


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tool would quantise it."""
    is_table = any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
    return tensor.ndim == 2 and name.endswith(".weight") and not is_table


def make_quantized(
    family: str, format: Format, root: Path, change: Callable[[dict[str, Any], Parts], None] | None = None
) -> tuple[Path, Path]:
    """A tiny checkpoint of a family whose linear layers are quantised, and the same with those weights in float32.

    Args:
        change: may change config and tensors of the quantised one before they are written.
    """
    plain, quantized = make_tiny(family, root / "plain"), root / "quantized"
    tensors = load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    rng, packed = np.random.default_rng(3), dict(tensors)
    for name, tensor in tensors.items():
        if not is_linear(name, tensor):
            continue
        turned = family == "gpt2"
        shape = tuple(tensor.shape[::-1] if turned else tensor.shape)
        parts, weight = format.write((shape[0], shape[1]), rng, float(tensor.std()))
        del packed[name]
        packed |= {name.removesuffix("weight") + part: values for part, values in parts.items()}
        tensors[name] = torch.from_numpy(np.ascontiguousarray(weight.T if turned else weight))
    shutil.copytree(plain, quantized)
    config["quantization_config"] = format.config()
    if change is not None:
        change(config, packed)
    (quantized / "config.json").write_text(json.dumps(config))
    save_file({name: one.contiguous() for name, one in packed.items()}, quantized / "model.safetensors")
    save_file(tensors, plain / "model.safetensors")
    return quantized, plain
