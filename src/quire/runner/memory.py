"""Where memory goes, before the cache is given the rest: measured on a GPU, reckoned on a CPU."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from quire.config import MemoryLedger
from quire.errors import ConfigurationError
from quire.models.model import Model
from quire.ops.types import Array, AttentionBatch, Opaque, Ops, SampleBatch
from quire.runner.graphs import BYTES_PER_GRAPH, GraphLimits

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
MAX_TOP_LOGPROBS = 20
SLACK_SHARE = 0.01
"""Of the device: pieces that the allocator cannot use. Held against the device by `scripts/gpu_check`."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that a scheduler may ask for."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    records: bool = False
    """Whether decode steps are recorded."""


def make_ledger(model: Model, ops: Ops, limits: StepLimits) -> MemoryLedger:
    """All lines but the cache. On a device the largest steps are computed once, on a cache of one block, which also
    compiles and loads the kernels."""
    if ops.memory() is None:
        return _reckoned(model, limits)
    try:
        return _measured(model, ops, limits)
    except MemoryError as error:
        raise ConfigurationError(
            f"max_num_batched_tokens is {limits.max_num_batched_tokens} and max_num_seqs {limits.max_num_seqs}: "
            "a step of that size does not fit the device beside the weights",
            field="max_num_batched_tokens",
        ) from error


def _reckoned(model: Model, limits: StepLimits) -> MemoryLedger:
    """In the host's memory, float32: what a layer holds at one time for each token, and two copies of the logits."""
    spec = model.spec
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    floats = 3 * spec.hidden_size + max(heads, (3 if spec.gated_mlp else 2) * spec.intermediate_size)
    return MemoryLedger(
        device=host_memory_bytes(),
        weights=model.weight_bytes,
        activations=4 * floats * limits.max_num_batched_tokens,
        sampler=2 * 4 * spec.vocab_size * limits.max_num_seqs,
    )


def _measured(model: Model, ops: Ops, limits: StepLimits) -> MemoryLedger:
    rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    forward, whole = [], []
    for step in (prompt_step(ops, limits), single_step(ops, limits)):
        cache = ops.make_cache(model.cache_shape(1, limits.block_size))
        forward.append(ops.peak_bytes(partial(model.forward, *step, cache)))
        whole.append(ops.peak_bytes(partial(_forward_and_choose, model, ops, (*step, cache), rows)))
        del cache
    memory = ops.memory()
    assert memory is not None
    return MemoryLedger(
        device=memory.total,
        taken=max(0, memory.total - memory.free - memory.held),
        weights=memory.held,
        activations=max(forward),
        sampler=max(whole) - max(forward),
        graphs=_graph_bytes(model, limits, forward[-1]) if limits.records else 0,
        slack=int(memory.total * SLACK_SHARE),
    )


def _graph_bytes(model: Model, limits: StepLimits, peak_bytes: int) -> int:
    """All recordings share the memory of the largest, but for what each says and the device's own bookkeeping."""
    sizes = GraphLimits(limits.max_num_seqs, -(-limits.max_model_len // limits.block_size), limits.block_size).sizes()
    return peak_bytes + sum(BYTES_PER_GRAPH + 4 * size.num_rows * model.spec.hidden_size for size in sizes)


def prompt_step(ops: Ops, limits: StepLimits) -> tuple[Array, AttentionBatch]:
    """As many tokens of prompts as one step takes, in as few rows as hold them."""
    tokens, longest = limits.max_num_batched_tokens, limits.max_model_len
    counts = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
    return _step(ops, np.array(counts), np.zeros(len(counts), np.int64), limits)


def single_step(ops: Ops, limits: StepLimits) -> tuple[Array, AttentionBatch]:
    """The last token of as many of the longest sequences as there may be."""
    rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    return _step(ops, np.ones(rows, np.int64), np.full(rows, limits.max_model_len - 1), limits)


def _step(ops: Ops, counts: Array, starts: Array, limits: StepLimits) -> tuple[Array, AttentionBatch]:
    """Every position of every row is in block 0."""
    query_starts = np.concatenate([[0], np.cumsum(counts)])
    width = -(-int((starts + counts).max()) // limits.block_size)
    positions = np.repeat(starts - query_starts[:-1], counts) + np.arange(query_starts[-1])
    batch = AttentionBatch(
        positions=ops.array(positions, "int32"),
        query_starts=ops.array(query_starts, "int32"),
        starts=ops.array(starts, "int32"),
        block_tables=ops.array(np.zeros((len(counts), width)), "int32"),
    )
    return ops.array(np.zeros(len(positions)), "int32"), batch


def _forward_and_choose(model: Model, ops: Ops, step: tuple[Array, AttentionBatch, Opaque], rows: int) -> None:
    """With all that may be asked of the logits of `rows` rows at one time."""
    logits = model.logits(model.forward(*step)[:rows])
    raw = logits[ops.array(np.arange(rows), "int64")]
    ops.rows_finite(logits)
    batch = SampleBatch(
        temperature=ops.array(np.ones(rows), "float32"),
        top_k=ops.array(np.full(rows, 50), "int32"),
        top_p=ops.array(np.full(rows, 0.9), "float32"),
        min_p=ops.array(np.zeros(rows), "float32"),
        seeds=ops.array(np.zeros(rows), "uint64"),
        positions=ops.array(np.zeros(rows), "int64"),
    )
    ops.logprobs(raw, ops.sample(logits, batch), min(MAX_TOP_LOGPROBS, model.spec.vocab_size))


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container that this process is confined to, in bytes."""
    limits = [_total_bytes()]
    for name in CGROUP_LIMITS:
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
