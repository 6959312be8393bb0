"""What one step of a model reads and computes, and the least time that it can take (a roofline).

A step reads every weight once, whatever the number of its tokens, and the keys and values of every sequence: so
decoding is bound by memory until a batch is large, and a prompt by arithmetic. An operation is a multiplication or an
addition.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quire.models.parameters import Parameter
from quire.models.spec import DecoderSpec
from quire.ops.types import CacheDtype, CacheShape, QuantSpec
from quire.plan.devices import PlannedDevice
from quire.weights.pack import WeightPacker

UNITS = {
    None: ("bfloat16", "float32"),
    "int8_w8a8": ("int8", "bfloat16", "float32"),
    "int4_w4a8": ("int8", "bfloat16", "float32"),
    "int8": ("int8 twice", "bfloat16", "float32"),
    "int4": ("int8 twice", "bfloat16", "float32"),
    "fp8_groups": ("float32", "bfloat16"),
    "fp8": ("fp8", "bfloat16", "float32"),
}
"""By the format of most weights (the first that its name begins with; None: no quantised one): the unit that
multiplies, the best first; a device takes the first that it has."""
MOST_ROWS = 4096
"""The largest batch of which it is said whether arithmetic binds there."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of a step, in seconds."""

    bandwidth_s: float
    arithmetic_s: float

    @property
    def seconds(self) -> float:
        """What binds."""
        return max(self.bandwidth_s, self.arithmetic_s)

    @property
    def binds(self) -> str:
        """`memory` or `arithmetic`."""
        return "memory" if self.bandwidth_s >= self.arithmetic_s else "arithmetic"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that tokens are multiplied with."""

    weights: int
    num_bytes: int
    format: str
    """A dtype, or a quantised format."""
    is_head: bool
    """Only sampled tokens are multiplied with it."""


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model's sizes: of the architecture with these parameters, as they would be packed."""

    spec: DecoderSpec
    parameters: Mapping[str, Parameter]
    packer: WeightPacker
    given: Mapping[str, QuantSpec | None] | None = None
    """What the files hold each parameter as, where their headers say it; None: as the packer would have it."""
    kv_cache_dtype: CacheDtype | None = None
    """Of keys and values; None is the type of weights that are not quantised."""

    @property
    def num_parameters(self) -> int:
        """All of them; a tied head counts once."""
        return sum(one.size for one in self.parameters.values())

    @property
    def num_multiplied(self) -> int:
        """Those that every token is multiplied with: the linear layers and the head."""
        linear = sum(_matrix(one) for one in self.parameters.values() if one.kind in ("linear", "gated_linear"))
        return linear + self.spec.vocab_size * self.spec.hidden_size

    @property
    def weight_bytes(self) -> int:
        """All weights as they lie in memory, padding not counted."""
        return sum(map(self.num_bytes, self.parameters))

    def num_bytes(self, name: str) -> int:
        """A parameter as it lies in memory."""
        return self.packer.num_bytes(self.parameters[name], None if self.given is None else self.given[name])

    def matrices(self) -> Iterator[Matrix]:
        """All linear layers, and the head, which may be the embedding."""
        for name, one in self.parameters.items():
            is_head = name == "head" or (name == "embedding" and self.spec.tied_head)
            if is_head or one.kind in ("linear", "gated_linear"):
                rows, inputs = one.weight.shape
                given = self.packer.quant(one, None if self.given is None else self.given[name])
                yield Matrix(rows * inputs, self.num_bytes(name), given.format if given else self.packer.dtype, is_head)

    @property
    def read_bytes(self) -> int:
        """What a step reads of them: of an embedding that is no head only the rows of its tokens."""
        tables = sum(self.num_bytes(name) for name in self.parameters if name in ("embedding", "positions"))
        head = self.num_bytes("embedding") if self.spec.tied_head else 0
        return self.weight_bytes - tables + head

    @property
    def cache(self) -> CacheShape:
        """That of one token."""
        spec, dtype = self.spec, self.kv_cache_dtype or self.packer.dtype
        return CacheShape(spec.num_layers, 1, 1, spec.num_kv_heads, spec.head_dim, dtype)

    @property
    def kv_bytes_per_token(self) -> int:
        """A key and a value in each layer."""
        return self.cache.bytes_per_block

    @property
    def kv_formula(self) -> str:
        """How that comes about."""
        cache = self.cache
        formula = f"2 x {cache.num_layers} layers x {cache.num_kv_heads} heads x"
        if cache.scale_bytes:
            return f"{formula} ({cache.head_dim} x {cache.item_bytes} + {cache.scale_bytes}) bytes, a scale with each"
        return f"{formula} {cache.head_dim} x {cache.item_bytes} bytes"

    def operations(self, num_tokens: int, keys: int, num_sampled: int) -> int:
        """Of a step.

        Args:
            num_tokens: computed in it, of all sequences.
            keys: that they see, of all tokens and layers together.
            num_sampled: tokens whose logits are computed.
        """
        spec = self.spec
        head = spec.vocab_size * spec.hidden_size
        attention = 4 * spec.num_heads * spec.head_dim * keys
        return num_tokens * 2 * (self.num_multiplied - head) + attention + num_sampled * 2 * head

    def decode(self, device: PlannedDevice, batch: int, context: int) -> Floor:
        """A step in which `batch` sequences of `context` tokens get one each."""
        read = self.read_bytes + batch * self._kv_read(context)
        return self._floor(device, read, self.operations(batch, batch * self.keys_seen(context), batch))

    def prefill(self, device: PlannedDevice, prompt: int) -> Floor:
        """A prompt of so many tokens, alone, in one step."""
        operations = self.operations(prompt, self.keys_seen_in_prompt(prompt), 1)
        return self._floor(device, self.read_bytes + prompt * self.kv_bytes_per_token, operations)

    def turning_batch(self, device: PlannedDevice, context: int) -> int | None:
        """The smallest batch at which arithmetic binds; None where the cache's reads grow as fast as it does."""
        low, high = 1, MOST_ROWS
        if self.decode(device, high, context).binds == "memory":
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if self.decode(device, middle, context).binds == "arithmetic" else (middle + 1, high)
            )
        return low

    def unit(self, device: PlannedDevice) -> str:
        """What multiplies on that device."""
        layers = [one for one in self.matrices() if not one.is_head] or list(self.matrices())
        most = max(layers, key=lambda one: one.num_bytes).format
        units = next(
            (units for name, units in UNITS.items() if name is not None and most.startswith(name)), UNITS[None]
        )
        return next(unit for unit in units if unit in device.operations_per_s)

    def _kv_read(self, context: int) -> int:
        return self.kv_bytes_per_token // self.spec.num_layers * self.keys_seen(context)

    def keys_seen(self, context: int) -> int:
        """By a token behind so many less one, of all layers together."""
        return sum(min(context, layer.window or context) for layer in self.spec.layers)

    def keys_seen_in_prompt(self, prompt: int) -> int:
        """By all tokens of a prompt, of all layers together: one, two, ... up to the window of each layer."""

        def of_layer(window: int) -> int:
            return window * (window + 1) // 2 + (prompt - window) * window

        return sum(of_layer(min(prompt, layer.window or prompt)) for layer in self.spec.layers)

    def _floor(self, device: PlannedDevice, read_bytes: int, operations: int) -> Floor:
        rate = device.operations_per_s[self.unit(device)]
        return Floor(read_bytes / device.read_bytes_per_s, operations / rate)


def _matrix(parameter: Parameter) -> int:
    rows, inputs = parameter.weight.shape
    return rows * inputs
