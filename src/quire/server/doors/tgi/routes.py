"""TGI's API: the routes, the shape of errors and their statuses, the framing of streams.

/generate         one answer; /generate_stream a token an event; POST / either, as `stream` says, whole in a list
/tokenize         one route with vLLM's: a body with `inputs` is TGI's, which has the texts and places of tokens
/chat_tokenize    a conversation as the template writes it, and its tokens
/info             the model and what the server is bound by
                  of several models the query says which (`?model=NAME`): TGI's bodies name none; else the first
/health, /metrics are the server's own (`http/probes.py`): TGI's clients read the status of the one, and
                  --metrics-prefix tgi gives the other its names
"""

from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import quire
from quire.errors import QuireError
from quire.sampling_params import MAX_N, MAX_STOP_STRINGS
from quire.server.doors.openai.parse import parse_chat, parse_tokenize
from quire.server.doors.openai.respond import encode_conversation
from quire.server.doors.openai.routes import answer_tokenize
from quire.server.doors.tgi.bodies import TOKENIZE, TokenizeBody
from quire.server.doors.tgi.describe import describe
from quire.server.doors.tgi.metrics import tgi_metrics
from quire.server.doors.tgi.parse import parse_generate
from quire.server.doors.tgi.respond import GenerateAnswer
from quire.server.http.context import Api, ServerContext, new_id
from quire.server.http.errors import ERRORS_AS, ApiError, as_api_error
from quire.server.http.streams import Framing, WholeAnswer, deliver, naming_param

PREFIX = "/generate"
_KINDS = {422: "validation", 424: "generation", 429: "overloaded"}


def status_of(error: ApiError) -> int:
    """422 for what is wrong with a request, 424 where it failed, 429 where there is no room; others as they are."""
    if error.code == "engine_dead":
        return 500
    return {400: 422, 500: 424, 503: 429}.get(error.status, error.status)


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"error", "error_type"}`."""
    status = status_of(error)
    kind = "incomplete_generation" if error.code == "engine_dead" else _KINDS.get(status, error.code or "unknown")
    return {"error": error.message, "error_type": kind}


def frame(content: bytes) -> bytes:
    """One server-sent event."""
    return b"data:" + content + b"\n\n"


FRAMING = Framing("text/event-stream", frame, b"", error_body)


async def generate(request: Request) -> Response:
    """Continue a prompt."""
    return await _generate(request, stream=False)


async def generate_stream(request: Request) -> Response:
    """Continue a prompt, token by token."""
    return await _generate(request, stream=True)


async def generate_either(request: Request) -> Response:
    """Continue a prompt, as the body says."""
    return await _generate(request, stream=None)


def _chosen(request: Request) -> ServerContext:
    """What serves the model that the query names, or the first."""
    context: ServerContext = request.app.state.context
    return context.of_model(request.query_params.get("model"), request.scope)


async def _generate(request: Request, *, stream: bool | None) -> Response:
    streams, limits = stream is True, request.app.state.context.limits

    def parse(raw: dict[str, Any]) -> Any:
        nonlocal streams
        streams = streams or (stream is None and raw.get("stream") is True)
        return parse_generate(raw, limits, stream=stream, shows_prompt=stream is None)

    try:
        context = _chosen(request)
        call = await context.bodies.read(request, parse)
        requested = context.request_context(request, "", None)
        answer = GenerateAnswer(context, call, requested, in_list=stream is None)
        with naming_param("prompt_token_ids", "inputs"), naming_param("prompt", "inputs"):
            return await deliver(request, answer, FRAMING if call.stream else None)
    except (QuireError, ApiError) as error:
        refusal = as_api_error(error)
        if not streams or status_of(refusal) not in (422, 424, 500):
            raise
        # As in TGI: its clients look for errors of a stream in the events, whatever the status.
        content = frame(msgspec.json.encode(error_body(refusal)))
        return Response(content, 200, media_type=FRAMING.media_type)


async def tokenize(request: Request) -> Response:
    """Tokens of a text, with their places in it; or vLLM's form of the same, for a body without `inputs`."""
    context: ServerContext = request.app.state.context

    def parse(raw: dict[str, Any]) -> Any:
        if "inputs" not in raw:
            return parse_tokenize(raw, context.limits)
        request.scope[ERRORS_AS] = PREFIX
        return TOKENIZE.read(raw, context.limits)

    body = await context.bodies.read(request, parse)
    if not isinstance(body, TokenizeBody):
        return await answer_tokenize(request, body)
    context = _chosen(request)
    engine, caller = context.engine, context.caller(request.scope)
    with context.gate.inside(new_id("tokenize")), naming_param("prompt", "inputs"):
        token_ids = await engine.encode(body.inputs, caller=caller)
        work = partial(_placed, engine.get_tokenizer(), body.inputs, token_ids)
        content = await engine.beside(work, len(token_ids), caller, first=True)
    return WholeAnswer(msgspec.json.encode(content), media_type="application/json")


async def chat_tokenize(request: Request) -> Response:
    """A conversation as the template writes it, and its tokens; the body names a model, or the query does."""
    asked = request.query_params.get("model")
    context: ServerContext = request.app.state.context
    call = await context.bodies.read(
        request, lambda raw: parse_chat(raw, context.defaults_of({"model": asked, **raw}), context.limits)
    )
    context = context.of_model(asked if call.options.model is None else call.options.model, request.scope)
    engine, caller = context.engine, context.caller(request.scope)

    def written(token_ids: list[int]) -> dict[str, Any]:
        tokenizer = engine.get_tokenizer()
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
        return {"tokenize_response": _placed(tokenizer, text, token_ids), "templated_text": text}

    with context.gate.inside(new_id("tokenize")), naming_param("prompt", "messages"):
        token_ids = await encode_conversation(context, call.conversation, caller)
        content = await engine.beside(partial(written, token_ids), len(token_ids), caller, first=True)
    return WholeAnswer(msgspec.json.encode(content), media_type="application/json")


def _placed(tokenizer: Any, text: str, token_ids: list[int]) -> list[dict[str, Any]]:
    """Each token with its place in a text, in characters."""
    starts = [*tokenizer.prompt_offsets(text, token_ids), len(text)]
    return [
        {"id": token_id, "text": text[start:stop], "start": start, "stop": stop}
        for token_id, start, stop in zip(token_ids, starts, starts[1:], strict=False)
    ]


async def info(request: Request) -> Response:
    """The model, and what the server is bound by."""
    context = _chosen(request)
    limits, most = context.limits, context.engine.max_model_len
    return JSONResponse(
        {
            "model_id": context.served_names[0],
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": limits.requests.value,
            "max_best_of": min(limits.sequences.value, MAX_N),
            "max_stop_sequences": MAX_STOP_STRINGS,
            "max_input_tokens": min(most - 1, limits.prompt_tokens.value),
            "max_total_tokens": most,
            "validation_workers": 1,
            "max_client_batch_size": limits.prompts.value,
            "router": "quire",
            "version": quire.__version__,
            "sha": None,
            "docker_label": None,
        }
    )


TGI = Api(
    name="tgi",
    prefix=PREFIX,
    paths=frozenset({"/", "/info", "/chat_tokenize"}),
    routes=(
        Route("/generate", generate, methods=["POST"]),
        Route("/generate_stream", generate_stream, methods=["POST"]),
        Route("/", generate_either, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/chat_tokenize", chat_tokenize, methods=["POST"]),
        Route("/info", info),
    ),
    queued_paths=frozenset({"/generate", "/generate_stream", "/"}),
    error_body=error_body,
    status_of=status_of,
    describe=describe,
    metrics={"tgi": tgi_metrics},
    stand_ins=frozenset({"tgi", "dummy"}),
)
