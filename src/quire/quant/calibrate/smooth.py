"""Scales of input channels: what a channel's inputs are divided by, its weights are multiplied by (SmoothQuant, arXiv
2211.10438; for weights alone, AWQ, arXiv 2306.00978).

All are powers of two: multiplying by them is exact, so the float model stays the same to the last bit but for what
underflows.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

STRENGTHS = (0.25, 0.5, 0.75)
"""Alpha of SmoothQuant, tried in turn: how much of a channel's size goes from the inputs to the weights."""
LIMIT = 12
"""The largest power."""
HALF_LIMIT = 8
"""The same where scales of weights are float16: divided by more, they would lose bits."""
SMALLEST = 1e-12

Floats = NDArray[np.float32]


def channel_scales(inputs: Floats, weights: Floats, limit: int = LIMIT) -> Iterator[tuple[float, Floats]]:
    """Alpha and the scales `[channels]` of each candidate: `inputs^alpha / weights^(1 - alpha)`.

    Args:
        inputs: the largest magnitude of each channel's inputs, `[channels]`.
        weights: of the weights that read it.
        limit: the largest power of two.
    """
    alive = (inputs > SMALLEST) & (weights > SMALLEST)
    if not alive.any():
        return
    x, w = (np.log2(np.where(alive, one, 1).astype(np.float64)) for one in (inputs, weights))
    for alpha in STRENGTHS:
        powers = alpha * x - (1 - alpha) * w
        centre = np.median(powers[alive])
        powers = np.where(alive, np.clip(np.rint(powers - centre), -limit, limit), 0)
        if powers.any():
            yield alpha, np.exp2(powers).astype(np.float32)
