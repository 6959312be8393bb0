"""What this machine's own kernels do, measured, and the time of a step that follows from it.

A roofline says what is possible. These are the rates that the kernels reach here, by format and number of rows, with
their weights in the processor's cache; a step takes for each weight the longer of that and of reading it from memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from quire.ops.types import QuantizedFormat, WeightDtype
from quire.plan.devices import PlannedDevice
from quire.plan.estimate import ModelCost

Points = tuple[tuple[int, float], ...]
"""A rate at numbers of rows, or of bytes, in ascending order."""
CALLS_PER_LAYER = 7
"""Two norms, four GEMMs (of q, k and v; of o; of gate and up; of down) and attention."""
FLOATS: tuple[WeightDtype, ...] = ("bfloat16", "float16", "float32")
QUANTIZED: tuple[QuantizedFormat, ...] = ("int8", "int8_w8a8", "int4", "int4_min")
FORMATS = (*FLOATS, *QUANTIZED)


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Constants of one machine. Plain values: `plan.rates_file` writes and reads them."""

    read: Points
    """Bytes a second, by the bytes that are read over and over."""
    units: Mapping[str, float]
    """Operations a second of each unit, as in `PlannedDevice`."""
    linear: Mapping[str, Points]
    """Operations a second of a GEMM, by the weight's format, then by rows."""
    decode_key_s: float
    """Of one key, and its value, of one head, for each of its numbers, in a step of single tokens."""
    prompt_key_s: float
    """The same in a prompt."""
    call_s: float
    """The least that an operation takes, whatever its size."""
    cold_s: float
    """What a GEMM takes beyond the reading of its weight from memory."""
    step_s: float
    """Of a step's planning, gathering and sampling."""
    row_s: float
    """The same, for each row."""
    memory_bytes: int

    def device(self) -> PlannedDevice:
        """For floors."""
        return PlannedDevice("this machine", self.memory_bytes, self.read[-1][1], self.units)

    def decode_s(self, cost: ModelCost, batch: int, context: int) -> float:
        """A step in which `batch` sequences of `context` tokens get one each."""
        return self._step_s(cost, batch, batch, batch * cost.keys_seen(context), batch, self.decode_key_s)

    def prefill_s(self, cost: ModelCost, prompt: int, chunk: int) -> float:
        """A prompt alone, so many tokens a step."""
        total_s = 0.0
        for first in range(0, prompt, chunk):
            tokens = min(chunk, prompt - first)
            keys = cost.keys_seen_in_prompt(first + tokens) - cost.keys_seen_in_prompt(first)
            total_s += self._step_s(cost, tokens, 1, keys, 1, self.prompt_key_s)
        return total_s

    def _step_s(self, cost: ModelCost, tokens: int, sampled: int, keys: int, rows: int, key_s: float) -> float:
        spec = cost.spec
        kv_bytes = cost.kv_bytes_per_token // spec.num_layers * keys
        read_rate = _at(self.read, cost.read_bytes + kv_bytes)
        linear_s = 0.0
        for one in cost.matrices():
            count = sampled if one.is_head else tokens
            operations_s = 2 * one.weights * count / _at(self.linear[rate_format(one.format)], count)
            linear_s += max(one.num_bytes / read_rate + self.cold_s, operations_s)
        heads = spec.num_heads * spec.head_dim
        # A prompt's tokens share the keys that they read.
        attention_s = max(key_s * heads * keys, kv_bytes / read_rate if rows == tokens else 0.0)
        calls_s = self.call_s * (CALLS_PER_LAYER * spec.num_layers + 3)
        return linear_s + attention_s + calls_s + self.step_s + self.row_s * rows


def _at(points: Points, place: float) -> float:
    """Between two points in proportion; beyond them the nearest."""
    if place <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return points[-1][1]


def rate_format(name: str) -> str:
    """Whose measured rates a format takes: its own, or those of the one with as many bits."""
    return name if name in FORMATS else "int4" if name.startswith("int4") else "int8"
