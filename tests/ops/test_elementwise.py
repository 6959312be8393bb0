import numpy as np
import pytest
import torch

from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.types import Activation
from tests.ops.cases import normal, relative_error

REFERENCE = ReferenceOps(np)
TORCH = ReferenceOps(torch)
KINDS: list[Activation] = ["silu", "gelu", "gelu_tanh", "relu"]
EDGES = [0.0, -0.0, 1e-30, -1e-8, 0.5, -0.7, 12.0, -12.0, 88.9, -88.9, 104.0, -104.0, 3e4, -3e4]


@pytest.mark.parametrize("size", [1, 7, 16, 100, 576, 1003])
def test_norms_equal_the_reference(cpu: CpuOps, size: int) -> None:
    rng = np.random.default_rng(size)
    weight, bias = normal(rng, size), normal(rng, size)
    for rows in (0, 1, 40):
        x = normal(rng, rows, 2 * size + 3)[:, 2 : 2 + size]
        assert relative_error(cpu.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)) < 2e-6
        for b in (bias, None):
            actual, expected = (ops.layer_norm(x, weight, b, 1e-5) for ops in (cpu, REFERENCE))
            assert relative_error(actual, expected) < 4e-6
        residual = normal(rng, rows, size)
        residuals = residual.copy(), residual.copy()
        actual, expected = (
            ops.add_rms_norm(x, r, weight, 1e-6) for ops, r in zip((cpu, REFERENCE), residuals, strict=True)
        )
        assert relative_error(actual, expected) < 2e-6
        assert np.array_equal(*residuals)
        if rows:
            assert np.array_equal(cpu.rms_norm(x[3:4], weight, 1e-5), cpu.rms_norm(x, weight, 1e-5)[3:4])


def test_norms_of_heads(cpu: CpuOps) -> None:
    x, weight = normal(np.random.default_rng(0), 5, 3, 16), np.ones(16, np.float32)
    assert relative_error(cpu.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6)) < 2e-6
    assert relative_error(cpu.layer_norm(x, weight, None, 1e-6), REFERENCE.layer_norm(x, weight, None, 1e-6)) < 4e-6


@pytest.mark.parametrize("kind", KINDS)
def test_activations_equal_the_reference(cpu: CpuOps, kind: Activation) -> None:
    rng = np.random.default_rng(7)
    for size in (1, 5, 64, 1003):
        x = np.concatenate(
            [np.tile(np.float32(EDGES), 2 * size // 14 + 1)[None, : 2 * size], 5 * normal(rng, 6, 2 * size)]
        )
        with np.errstate(over="ignore"):
            expected, product = REFERENCE.activation(x, kind), REFERENCE.activation_multiply(x, kind)
        tolerance = 1e-6 + 5e-6 * np.abs(expected)
        assert (np.abs(cpu.activation(x, kind) - expected) <= tolerance).all()
        up = np.abs(x[:, size:])
        assert (np.abs(cpu.activation_multiply(x, kind) - product) <= tolerance[:, :size] * up + 1e-30).all()


@pytest.mark.parametrize("kind", KINDS)
def test_activations_pass_on_nan(cpu: CpuOps, kind: Activation) -> None:
    x = np.zeros((1, 40), np.float32)
    x[0, ::3] = np.nan
    assert np.array_equal(np.isnan(cpu.activation(x, kind)), np.isnan(x))


def test_the_reference_is_the_same_on_torch_and_is_torchs() -> None:
    rng = np.random.default_rng(9)
    x, weight, bias = normal(rng, 6, 48), normal(rng, 48), normal(rng, 48)
    tensors = [torch.tensor(a) for a in (x, weight, bias)]
    functional = torch.nn.functional
    pairs = [
        (REFERENCE.rms_norm(x, weight, 1e-5), TORCH.rms_norm(*tensors[:2], 1e-5)),
        (REFERENCE.rms_norm(x, weight, 1e-5), functional.rms_norm(tensors[0], (48,), tensors[1], 1e-5)),
        (REFERENCE.layer_norm(x, weight, bias, 1e-5), TORCH.layer_norm(*tensors, 1e-5)),
        (REFERENCE.layer_norm(x, weight, bias, 1e-5), functional.layer_norm(tensors[0], (48,), *tensors[1:], 1e-5)),
        (REFERENCE.activation(x, "silu"), functional.silu(tensors[0])),
        (REFERENCE.activation(x, "gelu"), functional.gelu(tensors[0])),
        (REFERENCE.activation(x, "gelu_tanh"), functional.gelu(tensors[0], approximate="tanh")),
        (REFERENCE.activation(x, "relu"), functional.relu(tensors[0])),
    ]
    for kind in KINDS:
        pairs.append((REFERENCE.activation_multiply(x, kind), TORCH.activation_multiply(tensors[0], kind)))
    for storage in ("bfloat16", "float16", "float32"):
        packed = TORCH.pack_linear(x, None, storage)
        pairs.append((REFERENCE.linear(x, REFERENCE.pack_linear(x, None, storage)), TORCH.linear(tensors[0], packed)))
        assert torch.equal(packed.weight, tensors[0].to(getattr(torch, storage)).float())
    for actual, expected in pairs:
        assert relative_error(actual, expected.numpy()) < 2e-6
