"""Ollama's API in OpenAPI 3.1: bodies from their declarations, answers as the routes write them."""

from typing import Any

from quire.server.doors.ollama.bodies import CHAT, COPY, DELETE, GENERATE, PULL, SHOW
from quire.server.http.limits import Limits
from quire.server.http.openapi import INTEGER, get, open_object, post, ref
from quire.server.http.schema import STRING, RequestSchema, Schema, array

ERROR = "OllamaError"
EVENTS = "Lines of JSON: each holds a part of the answer, the last has done: true."
NDJSON = "application/x-ndjson"


def describe(limits: Limits) -> tuple[dict[str, Any], dict[str, Schema]]:
    """The paths of this API that are honoured, and the schemas they name."""
    bodies: dict[str, RequestSchema[Any]] = {
        "OllamaChat": CHAT,
        "OllamaGenerate": GENERATE,
        "OllamaShow": SHOW,
        "OllamaPull": PULL,
        "OllamaDelete": DELETE,
        "OllamaCopy": COPY,
    }
    paths = {
        "/api/chat": {"post": _post("OllamaChat", "Go on with a conversation.", EVENTS)},
        "/api/generate": {"post": _post("OllamaGenerate", "Answer a prompt.", EVENTS)},
        "/api/show": {"post": _post("OllamaShow", "One model.")},
        "/api/pull": {"post": _post("OllamaPull", "Fetch a model to the server's machine.", "Lines of JSON.", 403)},
        "/api/delete": {"delete": _empty("OllamaDelete", "Remove a model that is not served, or a copied name.")},
        "/api/copy": {"post": _empty("OllamaCopy", "Give a served model a further name.")},
        "/api/tags": {"get": get("listOllamaModels", "What is served.", ref("OllamaModels"), error=ERROR)},
        "/api/ps": {"get": get("listOllamaRunning", "What is loaded.", ref("OllamaModels"), error=ERROR)},
        "/api/version": {"get": get("ollamaVersion", "Quire's.", open_object({"version": STRING}), error=ERROR)},
    }
    schemas: dict[str, Schema] = {}
    for name, body in bodies.items():
        schemas[f"{name}Request"], below = body.json_schema(limits)
        schemas |= below
    return paths, {**schemas, **_answers()}


def _post(name: str, summary: str, events: str = "", *more: int) -> dict[str, Any]:
    return post(name, summary, *more, events=events, media=NDJSON, error=ERROR)


def _empty(name: str, summary: str) -> dict[str, Any]:
    found = _post(name, summary, "", 403)
    found["responses"]["200"] = {"description": "Done."}
    return found


def _answers() -> dict[str, Schema]:
    head: dict[str, Schema] = {"model": STRING, "created_at": STRING}
    spans = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
    counts = ("prompt_eval_count", "eval_count")
    end: dict[str, Schema] = {
        "done": {"const": True},
        "done_reason": {"enum": ["stop", "length", "load"]},
        "context": array(INTEGER),
        "thinking": STRING,
        **{name: INTEGER for name in (*spans, *counts)},
    }
    optional = ("context", "thinking", *spans, *counts)
    message = open_object(
        {
            "role": {"const": "assistant"},
            "content": STRING,
            "thinking": STRING,
            "tool_calls": array({"type": "object"}),
        },
        optional=("thinking", "tool_calls"),
    )
    card = {name: STRING for name in ("name", "model", "modified_at", "digest")}
    return {
        "OllamaChatResponse": open_object({**head, "message": message, **end}, optional=optional),
        "OllamaGenerateResponse": open_object({**head, "response": STRING, **end}, optional=optional),
        "OllamaShowResponse": open_object({"template": STRING, "capabilities": array(STRING)}),
        "OllamaPullResponse": open_object({"status": STRING}),
        "OllamaModels": open_object({"models": array(open_object({**card, "size": INTEGER}))}),
        ERROR: open_object({"error": STRING}),
    }
