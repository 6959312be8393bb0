"""OpenAI's text API in OpenAPI 3.1: bodies from their declarations, answers as the routes write them."""

from typing import Any

from quire.server.doors.openai.bodies import request_bodies
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from quire.server.http.openapi import INTEGER, NUMBER, get, open_object, or_null, post, ref
from quire.server.http.schema import STRING, Schema, array


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


IDS = array(INTEGER)
EVENTS = "Server-sent events: each holds a part of the answer as JSON, the last is [DONE]."


def describe(limits: Limits) -> tuple[dict[str, Any], dict[str, Schema]]:
    """The paths of this API, and the schemas they name."""
    paths = {
        "/v1/chat/completions": {"post": post("ChatCompletion", "Go on with a conversation.", events=EVENTS)},
        "/v1/completions": {"post": post("Completion", "Continue each prompt.", events=EVENTS)},
        "/tokenize": {"post": post("Tokenize", "Tokens of a text or of a conversation.")},
        "/detokenize": {"post": post("Detokenize", "The text of tokens.")},
        "/v1/models": {"get": get("listModels", "What is served.", ref("ModelList"))},
        "/v1/models/{name}": {"get": get("retrieveModel", "One model.", ref("Model"), 404, of="name")},
    }
    return paths, {**request_bodies(limits), **_answers()}


def _answers() -> dict[str, Schema]:
    details = open_object({"cached_tokens": INTEGER})
    counts = {name: INTEGER for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    usage = open_object({**counts, "prompt_tokens_details": details}, optional=("prompt_tokens_details",))
    head: dict[str, Schema] = {"id": STRING, "created": INTEGER, "model": STRING, "system_fingerprint": STRING}
    common = {
        "index": INTEGER,
        "finish_reason": {"enum": ["stop", "length", "repetition", "tool_calls"]},
        "stop_reason": {"type": ["string", "integer", "null"]},
        "token_ids": IDS,
        "prompt_token_ids": or_null(IDS),
        "prompt_logprobs": {"type": ["array", "null"]},
        "prompt_text": STRING,
        "store": {"const": False},
        "service_tier": {"const": "default"},
    }
    function = open_object({"name": STRING, "arguments": STRING})
    call = open_object({"id": STRING, "type": {"const": "function"}, "function": function})
    parts: dict[str, Schema] = {"reasoning": STRING, "reasoning_content": STRING, "tool_calls": array(call)}
    said: dict[str, Schema] = {"role": {"const": "assistant"}, "content": or_null(STRING), "refusal": {"type": "null"}}
    message = open_object({**said, **parts}, optional=(*parts,))
    chat = {**common, "message": message, "logprobs": or_null(ref("ChatLogprobs"))}
    text = {**common, "text": STRING, "logprobs": or_null(ref("CompletionLogprobs"))}
    extra = ("token_ids", "prompt_token_ids", "prompt_logprobs", "prompt_text", "store", "service_tier")

    def answer(kind: str, choice: dict[str, Schema]) -> Schema:
        choices = {"choices": array(open_object(choice, optional=extra))}
        body = {**head, "object": {"const": kind}, **choices, "usage": usage, "timings": ref("Timings")}
        return open_object({**body, **{name: common[name] for name in extra[1:]}}, optional=extra)

    card: dict[str, Schema] = {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING}
    parsers = {name: or_null(STRING) for name in ("tool_call_parser", "reasoning_parser")}
    states = {"status": STRING, "tasks": array(STRING), "capabilities": array(STRING)}
    error = {"message": STRING, "type": STRING, "param": {"type": ["string", "null"]}}
    return {
        "ChatCompletionResponse": answer("chat.completion", chat),
        "CompletionResponse": answer("text_completion", text),
        "ChatLogprobs": open_object({"content": array({"type": "object"}), "refusal": {"type": "null"}}),
        "CompletionLogprobs": open_object(
            {
                "tokens": array(STRING),
                "token_logprobs": array(or_null(NUMBER)),
                "top_logprobs": array({"type": ["object", "null"]}),
                "text_offset": IDS,
            }
        ),
        "Timings": {"type": "object", "additionalProperties": or_null(NUMBER)},
        "TokenizeResponse": open_object(
            {"count": INTEGER, "max_model_len": INTEGER, "tokens": IDS, "token_strs": or_null(array(STRING))}
        ),
        "DetokenizeResponse": open_object({"prompt": STRING}),
        "Model": open_object({**card, "max_model_len": or_null(INTEGER), **parsers, **states}),
        "ModelList": open_object({"object": {"const": "list"}, "data": array(ref("Model"))}),
        "Error": open_object({"error": open_object({**error, "code": {"type": ["string", "null"]}})}),
    }
