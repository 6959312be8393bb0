"""The cases of `kernels.py`: each operation and format at the shapes of three models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from quire.bench.roofline import READ_BYTES
from quire.ops.cpu import CpuOps
from quire.ops.types import AttentionBatch, AttentionSpec, CacheShape, QuantizedWeight, SampleBatch

FORMATS = ("bfloat16", "int8", "int8_w8a8", "int4")
MEMORY_BYTES = READ_BYTES
"""Copies of a weight together: more than any cache holds."""
GROUP_SIZE = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape. `run(turn)` does it once, with the copy of turn `turn`."""

    operation: str
    format: str
    model: str
    shape: str
    rows: int
    num_bytes: int
    """What must be read and written once."""
    num_operations: int
    """Multiplications and additions; 0 where they do not matter."""
    unit: str | None
    """The limit of its operations; None where no probe states it."""
    run: Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model, as far as its operations go."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def matrices(self) -> list[tuple[str, int, int]]:
        """(operation, outputs, inputs) of every GEMM."""
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            ("linear", q_size + 2 * kv_size, self.hidden),
            ("linear", self.hidden, q_size),
            ("gated_linear", 2 * self.inner, self.hidden),
            ("linear", self.hidden, self.inner),
            ("logits", self.vocabulary, self.hidden),
            ("greedy", self.vocabulary, self.hidden),
        ]


MODELS = (
    Shapes("m135", 576, 1536, 9, 3, 64, 49152),
    Shapes("m1b", 2048, 8192, 32, 8, 64, 128256),
    Shapes("7b", 4096, 14336, 32, 8, 128, 32000),
)
"""SmolLM2 135M, Llama 3.2 1B, Mistral 7B."""
OPERATIONS = (
    "linear", "gated_linear", "logits", "greedy", "attention", "add_rms_norm", "activation_multiply", "sample"
)  # fmt: skip


def cases(ops: CpuOps, wanted: Callable[[str, str, str], bool], rows: Sequence[int]) -> Iterator[Case]:
    """One after the other, so that only one weight is in memory. `wanted(operation, format, model)`."""
    for model in MODELS:
        for operation, outputs, inputs in model.matrices():
            for name in FORMATS:
                if wanted(operation, name, model.name):
                    yield from _gemms(ops, model, operation, name, (outputs, inputs), rows)
        if wanted("attention", "bfloat16", model.name):
            yield from _attention(ops, model)
        yield from (case for case in _others(ops, model, rows) if wanted(case.operation, case.format, case.model))


def _gemms(
    ops: CpuOps, model: Shapes, operation: str, name: str, shape: tuple[int, int], rows: Sequence[int]
) -> Iterator[Case]:
    outputs, inputs = shape
    weight = _weight(name, outputs, inputs)
    gated = operation == "gated_linear"
    pack = ops.pack_gated if gated else ops.pack_linear
    first = pack(weight, None, "bfloat16")
    copies = [first, *(pack(weight, None, "bfloat16") for _ in range(MEMORY_BYTES // first.bytes))]
    width = {"gated_linear": outputs // 2, "greedy": 0}.get(operation, outputs)
    for count in rows:
        x = _floats(count, inputs)

        def run(turn: int, x: Any = x) -> object:
            packed = copies[turn % len(copies)]
            if operation == "greedy":
                return ops.greedy(x, packed)
            return ops.gated_linear(x, packed, "silu") if gated else ops.linear(x, packed)

        yield Case(
            operation,
            name,
            model.name,
            f"{outputs}x{inputs}",
            count,
            num_bytes=first.bytes + 4 * count * (inputs + width),
            num_operations=2 * count * outputs * inputs,
            unit=_unit(ops, name),
            run=run,
        )


def _unit(ops: CpuOps, name: str) -> str | None:
    """The probe of what a format multiplies; integers have none where bytes cannot be multiplied."""
    unit = {"bfloat16": "bfloat16", "int8_w8a8": "int8"}.get(name, "int8 twice")
    if ops.probe(unit.partition(" ")[0], np.empty(0, np.uint8)):
        return unit
    return "float32" if name == "bfloat16" else None


def _weight(name: str, outputs: int, inputs: int) -> Any:
    """Random values, the same few again and again: making them should take no time."""
    rng = np.random.default_rng(0)
    if name == "bfloat16":
        block = (rng.standard_normal(2**16, dtype=np.float32) * 0.05).astype(ml_dtypes.bfloat16)
        return np.resize(block, (outputs, inputs))
    if name == "int4":
        values, groups, size = rng.integers(-8, 8, 2**16, np.int8), -(-inputs // GROUP_SIZE), GROUP_SIZE
        return QuantizedWeight("int4", np.resize(values, shape := (outputs, inputs)), _scales(shape[0], groups), size)
    values = rng.integers(-127, 128, 2**16, np.int8)
    return QuantizedWeight(name, np.resize(values, (outputs, inputs)), _scales(outputs, 1), inputs)  # type: ignore[arg-type]


def _scales(outputs: int, groups: int) -> Any:
    return np.full((outputs, groups), 0.01, np.float32)


def _floats(*shape: int) -> Any:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def _attention(ops: CpuOps, model: Shapes) -> Iterator[Case]:
    """(rows, tokens of each in this step, tokens that each has in the cache)"""
    for count, new, known in ((1, 1, 1024), (1, 1, 8192), (16, 1, 1024), (1, 512, 0), (1, 512, 3584)):
        block, blocks = 16, -(-(new + known) // 16)
        layers = max(1, min(64, MEMORY_BYTES // (4 * count * blocks * block * model.kv_heads * model.head_dim)))
        cache = ops.make_cache(CacheShape(layers, count * blocks, block, model.kv_heads, model.head_dim, "bfloat16"))
        batch = AttentionBatch(
            positions=np.tile(np.arange(known, known + new, dtype=np.int32), count),
            query_starts=np.arange(count + 1, dtype=np.int32) * new,
            starts=np.full(count, known, np.int32),
            block_tables=np.arange(count * blocks, dtype=np.int32).reshape(count, blocks),
        )
        q, k, v = (_floats(count * new, heads, model.head_dim) for heads in (model.heads, *[model.kv_heads] * 2))
        pairs = count * sum(range(known + 1, known + new + 1))

        run = partial(_attend, ops, (q, k, v), cache, layers, batch, AttentionSpec(model.head_dim**-0.5))
        for layer in range(layers):  # pages that were never written are all one page
            run(layer)
        yield Case(
            "attention",
            "bfloat16",
            model.name,
            f"{new} after {known}",
            count,
            num_bytes=4 * count * (known + new) * model.kv_heads * model.head_dim + 8 * q.size,
            num_operations=4 * pairs * model.heads * model.head_dim,
            unit=_unit(ops, "bfloat16"),
            run=run,
        )


def _attend(
    ops: CpuOps,
    qkv: tuple[Any, Any, Any],
    cache: Any,
    layers: int,
    batch: AttentionBatch,
    spec: AttentionSpec,
    turn: int,
) -> object:
    q, k, v = qkv
    return ops.attention(q, k, v, cache, turn % layers, batch, spec)


def _others(ops: CpuOps, model: Shapes, rows: Sequence[int]) -> Iterator[Case]:
    """What reads and writes activations; they come from the cache, so more than the limit can be reached."""
    for count in rows:
        x, residual, gate_up = (_floats(count, width) for width in (model.hidden, model.hidden, 2 * model.inner))
        weight, logits = np.ones(model.hidden, np.float32), _floats(count, model.vocabulary)
        batch = SampleBatch(
            temperature=np.full(count, 0.8, np.float32),
            top_k=np.full(count, 40, np.int32),
            top_p=np.full(count, 0.95, np.float32),
            min_p=np.zeros(count, np.float32),
            seeds=np.arange(count, dtype=np.uint64),
            positions=np.zeros(count, np.int64),
        )
        runs: list[tuple[str, str, int, Callable[[], object]]] = [
            ("add_rms_norm", f"{model.hidden}", 16 * x.size, partial(ops.add_rms_norm, x, residual, weight, 1e-5)),
            (
                "activation_multiply",
                f"{model.inner}",
                6 * gate_up.size,
                partial(ops.activation_multiply, gate_up, "silu"),
            ),
            ("sample", f"{model.vocabulary}", 4 * logits.size, partial(ops.sample, logits, batch)),
        ]
        for operation, shape, num_bytes, run in runs:
            yield Case(operation, "float32", model.name, shape, count, num_bytes, 0, None, partial(_ignore_turn, run))


def _ignore_turn(run: Callable[[], object], turn: int) -> object:
    return run()
