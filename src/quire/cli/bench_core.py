"""`quire bench core`: what Python takes of a step, with an executor that answers without a model, and with the real
runner over a model that computes next to nothing."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.core.scheduler import Scheduler
    from quire.ops.types import Array, AttentionBatch, CacheShape, Provider

BLOCK_SIZE = 16
PROMPT_TOKENS = 64
VOCABULARY = 32
HIDDEN = 16

Maker = Callable[[int], tuple[Any, Any]]
"""A scheduler and its executor, for that many running requests."""


def run(options: argparse.Namespace) -> int:
    """Print both tables."""
    rows, num_steps = options.rows, options.steps
    if min(rows) < 1 or num_steps < 1:
        raise ConfigurationError("rows and steps must be at least 1", field="rows")
    _show("scheduler alone", rows, num_steps, "core us/step", lambda count: _with_fake(count, num_steps))
    _show(
        "with runner and sampler, kernels stubbed out",
        rows,
        num_steps,
        "all us/step",
        lambda count: with_runner(count, num_steps),
    )
    return 0


def _show(title: str, rows: list[int], num_steps: int, total: str, make: Maker) -> None:
    from quire.bench.core_clock import time_core

    whole = total.startswith("all")
    print(f"{title}\n{'rows':>6} {'schedule us':>12} {'execute us':>11} {'update us':>10} {total:>13} {'us/row':>7}")
    for num_rows in rows:
        times = time_core(make, num_rows, num_steps=num_steps)
        sum_us = times.core_us + (times.executor_us if whole else 0.0)
        execute = f"{times.executor_us:.1f}" if whole else "-"
        print(
            f"{num_rows:>6} {times.schedule_us:>12.1f} {execute:>11} {times.update_us:>10.1f} "
            f"{sum_us:>13.1f} {sum_us / num_rows:>7.2f}"
        )


def _with_fake(num_rows: int, num_steps: int) -> tuple[Any, Any]:
    """An executor without a model."""
    from quire.executor.fake import FakeExecutor

    scheduler = _scheduler(num_rows, num_steps)
    executor = FakeExecutor(
        num_blocks=scheduler.config.num_blocks, block_size=BLOCK_SIZE, max_num_seqs=num_rows, vocab_size=1000
    )
    return scheduler, executor


def with_runner(num_rows: int, num_steps: int) -> tuple[Any, Any]:
    """The runner and the sampler of this machine's processor."""
    from quire.compose.core import sampling_features
    from quire.executor.local import LocalExecutor
    from quire.ops.select import select_ops
    from quire.runner.model_runner import ModelRunner

    scheduler = _scheduler(num_rows, num_steps)
    config = scheduler.config
    ops, _ = select_ops("cpu", 1)
    runner = ModelRunner(
        cast(Any, _Hollow(ops)),
        ops,
        num_blocks=config.num_blocks,
        block_size=BLOCK_SIZE,
        max_rows=num_rows,
        max_model_len=config.max_model_len,
        features=sampling_features(ops),
    )
    return scheduler, LocalExecutor(runner)


def _scheduler(num_rows: int, num_steps: int) -> "Scheduler":
    """With `num_rows` requests that all fit, half of them greedy."""
    from quire.core.limits import SchedulerConfig
    from quire.core.policy import make_policy
    from quire.core.prefix_cache import PrefixCache
    from quire.core.request import NewRequest, SamplingSpec
    from quire.core.scheduler import Scheduler

    length = PROMPT_TOKENS + num_steps + 8
    config = SchedulerConfig(
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows * PROMPT_TOKENS,  # all prompts in the first step
        max_model_len=length,
        block_size=BLOCK_SIZE,
        num_blocks=num_rows * (length // BLOCK_SIZE + 1),
    )
    scheduler = Scheduler(config, make_policy("fcfs"), PrefixCache(bytes(32)))
    for number in range(num_rows):
        prompt = tuple((number * 31 + place) % VOCABULARY for place in range(PROMPT_TOKENS))
        sampling = SamplingSpec(temperature=float(number % 2), seed=number)
        scheduler.add(NewRequest(str(number), prompt, num_steps + 8, sampling))
    return scheduler


class _Hollow:
    """A model that only looks up its tokens. One native call, as every model on the CPU makes."""

    def __init__(self, ops: "Provider") -> None:
        import numpy as np

        self._ops = ops
        table = np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN), dtype=np.float32)
        packed = ops.pack_embedding(table, "float32")
        self._table = packed
        self._step = ops.compile(lambda trace, token_ids, batch, cache: trace.embed(token_ids, packed))

    def cache_shape(self, num_blocks: int, block_size: int) -> "CacheShape":
        """The smallest."""
        from quire.ops.types import CacheShape

        return CacheShape(1, num_blocks, block_size, 1, HIDDEN, "bfloat16")

    def forward(self, token_ids: "Array", batch: "AttentionBatch", cache: Any) -> "Array":
        """Nothing is written to the cache, and without attention all tokens go the whole way."""
        hidden = self._step(token_ids, replace(batch, outputs=None), cache)
        return hidden if batch.outputs is None else hidden[batch.outputs]

    def greedy(self, hidden: "Array") -> tuple["Array", "Array"]:
        """As `Model.greedy`."""
        return self._ops.greedy(hidden, self._table)

    def logits(self, hidden: "Array") -> "Array":
        """`[rows, VOCABULARY]`."""
        return self._ops.logits(hidden, self._table)
