"""The API's own description, in OpenAPI 3.1: bodies from the parsers' tables, answers as the routes write them."""

from typing import Any

import quire
from quire.server.limits import Limits
from quire.server.protocol.schemas import STRING, Schema, array, or_null, request_bodies

_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_IDS = array(_INTEGER)


EXPLAIN = "Where the time of a request went, for operators: one entry for each prompt of it."


def document(limits: Limits, *, needs_key: bool) -> dict[str, Any]:
    """The description of a server with these limits."""
    paths = {
        "/v1/chat/completions": {"post": _post("ChatCompletion", "Go on with a conversation.", streams=True)},
        "/v1/completions": {"post": _post("Completion", "Continue each prompt.", streams=True)},
        "/tokenize": {"post": _post("Tokenize", "Tokens of a text or of a conversation.")},
        "/detokenize": {"post": _post("Detokenize", "The text of tokens.")},
        "/v1/models": {"get": _get("listModels", "What is served.", _ref("ModelList"))},
        "/v1/models/{name}": {"get": _get("retrieveModel", "One model.", _ref("Model"), 404, of="name")},
        "/v1/requests/{request_id}/explain": {
            "get": _get("explain", EXPLAIN, _ref("Explanations"), 403, 404, of="request_id")
        },
        "/version": {"get": _get("version", "The version of Quire.", _open({"version": STRING}))},
        "/metrics": {"get": _get("metrics", "Prometheus metrics.", STRING, media="text/plain")},
        "/openapi.json": {"get": _get("openapi", "This document.", {"type": "object"})},
        **{
            path: {"get": _get(path[1:], "Probe.", _ref("Status"), probe=True)}
            for path in ("/livez", "/readyz", "/health")
        },
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Quire",
            "version": quire.__version__,
            "description": "The OpenAI text API. What is not honoured is refused by name.",
        },
        "paths": paths,
        "components": {"schemas": {**request_bodies(limits), **_answers()}},
    }
    if needs_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _open(properties: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    """An object of an answer: later versions may add fields."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _content(schema: Schema, media: str = "application/json") -> dict[str, Any]:
    return {media: {"schema": schema}}


_ERRORS = {
    400: "The request is refused; `param` names the field.",
    401: "A key is needed.",
    403: "The admin key is needed.",
    404: "No such model or route.",
    405: "The method is not allowed here.",
    408: "The body took too long, or the request's own timeout passed.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests; see Retry-After.",
    500: "This request failed.",
    503: "Overloaded or stopping; see Retry-After.",
}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": _ERRORS[status], "content": _content(_ref("Error"))} for status in statuses}


def _post(name: str, summary: str, *, streams: bool = False) -> dict[str, Any]:
    content = _content(_ref(f"{name}Response"))
    if streams:
        text = "Server-sent events: each holds a part of the answer as JSON, the last is [DONE]."
        event = {"type": "object", "properties": {"data": STRING}, "required": ["data"], "description": text}
        content |= _content(event, "text/event-stream")
    return {
        "operationId": f"create{name}",
        "summary": summary,
        "requestBody": {"required": True, "content": _content(_ref(f"{name}Request"))},
        "responses": {"200": {"description": "Done.", "content": content}, **_errors(*sorted(_ERRORS.keys() - {403}))},
    }


def _get(
    name: str,
    summary: str,
    schema: Schema,
    *more: int,
    media: str = "application/json",
    of: str | None = None,
    probe: bool = False,
) -> dict[str, Any]:
    found: dict[str, Any] = {"operationId": name, "summary": summary}
    responses = {"200": {"description": "Done.", "content": _content(schema, media)}}
    if of is not None:
        found["parameters"] = [{"name": of, "in": "path", "required": True, "schema": STRING}]
    if probe:
        found["security"] = []
        responses["503"] = {"description": "Not so.", "content": _content(schema)}
    else:
        responses |= _errors(401, *more)
    return {**found, "responses": {**responses, **_errors(405)}}


def _explanation() -> Schema:
    counts = ("num_prompt_tokens", "num_output_tokens", "num_preemptions", "num_restarts")
    seconds: Schema = {"type": "object", "additionalProperties": _NUMBER}
    return _open(
        {
            **{name: STRING for name in ("id", "caller", "sentence", "largest")},
            **{name: _INTEGER for name in counts},
            **{name: seconds for name in ("parts", "queued_because", "blamed")},
            "finished": {"type": "boolean"},
            "finish_reason": or_null(STRING),
            "total_s": _NUMBER,
            "time_to_first_token_s": or_null(_NUMBER),
        }
    )


def _answers() -> dict[str, Schema]:
    details = _open({"cached_tokens": _INTEGER})
    counts = {name: _INTEGER for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    usage = _open({**counts, "prompt_tokens_details": details}, optional=("prompt_tokens_details",))
    head: dict[str, Schema] = {"id": STRING, "created": _INTEGER, "model": STRING, "system_fingerprint": STRING}
    common = {
        "index": _INTEGER,
        "finish_reason": {"enum": ["stop", "length", "repetition"]},
        "stop_reason": {"type": ["string", "integer", "null"]},
        "token_ids": _IDS,
        "prompt_token_ids": or_null(_IDS),
        "prompt_logprobs": {"type": ["array", "null"]},
        "prompt_text": STRING,
    }
    message = _open({"role": {"const": "assistant"}, "content": STRING, "refusal": {"type": "null"}})
    chat = {**common, "message": message, "logprobs": or_null(_ref("ChatLogprobs"))}
    text = {**common, "text": STRING, "logprobs": or_null(_ref("CompletionLogprobs"))}
    extra = ("token_ids", "prompt_token_ids", "prompt_logprobs", "prompt_text")

    def answer(kind: str, choice: dict[str, Schema]) -> Schema:
        choices = {"choices": array(_open(choice, optional=extra))}
        body = {**head, "object": {"const": kind}, **choices, "usage": usage, "timings": _ref("Timings")}
        return _open({**body, **{name: common[name] for name in extra[1:]}}, optional=extra)

    card: dict[str, Schema] = {"id": STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": STRING}
    error = {"message": STRING, "type": STRING, "param": {"type": ["string", "null"]}}
    return {
        "ChatCompletionResponse": answer("chat.completion", chat),
        "CompletionResponse": answer("text_completion", text),
        "ChatLogprobs": _open({"content": array({"type": "object"}), "refusal": {"type": "null"}}),
        "CompletionLogprobs": _open(
            {
                "tokens": array(STRING),
                "token_logprobs": array(or_null(_NUMBER)),
                "top_logprobs": array({"type": ["object", "null"]}),
                "text_offset": _IDS,
            }
        ),
        "Timings": {"type": "object", "additionalProperties": or_null(_NUMBER)},
        "TokenizeResponse": _open(
            {"count": _INTEGER, "max_model_len": _INTEGER, "tokens": _IDS, "token_strs": or_null(array(STRING))}
        ),
        "DetokenizeResponse": _open({"prompt": STRING}),
        "Model": _open({**card, "max_model_len": _INTEGER}),
        "ModelList": _open({"object": {"const": "list"}, "data": array(_ref("Model"))}),
        "Explanations": _open({"object": {"const": "list"}, "data": array(_ref("Explanation"))}),
        "Explanation": _explanation(),
        "Status": _open({"status": STRING}),
        "Error": _open({"error": _open({**error, "code": {"type": ["string", "null"]}})}),
    }
