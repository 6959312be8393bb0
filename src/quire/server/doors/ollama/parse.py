"""From bodies to checked calls: what needs two fields, or a count that no type states."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.engine.tools import Asked, read_tools
from quire.errors import InvalidRequestError
from quire.sampling_params import FROM_MODEL, RequestOutputKind, SamplingParams
from quire.server.answers.single import Chat
from quire.server.doors.ollama.bodies import CHAT, GENERATE, OPTIONS_SCHEMA, Asking, OllamaMessage
from quire.server.http.limits import Limits
from quire.structured_params import StructuredOutputsParams

_NAMES = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
"""Option -> the sampling parameter that it is, where that has another name."""
_FITS = (-1, -2)
_OWNERS = {"tool_calls": "assistant", "thinking": "assistant", "tool_name": "tool", "tool_call_id": "tool"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One parsed request."""

    model: str
    stream: bool
    params: SamplingParams
    num_ctx: int | None
    wants_thinking: bool
    """Refused for a model that does not reason."""
    shows_thinking: bool
    chat: Chat | None
    """None: nothing is asked, or the prompt is raw."""
    raw: str | None = None
    context: tuple[int, ...] = ()
    """Tokens to go on from."""


@contextmanager
def in_own_names() -> Iterator[None]:
    """Let a refusal name the field of the body that it came from."""
    try:
        yield
    except InvalidRequestError as error:
        given = {theirs: f"options.{ours}" for ours, theirs in _NAMES.items()} | {"stop": "options.stop"}
        given |= {"prompt_token_ids": "context", "structured_outputs": "format"}
        name = given.get(error.param or "")
        if name is not None:
            error.message = re.sub(rf"^{error.param}(\.json)?\b", name, error.message)
            error.param, error.args = name, (error.message,)
        raise


def parse_chat(raw: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> Call:
    """Check everything that can be checked without the model.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    with in_own_names():
        body = CHAT.read(raw, limits)
        if body.tools and (size := len(msgspec.json.encode(body.tools))) > limits.tool_characters.value:
            raise limits.tool_characters.error(f"{size:,}")
        shown, tools = read_tools([{"function": msgspec.structs.asdict(tool.function)} for tool in body.tools])
        messages = [_as_template(message, f"messages[{at}]") for at, message in enumerate(body.messages)]
        params, num_ctx = _params(body.asking, defaults, limits)
        chat = Chat(
            messages=messages,
            tools=shown,
            asked=Asked(tools),
            params=params,
            template_arguments=_template_arguments(body.asking),
            continues=bool(messages) and messages[-1]["role"] == "assistant",
        )
        return _call(body.asking, params, num_ctx, chat if messages else None)


def parse_generate(raw: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> Call:
    """Check everything that can be checked without the model.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    with in_own_names():
        body = GENERATE.read(raw, limits)
        for name in ("system", "context"):
            if body.raw and getattr(body, name):
                raise InvalidRequestError(f"raw leaves {name} out: say all in prompt", param=name)
        params, num_ctx = _params(body.asking, defaults, limits)
        if not body.prompt or body.raw:
            return _call(body.asking, params, num_ctx, None, raw=body.prompt or None)
        messages = [{"role": "system", "content": body.system}] if body.system else []
        chat = Chat(
            messages=[*messages, {"role": "user", "content": body.prompt}],
            asked=Asked(),
            params=params,
            template_arguments=_template_arguments(body.asking),
        )
        return _call(body.asking, params, num_ctx, chat, context=tuple(body.context))


def _call(asking: Asking, params: SamplingParams, num_ctx: int | None, chat: Chat | None, **more: Any) -> Call:
    return Call(
        model=asking.model,
        stream=asking.stream,
        params=params,
        num_ctx=num_ctx,
        wants_thinking=bool(asking.think),
        shows_thinking=asking.think is not False,
        chat=chat,
        **more,
    )


def _params(asking: Asking, defaults: SamplingParams, limits: Limits) -> tuple[SamplingParams, int | None]:
    if asking.keep_alive is not None and not re.search("[1-9]", str(asking.keep_alive)):
        raise InvalidRequestError("keep_alive of 0 is not supported: the model stays", param="keep_alive")
    try:
        given = OPTIONS_SCHEMA.read(asking.options, limits).sampling
    except InvalidRequestError as error:
        raise InvalidRequestError(f"options: {error.message}", param=f"options.{error.param}") from error
    num_ctx, most = given.pop("num_ctx", None), given.pop("num_predict", None)
    _check_count("num_ctx", num_ctx)
    _check_count("num_predict", None if most in _FITS and type(most) is int else most, ", -1 or -2")
    stops = given.get("stop") or ()
    if isinstance(stops, str | list) and sum(map(len, filter(_is_text, stops))) > limits.stop_characters.value:
        raise limits.stop_characters.error(place="options.stop")
    values = {name: getattr(defaults, name) for name in FROM_MODEL}
    values |= {_NAMES.get(name, name): value for name, value in given.items()}
    if asking.format:
        values["structured_outputs"] = (
            StructuredOutputsParams(json_object=True)
            if asking.format == "json"
            else StructuredOutputsParams(json=asking.format)
        )
    kind = RequestOutputKind.DELTA if asking.stream else RequestOutputKind.FINAL_ONLY
    values |= {"max_tokens": None if most in _FITS else most, "output_kind": kind}
    try:
        return SamplingParams.from_mapping(values), num_ctx
    except InvalidRequestError as error:
        ours = {theirs: name for name, theirs in _NAMES.items()}.get(error.param or "", error.param)
        if ours not in given:
            raise
        text = error.message.removeprefix(error.param or "")
        raise InvalidRequestError(f"options.{ours}{text}", param=f"options.{ours}") from error


def _check_count(name: str, value: Any, more: str = "") -> None:
    if value is not None and (type(value) is not int or not 1 <= value < 2**31):
        text = f"options.{name} must be a whole number from 1 to {2**31 - 1}{more}"
        raise InvalidRequestError(text, param=f"options.{name}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _template_arguments(asking: Asking) -> dict[str, Any]:
    if asking.think is None:
        return {}
    level = {"reasoning_effort": asking.think} if isinstance(asking.think, str) else {}
    return {"enable_thinking": bool(asking.think), **level}


def _as_template(message: OllamaMessage, place: str) -> dict[str, Any]:
    for name, role in _OWNERS.items():
        if getattr(message, name) and message.role != role:
            raise InvalidRequestError(f"{place}.{name} belongs to the role {role}", param=f"{place}.{name}")
    found: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    more = {"reasoning_content": message.thinking, "name": message.tool_name, "tool_call_id": message.tool_call_id}
    found |= {name: value for name, value in more.items() if value}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "type": "function",
                **({} if call.id is None else {"id": call.id}),
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return found
