"""Rows of known logits for the tests of the sampler, on every provider that this machine has."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from quire.compose.core import sampling_features
from quire.core.plan import NewRow
from quire.core.request import SamplingSpec
from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.types import Ops
from quire.sampling.sampler import Sampler

PROVIDERS: dict[str, Callable[[], Ops]] = {
    "native": lambda: CpuOps(1, "baseline"),
    "numpy": lambda: ReferenceOps(np),
    "torch": lambda: ReferenceOps(torch),
}


def full_sampler(ops: Ops, max_rows: int) -> Sampler:
    """With the features of an engine."""
    return Sampler(ops, max_rows, sampling_features(ops))


def new_row(row: int, prompt: Sequence[int], spec: SamplingSpec, generated: Sequence[int] = ()) -> NewRow:
    """A request takes `row`; `generated` when it comes back after preemption."""
    return NewRow(row, f"r{row}", (*prompt, *generated), len(prompt), spec, ())


def normal_logits(seed: int, rows: int, vocabulary: int) -> Any:
    """float32 `[rows, vocabulary]`, positive and negative."""
    return 3 * np.random.default_rng(seed).standard_normal((rows, vocabulary), np.float32)
