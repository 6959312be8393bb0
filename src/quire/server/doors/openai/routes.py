"""OpenAI's text API, and vLLM's /tokenize and /detokenize: the routes, the shape of errors, the framing of streams."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quire.server.answers.capabilities import capabilities_of
from quire.server.doors.openai import describe_stored, unsupported
from quire.server.doors.openai.batches import routes as batches
from quire.server.doors.openai.bodies import TokenizeChatBody, TokenizeTextBody
from quire.server.doors.openai.describe import describe, error_body
from quire.server.doors.openai.parse import (
    check_token_ids,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from quire.server.doors.openai.respond import Answer, C, ChatAnswer, CompletionAnswer, encode_conversation
from quire.server.doors.openai.responses import conversations
from quire.server.doors.openai.responses import routes as responses
from quire.server.doors.openai.responses.background import end_what_was_open
from quire.server.doors.openai.shapes import deprecation_note
from quire.server.http.context import Api, ServerContext, new_id
from quire.server.http.limits import Limits
from quire.server.http.schema import Schema
from quire.server.http.stored import when_usable
from quire.server.http.streams import Framing, WholeAnswer, deliver, naming_param


def frame(content: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + content + b"\n\n"


FRAMING = Framing("text/event-stream", frame, frame(b"[DONE]"), error_body)


async def create_chat_completion(request: Request) -> Response:
    """Go on with a conversation."""
    return await _create(request, parse_chat, ChatAnswer, naming_param("prompt", "messages"))


async def create_completion(request: Request) -> Response:
    """Continue each prompt."""
    return await _create(request, parse_completion, CompletionAnswer, naming_param("prompt_token_ids", "prompt"))


async def _create(
    request: Request, parse: Callable[..., C], answer: type[Answer[C]], naming: AbstractContextManager[None]
) -> Response:
    context: ServerContext = request.app.state.context
    call = await context.bodies.read(request, lambda body: parse(body, context.defaults_of(body), context.limits))
    context.log_deprecated(call.deprecated, deprecation_note)
    context = context.of_model(call.options.model, request.scope)
    requested = context.request_context(request, call.options.cache_salt, call.options.timeout)
    with naming:
        return await deliver(request, answer(context, call, requested), FRAMING if call.options.stream else None)


async def tokenize(request: Request) -> Response:
    """Tokens of a text or of a conversation."""
    context: ServerContext = request.app.state.context
    return await answer_tokenize(
        request, await context.bodies.read(request, lambda body: parse_tokenize(body, context.limits))
    )


async def answer_tokenize(request: Request, body: TokenizeTextBody | TokenizeChatBody) -> Response:
    """The answer to a body that was read."""
    whole: ServerContext = request.app.state.context
    context = whole.of_model(body.options.model, request.scope)
    engine, caller = context.engine, context.caller(request.scope)

    def written(token_ids: list[int]) -> bytes:
        text_of = engine.get_tokenizer().token_text
        texts = [text_of(item) for item in token_ids] if body.options.return_token_strs else None
        content = {"count": len(token_ids), "max_model_len": engine.max_model_len, "tokens": token_ids}
        return msgspec.json.encode({**content, "token_strs": texts})

    with context.gate.inside(new_id("tokenize")):
        if isinstance(body, TokenizeTextBody):
            token_ids = await engine.encode(body.prompt, add_special_tokens=body.add_special_tokens, caller=caller)
        else:
            with naming_param("prompt", "messages"):
                token_ids = await encode_conversation(context, body.conversation, caller)
        content = await engine.beside(partial(written, token_ids), len(token_ids), caller, first=True)
    return WholeAnswer(content, media_type="application/json")


async def detokenize(request: Request) -> Response:
    """The text of tokens, special ones included."""
    context: ServerContext = request.app.state.context
    body = await context.bodies.read(request, lambda body: parse_detokenize(body, context.limits))
    context = context.of_model(body.model, request.scope)
    check_token_ids(body, context.engine.vocab_size)
    engine, caller = context.engine, context.caller(request.scope)

    def written() -> bytes:
        return msgspec.json.encode({"prompt": engine.get_tokenizer().decode(body.tokens, skip_special_tokens=False)})

    with context.gate.inside(new_id("detokenize")):
        content = await engine.beside(written, len(body.tokens), caller)
    return WholeAnswer(content, media_type="application/json")


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    """What is known of a model, under one of its names. One that is not there yet has a name and a status."""
    model = (context.parts.get(name) or context).model
    assert model is not None, "a part has its model"
    engine = model.engine
    answers = None if engine is None else engine.answer_format
    return {
        "id": name,
        "object": "model",
        "created": context.started_s,
        "owned_by": "quire",
        "max_model_len": None if engine is None else engine.max_model_len,
        "tool_call_parser": None if answers is None else answers.name,
        "reasoning_parser": None if answers is None else answers.reasoning_name,
        "status": model.state,
        "tasks": ["generate"],
        "capabilities": [] if engine is None else capabilities_of(engine),
    }


async def list_models(request: Request) -> Response:
    """What is served, whether or not it is there yet."""
    context: ServerContext = request.app.state.context
    return JSONResponse({"object": "list", "data": [_card(context, name) for name in context.served_names]})


async def retrieve_model(request: Request) -> Response:
    """One model."""
    context: ServerContext = request.app.state.context
    name = context.resolve_name(request.path_params["name"])
    return JSONResponse(_card(context, name))


def _describe(limits: Limits) -> tuple[dict[str, Any], dict[str, Schema]]:
    """Everything under /v1, and the schemas that it names."""
    text_paths, schemas = describe(limits)
    return {**text_paths, **describe_stored.paths()}, {
        **schemas,
        **describe_stored.bodies(limits),
        **describe_stored.answers(),
    }


async def _begin(context: ServerContext) -> None:
    await when_usable(lambda: end_what_was_open(context))
    await when_usable(lambda: batches.begin_again(context))


OPENAI = Api(
    prefix="/",
    routes=(
        Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
        Route("/v1/completions", create_completion, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", retrieve_model),
        *responses.ROUTES,
        *conversations.ROUTES,
        *batches.ROUTES,
        *unsupported.ROUTES,
    ),
    queued_paths=frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"}),
    error_body=error_body,
    describe=_describe,
    begin=_begin,
    name="openai",
)
