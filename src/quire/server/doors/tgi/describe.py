"""TGI's API in OpenAPI 3.1."""

from typing import Any

from quire.server.doors.tgi.bodies import request_bodies
from quire.server.http.limits import Limits
from quire.server.http.openapi import CHOSEN, INTEGER, NUMBER, get, open_object, or_null, post, ref
from quire.server.http.schema import STRING, Schema, array

EVENTS = "Server-sent events: each holds a token as JSON, the last one the text too. An error is an event."


def describe(limits: Limits) -> tuple[dict[str, Any], dict[str, Schema]]:
    """The paths of this API, and the schemas they name."""
    paths = {
        "/generate": {"post": _post("Generate", "Continue a prompt.", ref("GenerateResponse"))},
        "/generate_stream": {"post": _post("GenerateStream", "Continue a prompt, token by token.", None)},
        "/": {"post": _post("GenerateEither", "Either, as stream says.", array(ref("GenerateResponse")), events=True)},
        "/chat_tokenize": {"post": _post("ChatTokenize", "A conversation as text and tokens.", ref("ChatTokens"))},
        "/info": {"get": get("info", "The model, and what the server is bound by.", _info(), 404)},
    }
    paths["/chat_tokenize"]["post"]["requestBody"]["content"] = _json(ref("ChatCompletionRequest"))
    paths["/tokenize"] = {"post": _tokenize()}
    for methods in paths.values():
        for operation in methods.values():
            operation["parameters"] = [CHOSEN]
    return paths, {**request_bodies(limits), **_answers()}


def _json(schema: Schema, media: str = "application/json") -> dict[str, Any]:
    return {media: {"schema": schema}}


def _post(name: str, summary: str, schema: Schema | None, *, events: bool = False) -> dict[str, Any]:
    """As `openapi.post`, with TGI's statuses and shape of errors."""
    found = post("Generate", summary)
    found["operationId"] = f"create{name}"
    content = {} if schema is None else _json(schema)
    if schema is None or events:
        event = {"type": "object", "properties": {"data": STRING}, "required": ["data"], "description": EVENTS}
        content |= _json(event, "text/event-stream")
    error = {"description": "`error` says why.", "content": _json(ref("TgiError"))}
    statuses = (401, 404, 405, 408, 413, 415, 422, 424, 429, 500)
    found["responses"] = {"200": {"description": "Done.", "content": content}, **{str(one): error for one in statuses}}
    return found


def _tokenize() -> dict[str, Any]:
    """One route in two forms: vLLM's, and TGI's."""
    found = post("Tokenize", "Tokens of a text or of a conversation; with `inputs` in TGI's form.")
    forms = (("TokenizeRequest", "TgiTokenizeRequest"), ("TokenizeResponse", "TgiTokens"), ("Error", "TgiError"))
    body, answer, error = ({"anyOf": [ref(one), ref(other)]} for one, other in forms)
    found["requestBody"]["content"] = _json(body)
    for status, response in found["responses"].items():
        response["content"] = _json(answer if status == "200" else error)
    found["responses"] |= {status: found["responses"]["400"] for status in ("422", "424")}
    return found


def _info() -> Schema:
    texts = {name: STRING for name in ("model_id", "model_pipeline_tag", "router", "version")}
    numbers = (
        "max_concurrent_requests max_best_of max_stop_sequences max_input_tokens max_total_tokens validation_workers "
        "max_client_batch_size"
    )
    nothing: dict[str, Schema] = {name: or_null(STRING) for name in ("model_sha", "sha", "docker_label")}
    return open_object({**texts, **{name: INTEGER for name in numbers.split()}, **nothing})


def _answers() -> dict[str, Schema]:
    token: dict[str, Schema] = {"id": INTEGER, "text": STRING, "logprob": or_null(NUMBER)}
    tokens = array(open_object({**token, "special": {"type": "boolean"}}))
    sequence: dict[str, Schema] = {
        "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
        "generated_tokens": INTEGER,
        "seed": or_null(INTEGER),
        "prefill": array(open_object(token)),
        "tokens": tokens,
        "top_tokens": array(tokens),
    }
    others = array(open_object({"generated_text": STRING, **sequence}, optional=("top_tokens",)))
    details = open_object({**sequence, "best_of_sequences": others}, optional=("top_tokens", "best_of_sequences"))
    placed = array(open_object({"id": INTEGER, "text": STRING, "start": INTEGER, "stop": INTEGER}))
    return {
        "GenerateResponse": open_object({"generated_text": STRING, "details": details}, optional=("details",)),
        "ChatTokens": open_object({"tokenize_response": placed, "templated_text": STRING}),
        "TgiTokens": placed,
        "TgiError": open_object({"error": STRING, "error_type": STRING}),
    }
