"""Reading a Hugging Face `config.json` strictly: types and ranges are checked, and what changes the result is
read by the family or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from quire.errors import ModelFileError, UnsupportedModelError
from quire.ops.types import Activation

_T = TypeVar("_T")

LARGEST = 2**24
"""Of all sizes and lengths."""
_FULL = "full_attention"
_SLIDING = "sliding_attention"

_ACTIVATIONS: dict[str, Activation] = {name: name for name in get_args(Activation)} | {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "compression_config": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("absolute", "rope"),
    "qk_layernorm": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_local_base_freq": (),
    "rope_parameters": ({},),
    "rope_scaling": ({},),
    "scale_attn_by_inverse_layer_idx": (False,),
    "sliding_window": (),
    "use_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Keys that change the result of some model, with the values (besides null) that change nothing. A family
that does not read one of them has no such feature."""


class ConfigReader:
    """One config, or one of its nested objects. null is the same as absent, but for `if_absent`.

    Every method raises ModelFileError, which names the key, where a value has a wrong type or is out of range, or where
    a key without a default is missing.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "", file: str = "config.json") -> None:
        self._values = values
        self._where = where
        self._file = file
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """True if the key is there and not null."""
        return self._value(name) is not None

    def integer(self, name: str, default: int | None = None, *, at_least: int = 1, at_most: int = LARGEST) -> int:
        """A whole number in a range; required if there is no default."""
        value = self.optional_integer(name, at_least=at_least, at_most=at_most)
        return self._required(name, default) if value is None else value

    def optional_integer(
        self, name: str, *, if_absent: int | None = None, at_least: int = 1, at_most: int = LARGEST
    ) -> int | None:
        """A whole number, or None."""
        value = self._value(name, if_absent)
        if value is None:
            return None
        if type(value) is not int or not at_least <= value <= at_most:
            raise self._wrong(name, f"a whole number from {at_least} to {at_most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number from 1e-30 to 1e30; required if there is no default."""
        value = self.optional_number(name)
        return self._required(name, default) if value is None else value

    def optional_number(self, name: str, *, if_absent: float | None = None) -> float | None:
        """A number from 1e-30 to 1e30, or None: within it no power or quotient of two leaves float64."""
        value = self._value(name, if_absent)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
            raise self._wrong(name, "a number from 1e-30 to 1e30")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        value = self._value(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return default if value is None else value

    def text(self, name: str, default: str) -> str:
        """A field that is a string."""
        value = self._value(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string")
        return default if value is None else value

    def activation(self, name: str, default: str) -> Activation:
        """An activation under transformers' name for it. Raises UnsupportedModelError for another."""
        value = self.text(name, default)
        if value not in _ACTIVATIONS:
            raise self.unsupported(name, f"known are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers from 1e-30 to 1e30."""
        value = self._value(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list of numbers")
        inner = ConfigReader({str(i): item for i, item in enumerate(value)}, f"{self._where}{name}.", self._file)
        return tuple(inner.number(str(i)) for i in range(len(value)))

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, or None."""
        value = self._value(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of strings")
        return tuple(value)

    def sizes(self, name: str, count: int = 2) -> tuple[int, ...] | None:
        """A list of `count` whole numbers from 1 on, or None."""
        value = self._value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or any(not _is_size(item) for item in value):
            raise self._wrong(name, f"a list of {count} whole numbers from 1 to {LARGEST}")
        return tuple(value)

    def flags(self, name: str, count: int) -> tuple[bool, ...] | None:
        """A list of `count` zeros and ones, or None."""
        value = self._value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or any(item not in (0, 1) for item in value):
            raise self._wrong(name, f"a list of {count} zeros and ones")
        return tuple(bool(item) for item in value)

    def nested(self, name: str) -> "ConfigReader | None":
        """An object inside this one, or None; an empty one says nothing."""
        value = self._value(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return ConfigReader(value, f"{self._where}{name}.", self._file) if value else None

    def over(self, other: "ConfigReader") -> "ConfigReader":
        """The keys of both; where both have one, this one's."""
        return ConfigReader({**other._values, **self._values}, self._where, self._file)

    def windows(self, num_layers: int, window: int | None, default_is_sliding: Sequence[bool]) -> list[int | None]:
        """The window of each layer: `layer_types` if it is there, else by the family's default pattern."""
        types = self._value("layer_types")
        if types is None:
            is_sliding = list(default_is_sliding)
        elif not isinstance(types, list) or len(types) != num_layers:
            raise self._wrong("layer_types", f"a list of {num_layers} strings")
        else:
            if any(kind not in (_FULL, _SLIDING) for kind in types):
                raise self.unsupported("layer_types", f"known are {_FULL} and {_SLIDING}")
            is_sliding = [kind == _SLIDING for kind in types]
        if window is None and any(is_sliding):
            stated = (f"{name} = {_short(self._values.get(name))}" for name in ("sliding_window", "use_sliding_window"))
            raise self.unsupported("layer_types", f"its sliding layers have no window ({', '.join(stated)})")
        return [window if sliding else None for sliding in is_sliding]

    def refuse_unread(self) -> None:
        """Raises UnsupportedModelError for a key that would change the result and that the family did not read."""
        for name, neutral in _NEUTRAL.items():
            value = self._values.get(name)
            if name in self._read or value is None or value in neutral:
                continue
            if name == "layer_types" and isinstance(value, list) and all(kind == _FULL for kind in value):
                continue
            raise self.unsupported(name, "this family has no such feature")

    def refuse_keys_outside(self, known: frozenset[str]) -> None:
        """Raises UnsupportedModelError for a key that is not among `known`."""
        for name in self._values:
            if name not in known:
                raise self.unsupported(name, "the key is not known")

    def unsupported(self, name: str, why: str) -> UnsupportedModelError:
        """The error that names a key and its value."""
        return UnsupportedModelError(
            f"{self._file}: {self._where}{name} = {_short(self._values.get(name))} is not supported: {why}"
        )

    def _value(self, name: str, if_absent: Any = None) -> Any:
        self._read.add(name)
        return self._values.get(name, if_absent)

    def _required(self, name: str, default: _T | None) -> _T:
        if default is None:
            raise ModelFileError(f"{self._file} has no {self._where}{name}")
        return default

    def _wrong(self, name: str, wanted: str) -> ModelFileError:
        value = _short(self._values.get(name))
        return ModelFileError(f"{self._file}: {self._where}{name} must be {wanted}, got {value}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _short(value: Any) -> str:
    """A value of a config for an error text: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
