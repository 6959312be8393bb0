"""The forms in which a GEMM takes its inputs and gives its results: each has the bits of the plain one."""

from typing import Any

import numpy as np
import pytest

from quire.ops.cpu import CpuOps
from quire.ops.cpu_program import CpuProgram
from quire.ops.graph.fuse import propagate_bf16_layout
from quire.ops.graph.operations import Activate, Embed, Linear, trace
from quire.ops.graph.program import Buffer, Program, View
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import Activation, AttentionBatch, CacheShape
from tests.ops.cases import normal, relative_error
from tests.ops.test_linear import STORAGES, in_tiles, inputs_of_gemms

REFERENCE = ReferenceOps(np)
KINDS: list[Activation] = ["silu", "gelu", "gelu_tanh", "relu"]
# outputs of gate (and of up), in: less than half a panel; half and one more; not whole chunks; whole panels; pieces
GATED = [(1, 1), (15, 33), (16, 64), (17, 70), (48, 31), (96, 70), (100, 600), (33, 1300)]
ROWS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 40, 65, 200)
TILED = [isa for isa in instruction_sets() if in_tiles(isa)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", GATED)
def test_a_gated_gemm_has_the_bits_of_its_two_operations(cpu: CpuOps, storage: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    half, width = shape
    weight, x = normal(rng, 2 * half, width), normal(rng, 200, width)
    for bias in (None, normal(rng, 2 * half)):
        plain, gated = cpu.pack_linear(weight, bias, storage), cpu.pack_gated(weight, bias, storage)
        for index, rows in enumerate(ROWS):
            kind = KINDS[index % 4]
            expected = cpu.activation_multiply(cpu.linear(x[:rows], plain), kind)
            assert np.array_equal(cpu.gated_linear(x[:rows], gated, kind), expected), rows
        definition = REFERENCE.gated_linear(
            inputs_of_gemms(cpu, storage, x), REFERENCE.pack_gated(weight, bias, storage), "silu"
        )
        assert relative_error(cpu.gated_linear(x, gated, "silu"), definition) < 1e-4


def test_a_gated_row_has_the_same_bits_in_any_company_and_with_any_threads(cpu: CpuOps) -> None:
    rng = np.random.default_rng(2)
    weight, x = normal(rng, 2 * 530, 300), normal(rng, 600, 300)
    gated = cpu.pack_gated(weight, None, "bfloat16")
    whole = cpu.gated_linear(x, gated, "silu")
    for first, last in ((0, 1), (3, 19), (5, 38), (100, 333), (599, 600)):
        assert np.array_equal(cpu.gated_linear(x[first:last], gated, "silu"), whole[first:last])
    for threads in (1, 3, 8):
        other = CpuOps(threads, cpu.name.split("(")[1].split(",")[0])
        assert np.array_equal(other.gated_linear(x, other.pack_gated(weight, None, "bfloat16"), "silu"), whole)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_result_of_a_gemm_is_added_to_what_is_there(cpu: CpuOps, storage: str) -> None:
    rng = np.random.default_rng(3)
    for out, width in ((1, 3), (31, 40), (64, 576), (130, 600)):
        bias = normal(rng, out)
        packed = cpu.pack_linear(normal(rng, out, width), bias, storage)
        for rows in (1, 16, 33, 130):
            x, residual = normal(rng, rows, width), normal(rng, rows, out)
            expected = residual + cpu.linear(x, packed)
            cpu._native.linear(x, packed, residual, 1.0, 0.0, True)
            assert np.array_equal(residual, expected)


def test_memory_next_to_a_gated_result_is_not_written(cpu: CpuOps) -> None:
    rng = np.random.default_rng(4)
    for half, rows in ((5, 1), (17, 17), (40, 40)):
        packed = cpu.pack_gated(normal(rng, 2 * half, 40), None, "bfloat16")
        memory = np.full((rows + 2, half), 7, np.float32)
        cpu._native.gated_linear(normal(rng, rows, 40), packed, 0, memory[1:-1])
        assert (memory[0] == 7).all() and (memory[-1] == 7).all()


def test_a_weight_packed_for_another_operation_is_refused(cpu: CpuOps) -> None:
    weight, x = np.ones((6, 4), np.float32), np.ones((2, 4), np.float32)
    plain, gated = cpu.pack_linear(weight, None, "bfloat16"), cpu.pack_gated(weight, None, "bfloat16")
    with pytest.raises(ValueError, match="packed for gated_linear"):
        cpu.linear(x, gated)
    with pytest.raises(ValueError, match="packed for gated_linear"):
        cpu.embed(np.zeros(1, np.int32), gated)
    with pytest.raises(ValueError, match="not packed for it"):
        cpu.gated_linear(x, plain, "silu")
    with pytest.raises(ValueError, match="differ in number"):
        cpu.pack_gated(weight[:5], None, "bfloat16")


def test_amx_bf16_is_refused_where_weights_do_not_read_it() -> None:
    buffers, views = (Buffer(4), Buffer(4, "amx_bf16"), Buffer(6)), [View(n, 0, 1, w) for n, w in enumerate((4, 4, 6))]
    for isa in instruction_sets():
        ops = CpuOps(1, isa)
        table = ops.pack_embedding(np.ones((2, 4), np.float32), "float32")
        for storage in STORAGES:
            packed = ops.pack_linear(np.ones((6, 4), np.float32), None, storage)
            assert packed.reads_amx_bf16 == (in_tiles(isa) and storage == "bfloat16")
            instructions = (
                Embed("token_ids", table, 1.0, views[0]),
                Activate(views[0], "silu", views[1]),
                Linear(views[1], packed, None, views[2]),
            )
            if not packed.reads_amx_bf16:
                with pytest.raises(ValueError, match="does not read amx_bf16"):
                    CpuProgram(ops._native, Program(instructions, buffers, views[2]))


def producers(cpu: CpuOps, width: int) -> dict[str, Any]:
    """What makes the `width` inputs of a GEMM from `ids`; row 0 of each table is NaN."""
    rng = np.random.default_rng(width)
    norm_weight, bias = normal(rng, width), normal(rng, width)
    up = cpu.pack_linear(normal(rng, width, 40), None, "bfloat16")
    gated = cpu.pack_gated(normal(rng, 2 * width, 40), None, "bfloat16")
    tables = [normal(rng, 101, size) for size in (width, width, 40)]
    for table in tables:
        table[0] = np.nan
    x, residual, small = (cpu.pack_embedding(table, "float32") for table in tables)

    def add_rms_norm(ops: Any, ids: Any) -> Any:
        return ops.add_rms_norm(ops.embed(ids, x), ops.embed(ids, residual), norm_weight, 1e-5)

    return {
        "linear": lambda ops, ids: ops.linear(ops.embed(ids, small), up),
        "gated_linear": lambda ops, ids: ops.gated_linear(ops.embed(ids, small), gated, "silu"),
        "rms_norm": lambda ops, ids: ops.rms_norm(ops.embed(ids, x), norm_weight, 1e-5),
        "add_rms_norm": add_rms_norm,
        "layer_norm": lambda ops, ids: ops.layer_norm(ops.embed(ids, x), norm_weight, bias, 1e-5),
        "activation": lambda ops, ids: ops.activation(ops.embed(ids, x), "gelu"),
    }


@pytest.mark.parametrize("isa", TILED)
@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 576, 1500])
def test_what_a_producer_rounds_gives_the_bits_of_what_a_gemm_rounds(isa: str, width: int) -> None:
    cpu = CpuOps(2, isa)
    packed = cpu.pack_linear(normal(np.random.default_rng(1), 70, width), None, "bfloat16")
    cache = cpu.make_cache(CacheShape(1, 1, 128, 1, 16, "float32"))
    for name, produce in producers(cpu, width).items():

        def forward(ops: Any, ids: Any, batch: Any, cache: Any, produce: Any = produce) -> Any:
            return ops.linear(produce(ops, ids), packed)

        program = propagate_bf16_layout(trace(forward))
        assert "amx_bf16" in [buffer.layout for buffer in program.buffers], name
        step = CpuProgram(cpu._native, program)
        # Rows of NaN first: the arena holds NaN wherever a producer of fewer rows leaves something out.
        for first, rows in ((0, 100), (1, 1), (1, 5), (1, 16), (1, 17), (1, 32), (1, 33), (1, 100)):
            ids = np.arange(1, rows + 1, dtype=np.int32) * first
            query_starts, starts = np.array([0, rows], np.int32), np.zeros(1, np.int32)
            batch = AttentionBatch(np.arange(rows, dtype=np.int32), query_starts, starts, np.zeros((1, 1), np.int32))
            expected = forward(cpu, ids, batch, cache)
            assert np.array_equal(step(ids, batch, cache), expected, equal_nan=first == 0), (name, rows)


@pytest.mark.parametrize("storage", STORAGES)
def test_greedy_is_what_temperature_0_samples_from_the_logits(cpu: CpuOps, storage: str) -> None:
    rng = np.random.default_rng(5)
    for vocabulary, width in ((1, 3), (31, 40), (64, 64), (130, 70), (1000, 600)):
        weight = normal(rng, vocabulary, width)
        weight[vocabulary // 2 :] = weight[: vocabulary - vocabulary // 2]  # every row has ties, near and far
        packed, defined = cpu.pack_embedding(weight, storage), REFERENCE.pack_embedding(weight, storage)
        for rows, scale, softcap in ((1, 1.0, None), (7, 0.5, 30.0), (33, 1.0, None), (100, 2.0, 1.0)):
            x = normal(rng, rows, width)
            tokens, finite = cpu.greedy(x, packed, scale, softcap)
            logits = cpu.logits(x, packed, scale, softcap)
            assert np.array_equal(tokens, logits.argmax(axis=-1)) and tokens.dtype == np.int32
            assert finite.all()
            reference, _ = REFERENCE.greedy(inputs_of_gemms(cpu, storage, x), defined, scale, softcap)
            lost = logits.max(axis=-1) - logits[np.arange(rows), reference]
            assert (lost <= 4e-5 * np.abs(logits).max()).all()  # sums in another order may break a tie otherwise


def test_greedy_finds_rows_that_are_not_finite(cpu: CpuOps) -> None:
    rng = np.random.default_rng(6)
    packed = cpu.pack_embedding(np.abs(normal(rng, 100, 40)), "bfloat16")
    x = normal(rng, 40, 40)
    expected, _ = cpu.greedy(x, packed)
    for broken in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[::3] = broken
        tokens, finite = cpu.greedy(spoiled, packed)
        assert np.array_equal(finite, cpu.rows_finite(cpu.logits(spoiled, packed)))
        assert np.array_equal(finite, np.arange(40) % 3 != 0)
        assert np.array_equal(tokens, np.where(finite, expected, 0))
    one = np.ones((70, 1), np.float32)
    for row, value in ((3, np.nan), (69, np.inf), (33, -np.inf)):
        weight = one.copy()
        weight[row] = value
        tokens, finite = cpu.greedy(one[:1], cpu.pack_embedding(weight, "float32"))
        assert (tokens[0], finite[0]) == (0, value == -np.inf)


def test_greedy_refuses_wrong_shapes(cpu: CpuOps) -> None:
    weight, x = np.ones((6, 4), np.float32), np.ones((2, 4), np.float32)
    packed = cpu.pack_embedding(weight, "bfloat16")
    assert cpu.greedy(x[:0], packed)[0].shape == (0,)
    for call in (
        lambda: cpu.greedy(np.ones((2, 5), np.float32), packed),
        lambda: cpu.greedy(x, cpu.pack_gated(weight, None, "bfloat16")),
        lambda: cpu.greedy(x, cpu.pack_embedding(weight[:0], "bfloat16")),
        lambda: cpu._native.greedy(x, packed, 1.0, 0.0, np.empty(1, np.int32), np.empty(2, np.bool_)),
    ):
        with pytest.raises(ValueError):
            call()
