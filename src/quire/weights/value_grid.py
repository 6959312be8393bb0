"""Whether weights had been rounded to a few bits before: asked of their values, not of names."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.ops.types import QuantizedWeight
from quire.weights.load import WeightPlan

GROUP = 32
LEVELS = 16
MATRICES, ROWS = 8, 256
"""Looked at: so many matrices, from the first layer to the last, and so many rows of each."""


def grid_of(plan: WeightPlan) -> str | None:
    """The grid that a model's linear layers lie on: `Q4_1` (in each 32 weights of a row a minimum and 15 equal steps,
    up to rounding in bfloat16), `4-bit` (in each 32 at most 16 values); None where some take more values, or where
    their values cannot be read.

    Raises:
        ModelFileError: a file is damaged.
    """
    linear = [one for one in plan.parameters.items() if one[1].kind in ("linear", "gated_linear")]
    chosen = linear[:: -(-len(linear) // MATRICES)]
    found = set[str | None]()
    for name, parameter in chosen:
        if plan.source.packed(name) is not None or None in found:
            return None
        matrix = plan.source.matrix(parameter.weight)
        if isinstance(matrix, QuantizedWeight):
            return None
        found.add(grid_of_values(np.asarray(matrix)[:ROWS]))
    return None if None in found or not found else "Q4_1" if found == {"Q4_1"} else "4-bit"


def grid_of_values(rows: NDArray[Any]) -> str | None:
    """The same of one matrix `[rows, inputs]`."""
    if rows.shape[1] % GROUP:
        return None
    groups = np.sort(rows.astype(np.float32).reshape(-1, GROUP), axis=1)
    if ((np.diff(groups, axis=1) != 0).sum(axis=1) >= LEVELS).any():
        return None
    low, high = groups[:, :1], groups[:, -1:]
    step = (high - low) / (LEVELS - 1)
    places = np.divide(groups - low, step, out=np.zeros_like(groups), where=step > 0)
    # Each value and both ends are off by half a unit in the last place of bfloat16, at most.
    allowed = 2.0**-7 * np.maximum(np.abs(low), np.abs(high))
    return "Q4_1" if (np.abs(places - np.rint(places)) * step <= allowed).all() else "4-bit"
