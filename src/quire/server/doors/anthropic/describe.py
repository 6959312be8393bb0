"""Anthropic's Messages API in OpenAPI 3.1: bodies from their declarations, answers as the routes write them."""

from typing import Any

from quire.server.doors.anthropic.bodies import COUNT, MESSAGES
from quire.server.http.limits import Limits
from quire.server.http.openapi import INTEGER, open_object, or_null, post
from quire.server.http.schema import STRING, Schema, array

ERROR = "AnthropicError"
EVENTS = "Server-sent events, each named by its type: message_start first, message_stop last."


def describe(limits: Limits) -> tuple[dict[str, Any], dict[str, Schema]]:
    """The paths of this API, and the schemas they name. (/v1/models stands with OpenAI's.)"""
    counts = "The tokens of a conversation under the model's template."
    paths = {
        "/v1/messages": {"post": post("Message", "Go on with a conversation.", events=EVENTS, error=ERROR)},
        "/v1/messages/count_tokens": {"post": post("TokenCount", counts, error=ERROR)},
    }
    (message, below), (count, more) = MESSAGES.json_schema(limits), COUNT.json_schema(limits)
    return paths, {"MessageRequest": message, "TokenCountRequest": count, **more, **below, **_answers()}


def _answers() -> dict[str, Schema]:
    reasons = ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    usage = open_object(
        {
            "input_tokens": INTEGER,
            "cache_creation_input_tokens": or_null(INTEGER),
            "cache_read_input_tokens": or_null(INTEGER),
            "output_tokens": INTEGER,
            "service_tier": {"const": "standard"},
        }
    )
    block: dict[str, Schema] = {"type": {"enum": ["text", "thinking", "tool_use"]}}
    texts: dict[str, Schema] = {name: STRING for name in ("text", "thinking", "signature", "id", "name")}
    fields: dict[str, Schema] = {**texts, "input": {"type": "object"}, "citations": {"type": "null"}}
    error = open_object({"type": STRING, "message": STRING})
    return {
        "MessageResponse": open_object(
            {
                "id": STRING,
                "type": {"const": "message"},
                "role": {"const": "assistant"},
                "model": STRING,
                "content": array(open_object({**block, **fields}, optional=(*fields,))),
                "stop_reason": {"enum": reasons},
                "stop_sequence": or_null(STRING),
                "usage": usage,
            }
        ),
        "TokenCountResponse": open_object({"input_tokens": INTEGER}),
        ERROR: open_object({"type": {"const": "error"}, "error": error, "request_id": STRING}),
    }
