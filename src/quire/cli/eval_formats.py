"""From the words of `--quantization` to the engine arguments of each format."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from quire.config import DTYPES, QUANTIZATIONS, EngineArgs
from quire.errors import ConfigurationError, unknown_name_message

AS_IT_IS = "none"
STORED = tuple(name for name in DTYPES if name != "auto")
FURTHER = "dtype kv_cache_dtype quantization_group_size block_size batch_invariant".split()
"""Engine arguments on which what a model says, or its speed, may depend."""


def format_values(text: str) -> Mapping[str, Any]:
    """The engine arguments of `none`, `float16`, `int8`, `int4:32`, `int4,dtype=float16` and the like: the model as it
    is stored, a type, or a quantisation with the size of its groups; then engine arguments of `FURTHER`.

    Raises:
        ConfigurationError: an unknown word, with those that are known.
    """
    head, *further = text.split(",")
    word, _, group = head.partition(":")
    if word in QUANTIZATIONS:
        values: dict[str, Any] = {"quantization": word} | ({"quantization_group_size": _plain(group)} if group else {})
    elif not group and word in STORED:
        values = {"dtype": word}
    elif not group and word == AS_IT_IS:
        values = {}
    else:
        known = ", ".join((AS_IT_IS, *STORED, *QUANTIZATIONS))
        raise ConfigurationError(f"quantization has no {text[:60]!r}: {known} (int4:32 has groups of 32)", field=_FIELD)
    known_names = [item.name for item in fields(EngineArgs) if item.name in FURTHER]
    for item in further:
        name, equals, value = item.partition("=")
        if not equals or name not in known_names:
            text = unknown_name_message("argument of a format", name[:60], known_names)
            raise ConfigurationError(f"{text}; known are {', '.join(known_names)}", field=_FIELD)
        values[name] = _plain(value)
    return values


_FIELD = "quantization"


def _plain(text: str) -> Any:
    """A value as the engine takes it: a number, true or false, or text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
