"""No kernel is cut by the number of rows: what decides the order of sums is the same for one row and for thousands."""

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from quire.ops.cuda import attention, gemm, rows, sampling
from quire.ops.cuda.gemm import packed_linear
from quire.ops.cuda.tiles import GemmShape, default_tiles, keeps_sums, picked, tiles_for
from quire.ops.types import BLOCK_FORMATS, FORMATS, AttentionBatch, AttentionSpec, SampleBatch

COUNTS = (1, 2, 3, 15, 16, 17, 33, 64, 65, 128, 129, 257, 1000)
KINDS = [kind for kind in FORMATS if kind not in BLOCK_FORMATS]
META = torch.device("meta")
LAUNCHED = {
    attention: ("store_kernel", "attention_kernel", "merge_kernel"),
    gemm: ("linear_kernel", "quantize_rows_kernel"),
    rows: ("embed_kernel", "norm_kernel", "activation_kernel"),
    sampling: ("sample_kernel", "logprobs_kernel"),
}


class Kernel:
    """Notes what it would be compiled for."""

    def __init__(self, name: str, seen: dict[str, set[Any]]) -> None:
        self._name, self._seen = name, seen

    def __getitem__(self, grid: Any) -> Any:
        def launch(*_: Any, **options: Any) -> None:
            name = f"{self._name}, split" if options.get("SPLIT") else self._name
            self._seen[name].add(tuple(sorted(options.items())))

        return launch


def empty(dtype: torch.dtype, *shape: int) -> Any:
    return torch.empty(shape, dtype=dtype, device=META)


def all_but_gemms(count: int) -> None:
    """A step of `count` rows: prompts of 1 to 3 tokens, or single tokens."""
    cache, tables = empty(torch.bfloat16, 1, 2, 64, 2, 16, 64), empty(torch.int32, count, 40)
    for tokens in (count, 3 * count):
        q, k, v = (empty(torch.bfloat16, tokens, heads, 64) for heads in (8, 2, 2))
        batch = AttentionBatch(*(empty(torch.int32, n) for n in (tokens, count + 1, count)), tables)
        attention.attention(q, k, v, cache, 0, batch, AttentionSpec(0.1), None)
    x, residual, vector = empty(torch.bfloat16, count, 768), empty(torch.float32, count, 768), empty(torch.float32, 768)
    rows.embed(residual, None, empty(torch.int32, count), 1.0)
    rows.norm(x, residual, vector, None, 1e-5, False, torch.bfloat16)
    rows.norm(x, None, vector, vector, 1e-5, True, torch.bfloat16)
    rows.activation(x, "silu", multiply=True)
    gemm.quantize_activations(x, "fp8")
    logits, floats = empty(torch.float32, count, 5000), empty(torch.float32, count)
    integers, wide = empty(torch.int32, count), empty(torch.int64, count)
    sampling.sample(logits, SampleBatch(floats, integers, floats, floats, wide, wide))
    sampling.logprobs(logits, integers, 20)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = defaultdict(set)
    for module, names in LAUNCHED.items():
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name, found))
    return found


def test_one_kernel_for_all_numbers_of_rows(seen: dict[str, set[Any]]) -> None:
    for count in COUNTS:
        all_but_gemms(count)
    assert seen.keys() == {name for names in LAUNCHED.values() for name in names} - {"linear_kernel"} | {
        "attention_kernel, split"
    }
    variants = {name: len(found) for name, found in seen.items()}
    assert variants == {name: 2 if name == "norm_kernel" else 1 for name in seen}, "two kinds of norms were asked for"


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_gemms_differ_in_what_lies_side_by_side_alone(kind: Any, seen: dict[str, set[Any]]) -> None:
    inputs = 4096
    if kind.startswith("int4"):
        packed = packed_linear(
            empty(torch.uint8, 512, inputs // 2), empty(torch.float32, inputs // 64, 512), None, kind, 64, inputs,
            torch.bfloat16,
        )  # fmt: skip
    elif kind == "plain":
        packed = packed_linear(empty(torch.bfloat16, 512, inputs), None, None, kind, 0, inputs, torch.bfloat16)
    else:
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        packed = packed_linear(
            empty(dtype, 512, inputs), empty(torch.float32, 512, 1), None, kind, inputs, inputs, torch.bfloat16
        )
    for count in COUNTS:
        gemm.linear(empty(torch.bfloat16, count, inputs), packed, torch.bfloat16)
    free = {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
    if kind != "fp8" and not kind.startswith("int4"):
        free |= {"BLOCK_K"}  # pieces of one chain of sums, whatever their length: it is not broken between them
    fixed = {tuple(item for item in options if item[0] not in free) for options in seen["linear_kernel"]}
    assert len(fixed) == 1 and 1 < len(seen["linear_kernel"]) <= 3


def test_every_pick_keeps_the_sums() -> None:
    """Those of the rule, for all numbers of rows; and of a table only such as do."""
    sizes = (1, 64, 96, 704, 4096, 11008, 128256)
    for kind, outputs, inputs in itertools.product(("16 bits", "float32", *KINDS), sizes, sizes):
        groups = (32, 64, 128) if kind.startswith("int4") else (inputs,)
        for shape in (GemmShape(kind, group, outputs, inputs) for group in groups):
            picks = tiles_for("a device that no table has", shape)
            assert picks == default_tiles(shape) and all(keeps_sums(shape, tiles) for tiles in picks)
            depths = {picked(picks, count).depth for count in COUNTS}
            assert len(depths) == 1 or kind in ("16 bits", "int8", "int8_w8a8")
    assert not keeps_sums(GemmShape("fp8", 0, 64, 64), tiles_for("", GemmShape("16 bits", 0, 64, 64))[-1])
    assert np.all([keeps_sums(GemmShape("int4", 32, 64, 64), one) for one in default_tiles(
        GemmShape("int4", 32, 64, 64))])  # fmt: skip
