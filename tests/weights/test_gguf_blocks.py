"""Unpacked blocks, against the dequantiser of the `gguf` package: the same bits."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from quire.errors import ModelFileError
from quire.models.parameters import Concatenated
from quire.weights.formats import gguf as source
from quire.weights.formats.gguf import GgufWeights
from quire.weights.formats.gguf_blocks import OTHERS, TYPES, unpack
from tests.tiny.gguf_files import close

FACTORS = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108]}
FACTORS |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0]}
"""Where a block has its float16 factors."""


def blocks(number: int, rows: int, row_blocks: int, factors: list[float] | None = None, seed: int = 0) -> Any:
    """Random bytes; with factors, float16 ones drawn from these."""
    kind, rng = TYPES[number], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * row_blocks, kind.bytes), dtype=np.uint8)
    for at in FACTORS.get(kind.name, []) if factors else []:
        raw[:, at : at + 2] = rng.choice(np.array(factors, np.float16), len(raw)).view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape
    numbers = ~np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), ~numbers)
    assert np.array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


def test_all_types_that_were_asked_for_are_there_with_their_sizes() -> None:
    names = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
    assert {kind.name for kind in TYPES.values()} == set(names)
    for number, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name, gguf.GGML_QUANT_SIZES[theirs]) == (kind.name, (kind.values, kind.bytes))
    assert {number: kind.name for number, kind in TYPES.items()} | OTHERS == {
        int(kind): kind.name for kind in gguf.GGMLQuantizationType
    }


@pytest.mark.parametrize("number", TYPES)
@pytest.mark.parametrize(
    "factors",
    [None, [1.0, -1.0, 0.01], [0.0, -0.0], [65504.0, -65504.0], [6e-8, -6e-8, 1e-5], [np.inf, -np.inf, np.nan, 1.0]],
    ids=["any bytes", "ordinary", "zero", "largest", "subnormal", "no numbers"],
)
def test_blocks_are_unpacked_to_the_bits_of_the_gguf_package(number: int, factors: list[float] | None) -> None:
    kind = TYPES[number]
    raw = blocks(number, 24, 3 * max(1, 256 // kind.values), factors)
    with np.errstate(all="ignore"):
        theirs = dequantize(raw, gguf.GGMLQuantizationType(number))
    assert_same_bits(unpack(kind, raw), theirs)


@pytest.mark.parametrize("number", TYPES)
@pytest.mark.parametrize("rotated", [False, True])
def test_a_tensor_is_read_in_pieces_and_its_heads_put_in_order(
    number: int, rotated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces are; a matrix of two tensors of different types too."""
    kind = TYPES[number]
    wide = max(256, kind.values)
    raw = blocks(number, 24, wide // kind.values, [1.0, -0.5, 0.01])
    other = np.random.default_rng(1).standard_normal((6, wide)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    type_ = gguf.GGMLQuantizationType(number)
    writer.add_tensor("blk.0.attn_q.weight", raw.view(np.float32) if kind.name == "F32" else raw, raw_dtype=type_)
    writer.add_tensor("blk.0.attn_v.weight", other)
    file = close(writer)
    with np.errstate(all="ignore"):
        expected = dequantize(raw, type_)
    if rotated:
        expected = expected.reshape(3, 4, 2, wide).swapaxes(1, 2).reshape(24, wide)
    array = Concatenated((("blk.0.attn_q.weight", (24, wide)), ("blk.0.attn_v.weight", (6, wide))))
    for chunk in (1, 5 * wide, 2**18):
        monkeypatch.setattr(source, "CHUNK_VALUES", chunk)
        with GgufWeights(file, {"attn_q": 3} if rotated else {}) as weights:
            assert_same_bits(weights.read(array), np.concatenate([expected, other]))
            assert_same_bits(np.asarray(weights.matrix(array)).astype(np.float32), np.concatenate([expected, other]))


def test_biases_of_rotated_heads_are_put_in_order(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.attn_k.bias", np.arange(16, dtype=np.float32))
    writer.add_tensor("blk.0.attn_v.bias", np.arange(3, dtype=np.float32))
    with GgufWeights(close(writer), {"attn_k": 2}) as weights:
        read = weights.vector(Concatenated((("blk.0.attn_k.bias", (16,)), ("blk.0.attn_v.bias", (3,)))))
    assert read.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 0, 1, 2]


def test_rows_that_are_no_heads_and_files_that_shrink_are_errors(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((9, 4), np.float32))
    file = close(writer)
    array = Concatenated((("blk.0.attn_q.weight", (9, 4)),))
    with GgufWeights(file, {"attn_q": 3}) as weights, pytest.raises(ModelFileError, match=r"9 rows.*those of 3 heads"):
        weights.read(array)
    with GgufWeights(file, {}) as weights:
        data = file.read_bytes()
        file.write_bytes(data[:-40])
        with pytest.raises(ModelFileError, match=r"x\.gguf: truncated while blk\.0\.attn_q\.weight was read"):
            weights.read(array)
