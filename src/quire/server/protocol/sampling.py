"""From taken fields to `SamplingParams`, and the fields that both routes share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.server.protocol.fields import SAMPLING, flag

FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that the model's own generation settings fill when the request leaves them out, as in vLLM."""
MAX_SALT_BYTES = 256
MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Delivery:
    """How an answer is sent, and what travels beside the sampling parameters."""

    model: str | None
    stream: bool
    include_usage: bool
    priority: int
    cache_salt: str


def take_delivery(taken: dict[str, Any]) -> Delivery:
    """Take the shared fields out of `taken`.

    Raises:
        InvalidRequestError: one of them is of a wrong type or out of range.
    """
    model = taken.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise InvalidRequestError("model must be a string", param="model")
    stream = flag(taken, "stream", False)
    priority = taken.pop("priority", 0)
    if type(priority) is not int or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequestError("priority must be a whole number of 32 bits", param="priority")
    salt = taken.pop("cache_salt", "")
    if not isinstance(salt, str) or len(salt.encode()) > MAX_SALT_BYTES:
        raise InvalidRequestError(f"cache_salt must be a string of at most {MAX_SALT_BYTES} bytes", param="cache_salt")
    return Delivery(model, stream, _include_usage(taken, stream), priority, salt)


def _include_usage(taken: dict[str, Any], stream: bool) -> bool:
    options = taken.pop("stream_options", None)
    if options is None:
        return False
    if not stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    if not isinstance(options, dict):
        raise InvalidRequestError("stream_options must be an object", param="stream_options")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation", "continuous_usage_stats"):
            raise InvalidRequestError(
                f"unknown field 'stream_options.{name[:64]}'; known is include_usage", param="stream_options"
            )
        if value is not None and type(value) is not bool:
            raise InvalidRequestError(f"stream_options.{name} must be true or false", param="stream_options")
        if name != "include_usage" and value:
            raise InvalidRequestError(f"stream_options.{name} is not supported", param="stream_options")
    return options.get("include_usage") is True


def make_params(
    taken: dict[str, Any], defaults: SamplingParams, *, stream: bool, overrides: Mapping[str, Any]
) -> SamplingParams:
    """The one constructor's input from what a body held.

    Args:
        taken: honoured fields by canonical name.
        defaults: the model's own settings.
        stream: decides whether outputs are deltas or one final.
        overrides: values that the route decided itself (`logprobs`, `max_tokens` ...).

    Raises:
        InvalidRequestError: a value out of range, naming its field.
    """
    values = {name: value for name, value in taken.items() if name in SAMPLING}
    for name in FROM_MODEL:
        values.setdefault(name, getattr(defaults, name))
    if "logit_bias" in values:
        values["logit_bias"] = _int_keys(values["logit_bias"])
    if stream and values.get("prompt_logprobs") is not None:
        raise InvalidRequestError("prompt_logprobs needs stream: false", param="prompt_logprobs")
    values.update(overrides)
    values["output_kind"] = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams.from_mapping(values)


def _int_keys(bias: Any) -> Any:
    """JSON has only string keys; `SamplingParams` wants token ids."""
    if not isinstance(bias, dict):
        return bias
    converted: dict[int, Any] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequestError(
                "logit_bias must map token ids (whole numbers in quotes) to numbers", param="logit_bias"
            )
        if int(key) in converted:
            raise InvalidRequestError(f"logit_bias names token {int(key)} twice", param="logit_bias")
        converted[int(key)] = value
    return converted
