"""The body of POST /v1/completions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.server.limits import Limits
from quire.server.protocol.fields import COMPLETIONS, flag, take
from quire.server.protocol.sampling import ResponseOptions, make_params, take_options

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """One parsed request: every prompt is drawn with the same parameters."""

    prompts: list[Prompt]
    params: SamplingParams
    options: ResponseOptions
    logprobs: int | None
    echo: bool
    add_special_tokens: bool
    prompt_only: bool
    """`max_tokens: 0` with `echo`: the prompt is scored and nothing is shown of the token after it."""
    wants_prompt_logprobs: bool


def parse_completion(body: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> CompletionCall:
    """Check everything that can be checked without the model.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    taken = take(body, COMPLETIONS, limits)
    options = take_options(taken)
    prompts = _prompts(taken.pop("prompt", None), limits)
    echo = flag(taken, "echo", False)
    add_special_tokens = flag(taken, "add_special_tokens", True)
    logprobs = taken.pop("logprobs", None)
    if isinstance(logprobs, bool):
        raise InvalidRequestError("logprobs must be a whole number here, got a boolean", param="logprobs")
    overrides: dict[str, Any] = {"logprobs": logprobs}
    prompt_only = echo and taken.get("max_tokens") == 0 and type(taken["max_tokens"]) is int
    if prompt_only:
        overrides["max_tokens"] = 1
    wants_prompt_logprobs = "prompt_logprobs" in taken
    if echo and type(logprobs) is int:
        asked = taken.get("prompt_logprobs", 0)
        overrides["prompt_logprobs"] = max(logprobs, asked) if type(asked) is int else asked
    params = make_params(taken, defaults, stream=options.stream, overrides=overrides)
    if len(prompts) * params.n > limits.sequences.value:
        raise limits.sequences.error(f"{len(prompts)} x {params.n}")
    return CompletionCall(
        prompts, params, options, logprobs, echo, add_special_tokens, prompt_only, wants_prompt_logprobs
    )


def _prompts(value: Any, limits: Limits) -> list[Prompt]:
    """A string, a list of strings, token ids, or a list of token-id lists."""
    if value is None:
        raise InvalidRequestError("prompt is required", param="prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _bad_prompt()
    if all(type(item) is int for item in value):
        return [value]
    if len(value) > limits.prompts.value:
        raise limits.prompts.error(f"{len(value):,}")
    for item in value:
        is_ids = isinstance(item, list) and item and all(type(token) is int for token in item)
        if not isinstance(item, str) and not is_ids:
            raise _bad_prompt()
    return value


def _bad_prompt() -> InvalidRequestError:
    return InvalidRequestError(
        "prompt must be a string, a list of strings, a list of token ids or a list of token-id lists, not empty",
        param="prompt",
    )
