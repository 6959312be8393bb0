"""Tables of rotary positions, computed as transformers does: float32 frequencies, float32 angles.

The precision is part of the model: at position 100,000 an angle from float64 frequencies differs from one
from float32 frequencies by some hundredths of a radian, and checkpoints were tested with the latter.
"""

import math

import numpy as np
from numpy.typing import NDArray

from quire.models.spec import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling

Float32Array = NDArray[np.float32]
_PIECE = 1024


def rope_tables(spec: RopeSpec, num_positions: int, max_positions: int) -> tuple[Float32Array, Float32Array]:
    """Cosines and sines of RoPE (arXiv 2104.09864) for positions `[0, num_positions)`.

    Args:
        max_positions: of the longest sequence; LongRoPE has a set of frequencies for short ones.

    Returns:
        `cos, sin`, float32 `[num_positions, rotary_dim / 2]`: of `position * theta^(-2 i / rotary_dim)`, scaled as
        `spec` says.
    """
    frequencies, attention_factor = _frequencies(spec, max_positions)
    tables = np.empty((2, num_positions, len(frequencies)), np.float32)
    # In pieces that begin at the same positions in every table: what is beside an angle cannot change its bits.
    for start in range(0, num_positions, _PIECE):
        angles = np.arange(start, start + _PIECE, dtype=np.float32)[:, None] * frequencies
        kept = slice(start, min(start + _PIECE, num_positions))
        for table, values in zip(tables, (np.cos(angles), np.sin(angles)), strict=True):
            table[kept] = values[: kept.stop - start]
    if attention_factor != 1.0:
        tables *= np.float32(attention_factor)
    return tables[0], tables[1]


def takes_long_factors(scaling: LongRopeScaling, max_positions: int) -> bool:
    """Whether sequences of up to `max_positions` have LongRoPE's long set of factors, all of them."""
    return max_positions > scaling.original_max_positions


def _frequencies(spec: RopeSpec, max_positions: int) -> tuple[Float32Array, float]:
    """The angle of position 1 `[rotary_dim / 2]` in radians, and the factor of cos and sin."""
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / np.float32(spec.rotary_dim)
    # The power in float64, rounded once: the same on every machine.
    wavelengths = np.power(spec.theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies: Float32Array = np.float32(1.0) / wavelengths
    match spec.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor):
            return (frequencies / np.float32(factor)).astype(np.float32), 1.0
        case Llama3Scaling():
            return _llama3(frequencies, spec.scaling), 1.0
        case YarnScaling():
            return _yarn(wavelengths, spec, spec.scaling), spec.scaling.attention_factor
        case LongRopeScaling() as scaling:
            is_long = takes_long_factors(scaling, max_positions)
            factors = scaling.long_factors if is_long else scaling.short_factors
            frequencies = np.float32(1.0) / (np.asarray(factors, np.float32) * wavelengths)
            return frequencies, scaling.attention_factor


def _llama3(frequencies: Float32Array, scaling: Llama3Scaling) -> Float32Array:
    turns = scaling.original_max_positions * frequencies / np.float32(2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(blend, 0.0, 1.0).astype(np.float32)
    blended: Float32Array = (1 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies
    return blended


def _yarn(wavelengths: Float32Array, spec: RopeSpec, scaling: YarnScaling) -> Float32Array:
    def dimension_that_turns(turns: float) -> float:
        return (
            spec.rotary_dim
            * math.log(scaling.original_max_positions / (turns * 2 * math.pi))
            / (2 * math.log(spec.theta))
        )

    low = dimension_that_turns(scaling.beta_fast)
    high = dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(spec.rotary_dim // 2, dtype=np.float32) - low) / (high - low)
    interpolated = np.clip(ramp, 0.0, 1.0).astype(np.float32)
    frequencies = np.float32(1.0) / wavelengths
    slowed = np.float32(1.0) / (np.float32(scaling.factor) * wavelengths)
    blended: Float32Array = slowed * interpolated + frequencies * (1 - interpolated)
    return blended
