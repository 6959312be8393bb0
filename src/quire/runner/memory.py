"""Where memory goes, before the cache is given the rest: measured on a GPU, estimated on a CPU."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from quire.config import MemoryBudget, mib
from quire.errors import ConfigurationError
from quire.models.model import Model
from quire.models.spec import DecoderSpec
from quire.ops.types import Array, AttentionBatch, Opaque, Provider, SampleBatch, WeightDtype
from quire.outputs import Decision
from quire.runner.graphs import BYTES_PER_GRAPH, GraphBuckets
from quire.runner.host_memory import host_memory_bytes
from quire.runner.host_step import Host, host_step_bytes
from quire.sampling_params import MAX_LOGPROBS

PROMPT_LOGPROB_ROWS = 64
"""Rows of logits held at once while the log-probabilities of a prompt are read."""
FRAGMENTATION_SHARE = 0.01
"""Of the device: pieces that the allocator cannot use. Held against the device by `scripts/gpu_check`."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """The largest step that a scheduler may plan."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    captures_graphs: bool = False
    """Whether decode steps are captured as CUDA graphs."""


def make_budget(model: Model, ops: Provider, shape: StepShape, *, is_shared: bool = False) -> MemoryBudget:
    """All entries but the cache. On a device the largest steps are computed once, on a cache of one block, which also
    compiles and loads the kernels.

    Args:
        is_shared: others have their own share of the device: what they take does not count here. Untested on a
            device: what programs other than this server's hold there is forgotten, too.

    Raises:
        ConfigurationError: a step of that shape does not fit the device beside the weights.
    """
    if ops.memory() is None:
        return estimated(model.spec, model.weight_bytes, model.dtype, shape, Host.of(ops))
    try:
        found = _measured(model, ops, shape)
        return replace(found, used_by_others=0) if is_shared else found
    except MemoryError as error:
        raise ConfigurationError(
            f"max_num_batched_tokens is {shape.max_num_batched_tokens} and max_num_seqs {shape.max_num_seqs}: "
            "a step of that size does not fit the device beside the weights",
            field="max_num_batched_tokens",
        ) from error


def estimated(spec: DecoderSpec, weight_bytes: int, dtype: WeightDtype, shape: StepShape, host: Host) -> MemoryBudget:
    """In the host's memory: the buffers of a step, and two copies of the logits, float32."""
    return MemoryBudget(
        device=host_memory_bytes(),
        weights=weight_bytes,
        activations=host_step_bytes(spec, weight_bytes, dtype, shape.max_num_batched_tokens, host),
        sampler=2 * 4 * spec.vocab_size * shape.max_num_seqs,
    )


def _measured(model: Model, ops: Provider, shape: StepShape) -> MemoryBudget:
    cache = ops.make_cache(model.cache_shape(1, shape.block_size))
    whole = take_largest_steps(model, ops, cache, shape)
    forward = ops.peak_bytes(partial(model.forward, *prompt_step(ops, shape), cache))
    graphs = 0
    if shape.captures_graphs:
        sampled = ops.peak_bytes(partial(_sample, model, ops, single_step(ops, shape), cache, _num_rows(shape)))
        graphs = sampled + _graph_bytes(model, shape)
    del cache
    memory = ops.memory()
    assert memory is not None
    return MemoryBudget(
        device=memory.total,
        used_by_others=max(0, memory.total - memory.free - memory.allocated),
        weights=memory.allocated,
        activations=forward,
        sampler=whole - forward,
        graphs=graphs,
        fragmentation_reserve=int(memory.total * FRAGMENTATION_SHARE),
    )


def _num_rows(shape: StepShape) -> int:
    return min(shape.max_num_seqs, shape.max_num_batched_tokens)


def _graph_bytes(model: Model, shape: StepShape) -> int:
    """All graphs share the memory of the largest, but for what each says and the device's own bookkeeping; and the
    block into which they pad."""
    sizes = GraphBuckets(shape.max_num_seqs, -(-shape.max_model_len // shape.block_size), shape.block_size).sizes()
    null_block = model.cache_shape(1, shape.block_size).bytes_per_block
    return null_block + sum(
        BYTES_PER_GRAPH + size.num_rows * (5 if size.samples else 4 * model.spec.hidden_size) for size in sizes
    )


def take_largest_steps(model: Model, ops: Provider, cache: Opaque, shape: StepShape) -> int:
    """Compute the largest steps, with all that may be requested of their logits, on block 0 of `cache`.

    Returns:
        The most that they took, in bytes.
    """
    rows = _num_rows(shape)
    num_reported = max(rows, min(shape.max_num_batched_tokens, PROMPT_LOGPROB_ROWS))
    return max(
        ops.peak_bytes(partial(_sample_and_report, model, ops, prompt_step(ops, shape), cache, num_reported)),
        ops.peak_bytes(partial(_sample_and_report, model, ops, single_step(ops, shape), cache, rows)),
    )


def check_budget(budget: MemoryBudget, ops: Provider) -> Decision | None:
    """The bytes in use after the largest steps beside those budgeted; None where memory is the host's."""
    memory = ops.memory()
    if memory is None:
        return None
    used = memory.total - memory.free + memory.allocator_cached
    return Decision("memory_in_use", mib(used), f"{used / budget.used - 1:+.1%} of the budget's {mib(budget.used)}")


def prompt_step(ops: Provider, shape: StepShape) -> tuple[Array, AttentionBatch]:
    """Token ids `[tokens]` and batch of a step with as many tokens as one takes: the last one of as many of the longest
    sequences as there may be, and prompts, in as few rows as hold them."""
    tokens, longest = shape.max_num_batched_tokens, shape.max_model_len
    singles = max(0, _num_rows(shape) - -(-tokens // longest))
    full, rest = divmod(tokens - singles, longest)
    prompts = [longest] * full + [rest] * (rest > 0)
    starts = [0] * len(prompts) + [longest - 1] * singles
    return _step(ops, np.array(prompts + [1] * singles), np.array(starts), shape)


def single_step(ops: Provider, shape: StepShape) -> tuple[Array, AttentionBatch]:
    """Token ids `[rows]` and batch of the last token of as many of the longest sequences as there may be."""
    rows = _num_rows(shape)
    return _step(ops, np.ones(rows, np.int64), np.full(rows, shape.max_model_len - 1), shape)


def _step(ops: Provider, counts: Array, starts: Array, shape: StepShape) -> tuple[Array, AttentionBatch]:
    """Every position of every row is in block 0."""
    query_starts = np.concatenate([[0], np.cumsum(counts)])
    width = -(-int((starts + counts).max()) // shape.block_size)
    positions = np.repeat(starts - query_starts[:-1], counts) + np.arange(query_starts[-1])
    batch = AttentionBatch(
        positions=ops.array(positions, "int32"),
        query_starts=ops.array(query_starts, "int32"),
        starts=ops.array(starts, "int32"),
        block_tables=ops.array(np.zeros((len(counts), width)), "int32"),
    )
    return ops.array(np.zeros(len(positions)), "int32"), batch


def _sample(
    model: Model, ops: Provider, step: tuple[Array, AttentionBatch], cache: Opaque, rows: int
) -> tuple[Array, ...]:
    """Logits of `rows` rows and their tokens; hidden states stay until then."""
    hidden = model.forward(*step, cache)
    logits = model.logits(hidden[ops.array(np.arange(rows), "int64")])
    ops.zero_nonfinite_rows(logits)
    batch = SampleBatch(
        temperature=ops.array(np.ones(rows), "float32"),
        top_k=ops.array(np.full(rows, 50), "int32"),
        top_p=ops.array(np.full(rows, 0.9), "float32"),
        min_p=ops.array(np.zeros(rows), "float32"),
        seeds=ops.array(np.zeros(rows), "uint64"),
        positions=ops.array(np.zeros(rows), "int64"),
    )
    return hidden, logits, ops.sample(logits, batch)


def _sample_and_report(
    model: Model, ops: Provider, step: tuple[Array, AttentionBatch], cache: Opaque, rows: int
) -> tuple[Array, ...]:
    """With all that may be requested of the logits at one time."""
    hidden, logits, tokens = _sample(model, ops, step, cache, rows)
    raw = logits[ops.array(np.arange(rows), "int64")]
    ops.zero_nonfinite_rows(logits)
    ops.logprobs(raw, tokens, min(MAX_LOGPROBS, model.spec.vocab_size))
    return hidden, raw
