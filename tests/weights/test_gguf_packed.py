"""Blocks that stay blocks: they hold what the `gguf` package's dequantiser gives, and compute with that."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from quire.errors import ModelFileError
from quire.models.parameters import Concatenated
from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import HALF_SCALES, QuantizedWeight
from quire.outputs import Decision
from quire.quant.select import select_scheme
from quire.weights.formats.gguf import GgufWeights
from quire.weights.formats.gguf_blocks import TYPES
from quire.weights.formats.gguf_packed import GgufBlocks
from quire.weights.load import load_model
from quire.weights.source import Target
from tests.models.paged import PagedModel
from tests.tiny.checkpoints import make_tiny
from tests.tiny.gguf_files import close, write_gguf
from tests.weights.test_gguf_blocks import blocks

NUMBERS = {kind.name: number for number, kind in TYPES.items()}
HELD = [number for number, kind in TYPES.items() if kind.quant is not None]
WIDE = 512


class WithoutBlocks(ReferenceOps):
    """What a device has that lacks the formats of blocks."""

    formats = tuple(name for name in ReferenceOps.formats if name not in HALF_SCALES)


def rows_of(kind: str, rows: int, seed: int = 0) -> tuple[Any, Any]:
    """Random rows of a type, as bytes and as the package's values of them."""
    number = NUMBERS[kind]
    raw = blocks(number, rows, WIDE // TYPES[number].values, [1.0, -0.5, 0.01, 6e-8], seed)
    if kind == "MXFP4":
        raw.reshape(-1, 17)[:, 0] = np.random.default_rng(seed).integers(110, 130, raw.size // 17)
    if kind == "F32":
        raw = np.random.default_rng(seed).standard_normal((rows, WIDE)).astype(np.float32)
        return raw, raw
    return raw, dequantize(raw, gguf.GGMLQuantizationType(number))


@contextmanager
def source_of(
    path: Path, kinds: dict[str, Any], heads: dict[str, int] | None = None, unpack: str | None = None
) -> Iterator[GgufBlocks]:
    """A file of matrices `blk.0.NAME.weight`: by the name, the type's name and the bytes."""
    writer = gguf.GGUFWriter(path / "x.gguf", "llama")
    for name, (kind, raw) in kinds.items():
        writer.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    with GgufWeights(close(writer), heads or {}) as weights:
        yield GgufBlocks(weights, Target("bfloat16", ReferenceOps.formats, unpack))


def array_of(**rows: int) -> Concatenated:
    return Concatenated(tuple((f"blk.0.{name}.weight", (count, WIDE)) for name, count in rows.items()))


def restored(weight: Any) -> Any:
    """`values * scales + minima` in float32, the product rounded and then the sum."""
    product, minima = terms_of(weight)
    return product + minima


def terms_of(weight: Any) -> tuple[Any, Any]:
    assert isinstance(weight, QuantizedWeight)
    scales, minima = (
        np.float32(0) if one is None else np.repeat(one, weight.group_size, axis=1).astype(np.float32)
        for one in (weight.scales, weight.minima)
    )
    return weight.values.astype(np.float32) * scales, minima


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("number", HELD, ids=lambda number: TYPES[number].name)
def test_a_type_is_held_exactly_and_multiplied_as_it_is(number: int, rotated: bool, tmp_path: Path) -> None:
    kind = TYPES[number].name
    raw, expected = rows_of(kind, 24)
    if rotated:
        expected = expected.reshape(3, 4, 2, WIDE).swapaxes(1, 2).reshape(24, WIDE)
    with source_of(tmp_path, {"attn_q": (kind, raw)}, {"attn_q": 3} if rotated else None) as source:
        weight: Any = source.matrix(array_of(attn_q=24))
    stated = TYPES[number].quant
    assert stated is not None and (weight.format, weight.group_size) == (stated.format, stated.group_size)
    assert (weight.scales.dtype == np.float16) == stated.half_scales
    assert np.array_equal(restored(weight), expected)
    ops = CpuOps(2, instruction_sets()[-1])
    packed = ops.pack_embedding(weight, "bfloat16")
    assert np.array_equal(ops.embed(np.arange(24, dtype=np.int32), packed), expected)
    x = np.random.default_rng(1).standard_normal((7, WIDE)).astype(np.float32)
    inverse = np.float32(32639) / np.abs(x).max(axis=1, keepdims=True)
    q = np.rint(x * inverse).astype(np.float64)  # what activations are rounded to, and nothing else is
    step = np.abs(x).max(axis=1, keepdims=True) / np.float32(32639)
    exact = q @ expected.T.astype(np.float64) * step
    magnitudes = np.abs(q) @ sum(np.abs(term) for term in terms_of(weight)).T * step
    assert (np.abs(ops.linear(x, packed) - exact) <= 2.0**-21 * magnitudes + 1e-30).all()


@pytest.mark.parametrize(
    ("kinds", "format", "size", "halves"),
    [
        (["Q4_1", "Q4_1"], "int4_min", 32, True),
        (["Q4_0", "Q4_1"], "int4_min", 32, False),
        (["Q4_K", "Q6_K"], "int8_min", 16, False),
        (["Q4_0", "Q8_0"], "int8_groups", 32, False),
        (["Q8_0", "Q5_0"], "int8_groups", 32, True),
        (["Q8_0", "Q6_K"], "int8_groups", 16, False),
        (["Q3_K", "Q2_K"], "int4_min", 16, False),
        (["Q3_K", "Q5_1"], "int8_min", 16, False),
    ],
)
def test_matrices_of_two_types_become_one_exactly(
    kinds: list[str], format: str, size: int, halves: bool, tmp_path: Path
) -> None:
    names = ("attn_q", "attn_v")
    parts = {name: (kind, *rows_of(kind, 8, seed)) for seed, (name, kind) in enumerate(zip(names, kinds, strict=True))}
    with source_of(tmp_path, {name: part[:2] for name, part in parts.items()}) as source:
        weight: Any = source.matrix(array_of(attn_q=8, attn_v=8))
        (said,) = source.decisions()
    assert (weight.format, weight.group_size) == (format, size) and (weight.scales.dtype == np.float16) == halves
    assert np.array_equal(restored(weight), np.concatenate([part[2] for part in parts.values()]))
    assert f"{'+'.join(sorted(set(kinds)))} as {format} in groups of {size}" in said.reason


def test_what_is_not_all_blocks_or_is_to_be_unpacked_is_float(tmp_path: Path) -> None:
    raw, values = rows_of("Q4_1", 8)
    other, _ = rows_of("F32", 8, 1)
    files = {"attn_q": ("Q4_1", raw), "attn_v": ("F32", other)}
    with source_of(tmp_path, files) as source:
        assert np.array_equal(np.asarray(source.matrix(array_of(attn_q=8, attn_v=8))), np.concatenate([values, other]))
        assert "unpacked to bfloat16" in source.decisions()[0].reason
    with source_of(tmp_path, files, unpack="dtype is float32") as source:
        assert np.array_equal(np.asarray(source.matrix(array_of(attn_q=8))), values)
        assert source.decisions() == [
            Decision("blocks", "unpacked", "unpacked to bfloat16 (dtype is float32): 1 of Q4_1")
        ]


def mixed(name: str, shape: tuple[int, ...]) -> str:
    """As llama.cpp mixes: values and what goes down finer than the rest, the table finest."""
    if len(shape) == 1:
        return "F32"
    return "Q8_0" if "token_embd" in name else "Q5_1" if "attn_v" in name or "ffn_down" in name else "Q4_1"


def logits(path: Path, ops: Any, dtype: str, chunks: list[int], **options: Any) -> tuple[Any, Any, list[Decision]]:
    said: list[Decision] = []
    model = load_model(path, ops, dtype, 64, report=said.extend, **options)
    tokens = np.random.default_rng(2).integers(0, 320, 40).tolist()
    return model, PagedModel(model, ops, num_blocks=8, block_size=16).all_logits(tokens, chunks), said


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    return write_gguf(make_tiny("llama", root / "tiny"), root / "x.gguf", "llama", mixed)


def test_a_model_of_blocks_computes_what_its_values_do(file: Path) -> None:
    ops = CpuOps(2, instruction_sets()[-1])
    _, exact, _ = logits(file, ops, "float32", [40])
    _, found, said = logits(file, ops, "auto", [40])
    _, unpacked, _ = logits(file, WithoutBlocks(np), "bfloat16", [40])
    assert np.abs(found - exact).max() < 8e-3 * np.ptp(exact)  # the cache is bfloat16
    assert 0 < np.abs(found - exact).mean() < np.abs(unpacked - exact).mean()
    assert np.array_equal(logits(file, CpuOps(1, instruction_sets()[-1]), "auto", [7, 1, 32])[1], found)
    words = " ".join(decision.reason for decision in said if decision.name == "blocks")
    for kind in ("Q4_1 as int4_min in groups of 32, 5 bits", "Q4_1+Q5_1 as int8_min", "Q8_0 as int8_groups"):
        assert kind in words


def test_memory_is_that_of_the_blocks_and_foreseen(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quire.cli.main import main

    ops = CpuOps(2, instruction_sets()[-1])
    model, _, _ = logits(file, ops, "auto", [40])
    half, _, said = logits(file, WithoutBlocks(np), "bfloat16", [40])
    assert model.weight_bytes < 0.5 * half.weight_bytes
    assert "the device has no format for them" in next(one for one in said if one.name == "blocks").reason
    assert main(["plan", str(file), "--context", "64", "--device", "a100-40"]) == 0
    assert f"{model.weight_bytes / 1e9:,.3f} GB" in capsys.readouterr().out


def test_another_quantisation_is_made_of_the_values(file: Path) -> None:
    ops = CpuOps(1, instruction_sets()[-1])
    _, _, said = logits(file, ops, "auto", [40], scheme=select_scheme("int8", 32))
    assert "unpacked to bfloat16 (quantization int8)" in next(one for one in said if one.name == "blocks").reason


def test_factors_that_are_no_numbers_are_refused_by_the_tensor(file: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(file)
    tensor = next(one for one in reader.tensors if one.name == "blk.1.ffn_up.weight")
    data = bytearray(file.read_bytes())
    data[tensor.data_offset + 40 : tensor.data_offset + 42] = np.float16(np.nan).tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.weight.* not finite"):
        load_model(broken, CpuOps(1, instruction_sets()[-1]))
