"""The factor of a Hessian, in an order of sums that no number of threads changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Gemm = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
"""`gemm(x [rows, n], w [out, n]) -> x w^T`, float32, the same bits for any number of threads."""
BLOCK = 64


def upper_factor(hessian: NDArray[np.float64], gemm: Gemm) -> NDArray[np.float64]:
    """U `[n, n]`, upper triangular, with `U U^T = hessian [n, n]`: Cholesky's factor from the last row to the first.

    Raises:
        ValueError: the matrix is not positive definite.
    """
    flipped = np.ascontiguousarray(hessian[::-1, ::-1])
    n = len(flipped)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        for k in range(first, last):
            pivot = flipped[k, k]
            if not pivot > 0:
                raise ValueError("the Hessian of its inputs is not positive definite")
            flipped[k:, k] /= np.sqrt(pivot)
            column = flipped[k + 1 :, k]
            flipped[k + 1 :, k + 1 : last] -= column[:, None] * column[None, : last - k - 1]
        if last < n:
            panel = np.ascontiguousarray(flipped[last:, first:last], np.float32)
            flipped[last:, last:] -= gemm(panel, panel)
    return np.tril(flipped)[::-1, ::-1]
