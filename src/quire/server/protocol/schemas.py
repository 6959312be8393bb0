"""JSON schemas of request bodies, made from what the parsers go by: the doors, the ranges and the limits."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from quire import sampling_params as sampling
from quire.engine.inputs import MAX_PRIORITY, MAX_SALT_BYTES
from quire.sampling_params import Range, SamplingParams
from quire.server.limits import MAX_TIMEOUT_SECONDS, Limits
from quire.server.protocol.chat import ROLES
from quire.server.protocol.fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, TOKENIZE_CHAT, RequestSchema
from quire.server.protocol.sampling import REQUEST_ID, STREAM_INTERVAL

Schema = dict[str, Any]
TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
BOOLEAN: Schema = {"type": "boolean"}
STRING: Schema = {"type": "string"}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": sampling.MAX_STOP_STRING_BYTES}


def array(items: Schema, most: int | None = None, least: int = 0) -> Schema:
    """A list."""
    bounds = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return {"type": "array", "items": items, **bounds}


def record(properties: Mapping[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """An object without further fields."""
    found: Schema = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return {**found, "required": list(required)} if required else found


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def number(allowed: Range) -> Schema:
    """A number in a range."""
    low = "exclusiveMinimum" if allowed.is_above_low else "minimum"
    return {"type": "integer" if allowed.is_whole else "number", low: allowed.low, "maximum": allowed.high}


def _sampling_fields() -> dict[str, Schema]:
    """Every field of `SamplingParams` that a body may hold, with the default it has there."""
    found = {name: number(item) for name, item in sampling.RANGES.items() if name != "logprobs"}
    found |= {name: dict(BOOLEAN) for name in sampling.FLAGS}
    found["stop"] = {"anyOf": [_STOP, array(_STOP, sampling.MAX_STOP_STRINGS)]}
    found["bad_words"] = {"anyOf": [_STOP, array(_STOP, sampling.MAX_BAD_WORDS)]}
    found["stop_token_ids"] = array(TOKEN_ID, sampling.MAX_TOKEN_LIST)
    found["logprob_token_ids"] = array(TOKEN_ID, sampling.MAX_LOGPROB_TOKEN_IDS)
    sizes = {"type": "integer", "minimum": 0, "maximum": sampling.MAX_PATTERN}
    found["repetition_detection"] = record(
        {"max_pattern_size": sizes, "min_pattern_size": sizes, "min_count": {"type": "integer", "minimum": 0}}
    )
    found["allowed_token_ids"] = array(TOKEN_ID, sampling.MAX_TOKEN_LIST, least=1)
    found["logit_bias"] = {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": number(sampling.BIAS),
        "maxProperties": sampling.MAX_TOKEN_LIST,
    }
    for item in fields(SamplingParams):
        if item.name in found and item.default is not None:
            found[item.name]["default"] = item.default
    return found


def _shared_fields(limits: Limits) -> dict[str, Schema]:
    options: dict[str, Schema] = {name: or_null(BOOLEAN) for name in ("include_usage", "continuous_usage_stats")}
    options["include_obfuscation"] = {"enum": [False, None]}
    template = {
        "type": "object",
        "maxProperties": limits.template_arguments.value,
        "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9_]{0,63}$"},
    }
    return {
        **_sampling_fields(),
        "model": STRING,
        "stream": {**BOOLEAN, "default": False},
        "stream_options": record(options),
        "priority": {"type": "integer", "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY, "default": 0},
        "cache_salt": {**STRING, "maxLength": MAX_SALT_BYTES},
        "timeout": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_SECONDS},
        "truncate_prompt_tokens": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1, "not": {"const": 0}},
        "truncation_side": {"enum": ["left", "right"]},
        "stream_interval": {**number(STREAM_INTERVAL), "default": 1},
        "return_token_ids": {**BOOLEAN, "default": False},
        "return_tokens_as_token_ids": {**BOOLEAN, "default": False},
        "return_token_strs": {**BOOLEAN, "default": False},
        "echo": {**BOOLEAN, "default": False},
        "add_special_tokens": {**BOOLEAN, "default": True},
        "add_generation_prompt": {**BOOLEAN, "default": True},
        "continue_final_message": {**BOOLEAN, "default": False},
        "chat_template_kwargs": template,
        "chat_template": {**STRING, "maxLength": limits.chat_template_characters.value},
        "documents": array({"type": "object", "additionalProperties": STRING}, limits.documents.value),
        "request_id": {**STRING, "pattern": f"^{REQUEST_ID.pattern}$"},
        "return_prompt_text": {**BOOLEAN, "default": False},
        "messages": array(_message(limits), limits.messages.value, least=1),
        "tokens": array(TOKEN_ID, limits.detokenized_tokens.value),
    }


def _message(limits: Limits) -> Schema:
    part = record({"type": {"const": "text"}, "text": STRING}, ("type", "text"))
    parts = array({"anyOf": [STRING, part]}, limits.content_parts.value, least=1)
    properties: dict[str, Schema] = {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [STRING, parts]},
        "name": or_null(STRING),
    }
    return record(properties, ("role", "content"))


def _body(door: RequestSchema, limits: Limits, own: Mapping[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    known = {**_shared_fields(limits), **own}
    properties = {name: or_null(known[name]) for name in sorted(door.honoured)}
    properties |= {name: known[name] for name in required}
    label = {**STRING, "maxLength": limits.label_characters.value}
    properties |= {name: or_null(label) for name in sorted(door.labels)}
    properties |= {name: properties[canonical] for name, canonical in sorted(door.aliases.items())}
    for name, refused in sorted(door.refused.items()):
        properties[name] = {"enum": [*refused.neutral, None], "description": f"not supported: {refused.reason}"}
    return record(properties, required)


def request_bodies(limits: Limits) -> dict[str, Schema]:
    """The schema of each body, by its name in the document."""
    ids = array(TOKEN_ID, least=1)
    prompt = {
        "anyOf": [
            STRING,
            ids,
            array({"anyOf": [STRING, ids]}, limits.prompts.value, least=1),
        ]
    }
    top = number(sampling.RANGES["logprobs"])
    completion = {"prompt": prompt, "logprobs": top, "max_tokens": _with_zero()}
    chat: dict[str, Schema] = {"logprobs": {**BOOLEAN, "default": False}, "top_logprobs": top}
    chat["add_special_tokens"] = {**BOOLEAN, "default": False}
    chat["max_tokens"] = number(sampling.RANGES["max_tokens"])
    tokenize = [
        _body(TOKENIZE, limits, {"prompt": STRING}, ("prompt",)),
        _body(TOKENIZE_CHAT, limits, {"add_special_tokens": chat["add_special_tokens"]}, ("messages",)),
    ]
    return {
        "CompletionRequest": _body(COMPLETIONS, limits, completion, ("prompt",)),
        "ChatCompletionRequest": _body(CHAT, limits, chat, ("messages",)),
        "TokenizeRequest": {"anyOf": tokenize},
        "DetokenizeRequest": _body(DETOKENIZE, limits, {}, ("tokens",)),
    }


def _with_zero() -> Schema:
    """`max_tokens` of a completion: 0 scores the prompt, with `echo`."""
    return {**number(sampling.RANGES["max_tokens"]), "minimum": 0, "default": 16}
