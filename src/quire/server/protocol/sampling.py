"""From taken fields to `SamplingParams`, and the fields that both routes share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.engine.inputs import MAX_PRIORITY, MAX_SALT_BYTES
from quire.errors import InvalidRequestError, unknown_name_message
from quire.sampling_params import Range, RequestOutputKind, SamplingParams
from quire.server.limits import MAX_TIMEOUT_SECONDS
from quire.server.protocol.fields import SAMPLING, flag

FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that the model's own generation settings fill when the request leaves them out, as in vLLM."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""A client's name for its request stands in headers, logs and paths."""
STREAM_INTERVAL = Range(1, 2**31 - 1, is_whole=True)


@dataclass(frozen=True, slots=True)
class Truncation:
    """How much of a prompt is kept, and at which end."""

    num_tokens: int | None
    """None: as many as leave room for the answer."""
    keeps_end: bool


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How an answer is sent, and what travels beside the sampling parameters."""

    model: str | None
    stream: bool
    include_usage: bool
    """A last event of a stream with the usage."""
    continuous_usage: bool
    """Every event of a stream tells the usage so far."""
    stream_interval: int
    """Tokens of a sequence that one event of a stream holds."""
    priority: int
    cache_salt: str
    timeout_s: float | None
    """Seconds from the request's arrival to the end of its answer."""
    truncation: Truncation | None
    return_token_ids: bool
    request_id: str | None
    """The client's own name for the request."""
    tokens_as_token_ids: bool
    """Logprobs name tokens `token_id:N`, which is exact where texts of tokens are not."""
    asked_max_tokens: int | None
    """What the client itself asked for: it must fit, where a default may be cut short."""


def take_options(taken: dict[str, Any]) -> ResponseOptions:
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
        raise InvalidRequestError(f"priority must be a whole number within {MAX_PRIORITY}", param="priority")
    salt = taken.pop("cache_salt", "")
    if not isinstance(salt, str) or len(salt.encode()) > MAX_SALT_BYTES:
        raise InvalidRequestError(f"cache_salt must be a string of at most {MAX_SALT_BYTES} bytes", param="cache_salt")
    options = _stream_options(taken, stream)
    asked = taken.get("max_tokens")
    return ResponseOptions(
        model=model,
        stream=stream,
        include_usage=options.get("include_usage") is True,
        continuous_usage=options.get("continuous_usage_stats") is True,
        stream_interval=STREAM_INTERVAL.check("stream_interval", taken.pop("stream_interval", 1)),
        priority=priority,
        cache_salt=salt,
        timeout_s=check_timeout(taken.pop("timeout")) if "timeout" in taken else None,
        truncation=_truncation(taken),
        return_token_ids=flag(taken, "return_token_ids", False),
        request_id=_request_id(taken),
        tokens_as_token_ids=flag(taken, "return_tokens_as_token_ids", False),
        asked_max_tokens=asked if type(asked) is int else None,
    )


def _request_id(taken: dict[str, Any]) -> str | None:
    value: Any = taken.pop("request_id", None)
    if value is not None and not (isinstance(value, str) and REQUEST_ID.fullmatch(value)):
        raise InvalidRequestError("request_id must be 1 to 64 letters, digits and any of . _ : -", param="request_id")
    named: str | None = value
    return named


def check_timeout(value: Any) -> float:
    """Seconds.

    Raises:
        InvalidRequestError: no number of seconds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TIMEOUT_SECONDS:
        raise InvalidRequestError(f"timeout must be in (0, {MAX_TIMEOUT_SECONDS}] seconds", param="timeout")
    return float(value)


def _truncation(taken: dict[str, Any]) -> Truncation | None:
    """`truncate_prompt_tokens`, whose -1 is vLLM's word for what fits, and `truncation_side`."""
    num_tokens, side = taken.pop("truncate_prompt_tokens", None), taken.pop("truncation_side", None)
    if side not in (None, "left", "right"):
        raise InvalidRequestError("truncation_side must be left or right", param="truncation_side")
    if num_tokens is None:
        if side is not None:
            raise InvalidRequestError("truncation_side needs truncate_prompt_tokens", param="truncation_side")
        return None
    if type(num_tokens) is not int or not (num_tokens == -1 or 1 <= num_tokens < 2**31):
        raise InvalidRequestError(
            "truncate_prompt_tokens must be a whole number above 0, or -1 for what fits", param="truncate_prompt_tokens"
        )
    return Truncation(None if num_tokens == -1 else num_tokens, keeps_end=side != "right")


def _stream_options(taken: dict[str, Any], stream: bool) -> dict[str, Any]:
    options = taken.pop("stream_options", None)
    if options is None:
        return {}
    if not stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    if not isinstance(options, dict):
        raise InvalidRequestError("stream_options must be an object", param="stream_options")
    known = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    for name, value in options.items():
        if name not in known:
            raise InvalidRequestError(unknown_name_message("stream option", name[:64], known), param="stream_options")
        if value is not None and type(value) is not bool:
            raise InvalidRequestError(f"stream_options.{name} must be true or false", param="stream_options")
        if name == "include_obfuscation" and value:
            raise InvalidRequestError(f"stream_options.{name} is not supported", param="stream_options")
    return options


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
