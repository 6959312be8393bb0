from typing import Any

import numpy as np
from numpy.typing import NDArray


def quantize(weight: NDArray[np.float32], bits: int, group_size: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    most = 127 if bits == 8 else 7
    groups = weight.reshape(weight.shape[0], -1, group_size)
    scales = (np.abs(groups).max(axis=2) / most).astype(np.float32)
    divisors = np.where(scales == 0, 1, scales)
    values = np.clip(np.round(groups / divisors[:, :, None]), -most, most).astype(np.int8)
    return values.reshape(weight.shape), scales


def dequantize(values: NDArray[Any], scales: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    return values.astype(np.float32) * np.repeat(scales, group_size, axis=1)
