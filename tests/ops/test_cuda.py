"""The CUDA provider: on a device where there is one, else under Triton's interpreter (whose bfloat16 dot is wrong)."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from quire.ops.reference import ReferenceOps
from quire.ops.types import (
    BLOCK_FORMATS,
    AttentionSpec,
    PenaltyBatch,
    QuantizedFormat,
    QuantSpec,
    RopeTables,
    SampleBatch,
)
from tests.ops.cases import Heads, Rows, assert_bytes_tell_blocks_apart, normal, relative_error
from tests.ops.test_quantized import KINDS, random_weight

pytest.importorskip("triton")

from quire.ops.cuda import gemm, provider
from quire.ops.cuda.provider import CudaOps

ON_DEVICE = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of masked lanes
REFERENCE = ReferenceOps(np)
CUDA = CudaOps("cuda" if ON_DEVICE else "cpu")
STORAGES = ["bfloat16", "float16", "float32"] if ON_DEVICE else ["float16", "float32"]
TOLERANCE = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 1e-5}
SINKS = np.linspace(-1.0, 3.0, 9).astype(np.float32)


def on_device(*arrays: Any) -> list[Any]:
    return [CUDA.array(array, "float32") for array in arrays]


def numpy(x: Any) -> Any:
    return CUDA.to_numpy(x.to(torch.float32))


@pytest.mark.parametrize("heads", [Heads(4, 2, 8), Heads(6, 2, 40), Heads(9, 3, 64)], ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "window-softcap-sinks"])
def test_attention_equals_the_reference(heads: Heads, plain: bool) -> None:
    lengths = [40, 525, 1, 0, 33]
    pieces = [
        [(0, 0, 39), (1, 0, 20), (4, 0, 3)],
        [(2, 0, 1), (3, 0, 0), (0, 39, 40), (4, 3, 33)],
        [(4, 32, 33), (0, 39, 40)],
    ]
    for storage in STORAGES:
        specs = {ops: AttentionSpec(0.2) for ops in (CUDA, REFERENCE)}
        if not plain:
            sinks = SINKS[: heads.heads]
            specs = {
                CUDA: AttentionSpec(0.2, 20, 5.0, *on_device(sinks)),
                REFERENCE: AttentionSpec(0.2, 20, 5.0, sinks),
            }
        actual, expected = (Rows(ops, lengths, heads, 16, storage) for ops in (CUDA, REFERENCE))
        for piece in pieces:
            a, b = (np.concatenate(rows.step(piece, specs[rows.ops])) for rows in (actual, expected))
            assert relative_error(a, b) < TOLERANCE[storage], (storage, piece)


def test_a_context_of_several_segments() -> None:
    heads, spec = Heads(2, 1, 16), AttentionSpec(0.25)
    actual, expected = (Rows(ops, [1300, 700], heads, 64, "float32") for ops in (CUDA, REFERENCE))
    parts = [(0, 0, 1290), (1, 0, 690)]
    if not ON_DEVICE:  # the interpreter would take minutes for the prompts: the cache is filled by a narrow window
        for rows in (actual, expected):
            rows.step(parts, AttentionSpec(0.25, window=1))
    for piece in ([(0, 1290, 1291), (1, 690, 691)], [(0, 1291, 1300), (1, 691, 695)]):
        a, b = (np.concatenate(rows.step(piece, spec)) for rows in (actual, expected))
        assert relative_error(a, b) < 1e-5
    alone = actual.step([(0, 1299, 1300)], spec)[0]
    if ON_DEVICE:
        assert np.array_equal(alone, actual.step([(0, 1280, 1300)], spec)[0][-1:])


def test_a_single_query_has_the_same_bits_beside_prompts() -> None:
    """It is one program for each segment in any company."""
    heads, spec = Heads(2, 1, 16), AttentionSpec(0.25)
    for storage in STORAGES if ON_DEVICE else STORAGES[-1:]:
        rows = Rows(CUDA, [260, 12, 9], heads, 16, storage)
        rows.step([(0, 0, 259), (1, 0, 8), (2, 0, 8)], AttentionSpec(0.25, window=1))
        alone = rows.step([(0, 259, 260)], spec)[0]
        singles = rows.step([(0, 259, 260), (2, 8, 9)], spec)
        mixed = rows.step([(2, 8, 9), (1, 8, 12), (0, 259, 260)], spec)
        assert np.array_equal(alone, singles[0]) and np.array_equal(alone, mixed[2])
        assert np.array_equal(singles[1], mixed[0])


def test_rope_inside_attention() -> None:
    rng = np.random.default_rng(0)
    heads, angles = Heads(4, 2, 16), normal(rng, 64, 6)
    cos, sin = np.cos(angles), np.sin(angles)
    results = []
    for ops, tables in ((CUDA, RopeTables(*on_device(cos, sin))), (REFERENCE, RopeTables(cos, sin))):
        rows = Rows(ops, [20, 7], heads, 16, "float32")
        pieces = ([(0, 0, 19), (1, 0, 6)], [(0, 19, 20), (1, 6, 7)])
        results.append(
            np.concatenate([part for piece in pieces for part in rows.step(piece, AttentionSpec(0.25), rope=tables)])
        )
    assert relative_error(*results) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (64, 96), (33, 130)])
def test_gemms_of_floats(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weight, bias, x = normal(rng, *shape), normal(rng, shape[0]), normal(rng, 40, shape[1])
    for storage in STORAGES:
        packed, expected = CUDA.pack_linear(weight, bias, storage), REFERENCE.pack_linear(weight, bias, storage)
        for rows in (0, 1, 40):
            got = numpy(CUDA.linear(*on_device(x[:rows]), packed))
            assert relative_error(got, REFERENCE.linear(x[:rows], expected)) < TOLERANCE[storage]
        logits = numpy(CUDA.logits(*on_device(x), packed, 0.5, 30.0))
        assert relative_error(logits, REFERENCE.logits(x, expected, 0.5, 30.0)) < TOLERANCE[storage]
        ids = rng.integers(0, shape[0], 9).astype(np.int32)
        assert np.array_equal(
            numpy(CUDA.embed(CUDA.array(ids, "int32"), packed, 1.5)), REFERENCE.embed(ids, expected, 1.5)
        )


@pytest.mark.skipif(not ON_DEVICE, reason="the interpreter multiplies with numpy, whose sums depend on the rows")
@pytest.mark.parametrize("kind", ["plain", *CUDA.formats])
def test_a_row_has_the_same_bits_in_any_company(kind: Any) -> None:
    rng = np.random.default_rng(10)
    for outputs, inputs in ((4096, 4096), (1000, 704)):
        weight: Any = normal(rng, outputs, inputs)
        if kind != "plain":
            weight = CUDA.quantize(weight, QuantSpec(kind, 64 if kind.startswith("int4") else None))
        packed = CUDA.pack_linear(weight, None, "bfloat16")
        (x,) = on_device(normal(rng, 3000, inputs))
        whole = CUDA.linear(x, packed)
        for rows in (1, 2, 16, 17, 64, 65, 128, 1000):
            assert torch.equal(CUDA.linear(x[:rows], packed), whole[:rows]), rows
        assert torch.equal(CUDA.linear(x[2000:2001], packed), whole[2000:2001])


def test_gemms_by_the_library_where_rows_need_not_be_independent() -> None:
    rng = np.random.default_rng(9)
    ops = CudaOps("cuda" if ON_DEVICE else "cpu", batch_invariant=False)
    weight, bias, x = normal(rng, 40, 70), normal(rng, 40), normal(rng, 9, 70)
    for storage in STORAGES:
        expected = REFERENCE.linear(x, REFERENCE.pack_linear(weight, bias, storage))
        got = numpy(ops.linear(*on_device(x), ops.pack_linear(weight, bias, storage)))
        assert relative_error(got, expected) < TOLERANCE[storage]
    rounded = ops.pack_linear(random_weight(rng, "int8", 40, 70, 70), bias, "float32")
    assert np.array_equal(numpy(ops.linear(*on_device(x), rounded)), numpy(CUDA.linear(*on_device(x), rounded)))


@pytest.mark.parametrize("kind", sorted(BLOCK_FORMATS))
def test_formats_of_blocks_are_refused_by_name(kind: QuantizedFormat) -> None:
    """So they are unpacked where they come from a file: `tests/weights/test_gguf_packed.py`."""
    assert kind not in CUDA.formats
    with pytest.raises(ValueError, match=f"CUDA has no GEMM of {kind}"):
        CUDA.pack_linear(random_weight(np.random.default_rng(0), kind, 4, 64, 32), None, "float32")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BLOCK_FORMATS])
def test_gemms_of_integers(kind: QuantizedFormat) -> None:
    rng = np.random.default_rng(2)
    for group, inputs in ((32, 130), (64, 130), (64, 128), (32, 96)):
        weight, x = random_weight(rng, kind, 70, inputs, group), normal(rng, 70, inputs)
        packed, expected = CUDA.pack_linear(weight, None, "float32"), REFERENCE.pack_linear(weight, None, "float32")
        for rows in (1, 20, 70):
            got = numpy(CUDA.linear(*on_device(x[:rows]), packed))
            expected_y = REFERENCE.linear(x[:rows], expected)
            assert relative_error(got, expected_y) < (2e-5 if kind.endswith("a8") else 1e-4), (group, rows)
    if not kind.startswith("int4"):
        table = random_weight(rng, kind, 9, 1040, 1040)
        ids, scale = np.array([3, 0, 8], np.int32), 1040**0.5
        rows = numpy(CUDA.embed(CUDA.array(ids, "int32"), CUDA.pack_embedding(table, "float32"), scale))
        assert np.array_equal(rows, REFERENCE.embed(ids, REFERENCE.pack_embedding(table, "float32"), scale))


@pytest.mark.parametrize(
    ("kind", "size"), [("int8", None), ("int8_w8a8", None), ("fp8", None), ("int4", 32), ("int4_w4a8", 128)]
)
def test_weights_are_rounded_on_the_device_to_the_bits_of_the_definition(
    kind: Any, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "ROUNDED_ELEMENTS", 2000)
    rng, quant = np.random.default_rng(8), QuantSpec(kind, size)
    for shape in ((1, 1), (5, 31), (17, 96), (40, 576), (0, 64), (4, 0)):
        weight = normal(rng, *shape) * np.exp(3 * normal(rng, shape[0], 1))
        weight[1:2] = 0.0
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            ours, expected = (ops.quantize(weight.astype(dtype), quant) for ops in (CUDA, REFERENCE))
            assert (ours.format, ours.group_size) == (expected.format, expected.group_size)
            assert np.array_equal(numpy(ours.values.float()), expected.values.astype(np.float32))
            assert np.array_equal(numpy(ours.scales), expected.scales)
            if all(shape):
                mine, theirs = (CUDA.pack_linear(one, None, "float32") for one in (ours, expected))
                assert torch.equal(mine.weight.view(torch.uint8), theirs.weight.view(torch.uint8))
                assert torch.equal(mine.scales, theirs.scales)
    with pytest.raises(ValueError, match="not finite"):
        CUDA.quantize(np.array([[1.0, np.nan]], np.float32), quant)


def test_a_packed_weight_is_a_copy() -> None:
    """Who loads uses the memory of one part for the next."""
    weight = np.ones((4, 32), np.float32)
    rounded = REFERENCE.quantize(weight, QuantSpec("int8", None))
    packed = [CUDA.pack_linear(one, None, "float32") for one in (weight, rounded)]
    weight[:], rounded.values[:], rounded.scales[:] = 7.0, 7, 7.0
    assert [float(one.weight.float().mean()) for one in packed] == [1.0, 127.0]
    assert float(packed[1].scales.max()) < 1


@pytest.mark.skipif("fp8" not in CUDA.formats, reason="needs compute capability 8.9")
def test_gemms_of_fp8() -> None:
    rng = np.random.default_rng(6)
    weight, x = normal(rng, 70, 300), normal(rng, 70, 300) * np.exp(3 * normal(rng, 70, 1))
    weight[3], weight[5, 7], x[2] = 0, 1e4, 0
    x[4, :5] = 1e-30, -1e-3, 0.0, 1e4, -1e4
    rounded = REFERENCE.quantize(weight, QuantSpec("fp8", None))
    packed, expected = CUDA.pack_linear(rounded, None, "float32"), REFERENCE.pack_linear(rounded, None, "float32")
    for rows in (1, 20, 70):
        got = numpy(CUDA.linear(*on_device(x[:rows]), packed))
        assert relative_error(got, REFERENCE.linear(x[:rows], expected)) < 1e-3
    ids = np.array([5, 3, 69], np.int32)
    table, theirs = CUDA.pack_embedding(rounded, "float32"), REFERENCE.pack_embedding(rounded, "float32")
    assert np.array_equal(numpy(CUDA.embed(CUDA.array(ids, "int32"), table, 3.0)), REFERENCE.embed(ids, theirs, 3.0))
    values, scales = gemm.quantize_activations(*on_device(x), "fp8")
    expected_values, expected_scales = REFERENCE.quantize_activations(x, 448, e4m3=True)
    assert np.array_equal(numpy(values), expected_values)
    assert np.array_equal(numpy(scales), expected_scales[:, 0])
    broken = np.full((3, 300), 1.0, np.float32)
    broken[0, 3], broken[2, 4] = np.nan, np.inf
    nans = np.isnan(numpy(CUDA.linear(*on_device(broken), packed)))
    assert nans[::2].all() and not nans[1].any()


def test_norms_and_activations() -> None:
    rng = np.random.default_rng(3)
    x, weight, bias, residual = normal(rng, 6, 77), normal(rng, 77), normal(rng, 77), normal(rng, 6, 77)
    dx, dw, db, dr = on_device(x, weight, bias, residual)
    assert relative_error(numpy(CUDA.rms_norm(dx, dw, 1e-5)), REFERENCE.rms_norm(x, weight, 1e-5)) < 2e-6
    assert relative_error(numpy(CUDA.layer_norm(dx, dw, db, 1e-5)), REFERENCE.layer_norm(x, weight, bias, 1e-5)) < 4e-6
    got = numpy(CUDA.add_rms_norm(dx, dr, dw, 1e-5))
    assert relative_error(got, REFERENCE.add_rms_norm(x, residual, weight, 1e-5)) < 2e-6
    assert np.array_equal(numpy(dr), residual)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        expected = REFERENCE.activation(x, kind)
        assert relative_error(numpy(CUDA.activation(dx, kind)), expected) < 5e-6
        pair = np.concatenate([x, residual], axis=1)
        assert relative_error(numpy(CUDA.activation_multiply(*on_device(pair), kind)), expected * residual) < 5e-6


def test_blocks_have_the_same_bytes_where_keys_and_values_are_the_same() -> None:
    assert_bytes_tell_blocks_apart(CUDA)


def test_penalties_of_all_rows_at_once() -> None:
    rng = np.random.default_rng(8)
    logits, sizes = normal(rng, 4, 50), [3, 20, 1]
    rows = np.repeat([0, 2, 3], sizes)
    columns = {
        "token_ids": np.concatenate([rng.permutation(50)[:size] for size in sizes]),
        "counts": rng.integers(0, 3, sum(sizes)),
        **{name: np.repeat(rng.random(3) + 0.5, sizes) for name in ("repetition", "frequency", "presence")},
    }
    given = {}
    for ops in (CUDA, REFERENCE):
        arrays = {
            name: ops.array(values, "int64" if name == "token_ids" else "float32") for name, values in columns.items()
        }
        given[ops] = ops.array(logits, "float32")
        ops.penalize(given[ops], PenaltyBatch(ops.array(rows, "int64"), **arrays))
    assert np.array_equal(CUDA.to_numpy(given[CUDA]), given[REFERENCE])
    changed = np.zeros((4, 50), bool)
    changed[rows, columns["token_ids"]] = True
    assert np.array_equal(given[REFERENCE] != logits, changed)


def sample_batch(rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> SampleBatch:
    seeds = 2**63 + 3 * np.arange(rows, dtype=np.uint64)
    return SampleBatch(
        *(np.full(rows, value, dtype) for value, dtype in ((temperature, np.float32), (top_k, np.int32))),
        *(np.full(rows, value, np.float32) for value in (top_p, min_p)),
        seeds,
        2**33 + np.arange(rows),
    )


@pytest.mark.parametrize(
    "case",
    [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 7, 1.0, 0.0), (1.3, 20, 0.8, 0.02), (0.9, 0, 0.6, 0.0)],
    ids=str,
)
def test_tokens_are_those_of_the_reference(case: tuple[float, int, float, float]) -> None:
    rng = np.random.default_rng(4)
    logits = 3 * normal(rng, 5, 130)
    logits[1] = np.round(logits[1])  # many ties
    logits[2, rng.random(130) < 0.5] = -np.inf
    logits[3] = 1.0
    rows = sample_batch(5, *case)
    names = {
        "temperature": "float32",
        "top_k": "int32",
        "top_p": "float32",
        "min_p": "float32",
        "seeds": "uint64",
        "positions": "int64",
    }
    moved = SampleBatch(**{name: CUDA.array(getattr(rows, name), dtype) for name, dtype in names.items()})
    assert np.array_equal(CUDA.to_numpy(CUDA.sample(*on_device(logits), moved)), REFERENCE.sample(logits, rows))


def test_logprobs_and_broken_rows() -> None:
    logits = 3 * normal(np.random.default_rng(5), 4, 90)
    logits[1] = np.round(logits[1])
    ids = np.array([0, 89, 5, 7], np.int32)
    got, expected = CUDA.logprobs(*on_device(logits), CUDA.array(ids, "int32"), 6), REFERENCE.logprobs(logits, ids, 6)
    assert np.abs(numpy(got.chosen) - expected.chosen).max() < 1e-5
    assert np.abs(numpy(got.top_logprobs) - expected.top_logprobs).max() < 1e-5
    assert np.array_equal(CUDA.to_numpy(got.rank), expected.rank)
    assert np.array_equal(CUDA.to_numpy(got.top_ids), expected.top_ids)
    logits[0, 3], logits[1], logits[2, 5] = np.nan, -np.inf, np.inf
    assert CUDA.to_numpy(CUDA.rows_finite(*on_device(logits))).tolist() == [False, False, False, True]
