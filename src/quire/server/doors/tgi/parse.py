"""From TGI's bodies to checked calls."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.server.doors.tgi.bodies import GENERATE, MAX_SEED, PARAMETERS, GenerateBody, Grammar, Parameters
from quire.server.http.limits import Limits
from quire.structured_params import StructuredOutputsParams

_TGI_NAMES = {
    "max_tokens": "max_new_tokens",
    "n": "best_of",
    "logprobs": "top_n_tokens",
    "structured_outputs": "grammar",
}
"""Of `SamplingParams` -> what TGI calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One parsed request."""

    inputs: str
    params: SamplingParams
    """Their `max_tokens` counts only where `asks_length`."""
    asks_length: bool
    stream: bool
    shows_prompt: bool
    details: bool
    prompt_details: bool
    top_n_tokens: int
    truncate: int | None
    is_sampled: bool
    """False: the best token is taken, and there is no seed to tell."""

    def seed_of(self, index: int) -> int | None:
        """The seed of one of its sequences."""
        if not self.is_sampled or self.params.seed is None:
            return None
        return (self.params.seed + index) % 2**64


def parse_generate(raw: Mapping[str, Any], limits: Limits, *, stream: bool | None, shows_prompt: bool) -> GenerateCall:
    """Check everything that can be checked without the model.

    Args:
        stream: what the route says of it; None: the body does.
        shows_prompt: whether the answer has the prompt before it where the body does not say.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    body = GENERATE.read(raw, limits)
    parameters = PARAMETERS.read(body.parameters, limits)
    if (parameters.seed or 0) > MAX_SEED:
        raise PARAMETERS.refusal("seed")
    streams = _streams(body, stream)
    is_sampled = _is_sampled(parameters)
    _check_together(parameters, is_sampled=is_sampled, streams=streams)
    stops = sum(map(len, parameters.stop or ()))
    if stops > limits.stop_characters.value:
        raise limits.stop_characters.error(f"{stops:,}")
    if (parameters.best_of or 1) > limits.sequences.value:
        raise limits.sequences.error(str(parameters.best_of), "best_of")
    prompt_details, top = bool(parameters.decoder_input_details), parameters.top_n_tokens or 0
    details = bool(parameters.details) or prompt_details
    return GenerateCall(
        inputs=body.inputs,
        params=_params(parameters, is_sampled=is_sampled, streams=streams, shows_tokens=details or streams),
        asks_length=parameters.max_new_tokens is not None,
        stream=streams,
        shows_prompt=shows_prompt if parameters.return_full_text is None else parameters.return_full_text,
        details=details,
        prompt_details=prompt_details,
        top_n_tokens=top,
        truncate=parameters.truncate,
        is_sampled=is_sampled,
    )


def _streams(body: GenerateBody, of_route: bool | None) -> bool:
    if of_route is None or not body.stream or of_route:
        return body.stream if of_route is None else of_route
    text = "stream is not supported: /generate answers in one piece; send the same to /generate_stream, or to /"
    raise InvalidRequestError(text, param="stream")


def _is_sampled(parameters: Parameters) -> bool:
    """As TGI decides it: also a setting that only sampling has, and that is not 1, samples."""
    shares = (parameters.temperature, parameters.top_p, parameters.typical_p)
    return bool(parameters.do_sample or parameters.top_k or any(one not in (None, 1.0) for one in shares))


def _check_together(parameters: Parameters, *, is_sampled: bool, streams: bool) -> None:
    if parameters.best_of is not None and parameters.best_of > 1:
        if parameters.seed is not None:
            raise InvalidRequestError("best_of excludes seed: its sequences differ by theirs", param="best_of")
        if not is_sampled:
            raise InvalidRequestError("best_of needs sampling: set do_sample", param="best_of")
        if streams:
            raise InvalidRequestError("best_of needs stream: false", param="best_of")
    if streams and parameters.decoder_input_details:
        raise InvalidRequestError("decoder_input_details needs stream: false", param="decoder_input_details")
    if parameters.top_n_tokens and not (streams or parameters.details or parameters.decoder_input_details):
        raise InvalidRequestError("top_n_tokens needs details: true", param="top_n_tokens")


def _params(parameters: Parameters, *, is_sampled: bool, streams: bool, shows_tokens: bool) -> SamplingParams:
    """The one constructor's input. The model's own defaults do not enter: TGI's are fixed."""
    best_of = parameters.best_of or 1
    seed = parameters.seed
    if is_sampled and seed is None:
        seed = secrets.randbelow(MAX_SEED)
    shape = None if parameters.grammar is None else _shape(parameters.grammar)
    values = {
        "n": best_of,
        "temperature": (parameters.temperature or 1.0) if is_sampled else 0.0,
        "top_k": parameters.top_k or 0,
        "top_p": parameters.top_p or 1.0,
        "typical_p": parameters.typical_p or 1.0,
        "seed": None if seed is None else (seed + 2**63) % 2**64 - 2**63,  # the same bits, with a sign
        "repetition_penalty": parameters.repetition_penalty or 1.0,
        "frequency_penalty": parameters.frequency_penalty or 0.0,
        "stop": parameters.stop,
        "include_stop_str_in_output": True,
        "max_tokens": parameters.max_new_tokens,
        "logprobs": (parameters.top_n_tokens or 0) if shows_tokens or best_of > 1 else None,
        "prompt_logprobs": 0 if parameters.decoder_input_details else None,
        "structured_outputs": shape,
        "output_kind": RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY,
    }
    try:
        return SamplingParams.from_mapping(values)
    except InvalidRequestError as error:
        raise renamed(error) from error


def renamed(error: InvalidRequestError) -> InvalidRequestError:
    """A refusal under TGI's name of the field."""
    given = error.param or ""
    param = _TGI_NAMES.get(given)
    if param is None:
        return error
    text = error.message
    for kind in ("json", "regex"):
        text = text.replace(f"{given}.{kind}", f"{param}.value")
    return InvalidRequestError(text.replace(given, param, 1), param=param)


def _shape(grammar: Grammar) -> StructuredOutputsParams:
    value: Any = grammar.value
    if grammar.type == "regex":
        if not isinstance(value, str) or not value:
            raise InvalidRequestError("grammar.value must be a regular expression: a string", param="grammar")
        kind = "regex"
    else:
        kind = "json"
        if grammar.type == "json_schema":
            unknown = [name for name in value if name not in ("name", "schema")] if isinstance(value, dict) else []
            if not isinstance(value, dict) or "schema" not in value or unknown:
                raise InvalidRequestError("grammar.value must hold schema, and maybe name", param="grammar")
            value = value["schema"]
    try:
        return StructuredOutputsParams.from_mapping({kind: value})
    except InvalidRequestError as error:
        raise renamed(error) from error
