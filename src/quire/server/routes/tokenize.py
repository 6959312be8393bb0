"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.server.context import ServerContext, new_id
from quire.server.delivery import naming_param
from quire.server.protocol.tokenize import parse_detokenize, parse_tokenize
from quire.server.routes.chat import encode_conversation


async def tokenize(request: Request) -> Response:
    """Tokens of a text or of a conversation."""
    context: ServerContext = request.app.state.context
    call = await context.bodies.read(request, lambda body: parse_tokenize(body, context.limits))
    context.resolve_name(call.model)
    with context.gate.inside(new_id("tokenize")):
        if isinstance(call.source, str):
            token_ids = await context.engine.encode(call.source, add_special_tokens=call.add_special_tokens)
        else:
            with naming_param("prompt", "messages"):
                token_ids = await encode_conversation(context, call.source)
    text_of = context.engine.get_tokenizer().token_text
    content = {
        "count": len(token_ids),
        "max_model_len": context.engine.max_model_len,
        "tokens": token_ids,
        "token_strs": [text_of(item) for item in token_ids] if call.return_token_strs else None,
    }
    return _json(content)


async def detokenize(request: Request) -> Response:
    """The text of tokens, special ones included."""
    context: ServerContext = request.app.state.context
    vocab_size = context.engine.vocab_size
    call = await context.bodies.read(request, lambda body: parse_detokenize(body, context.limits, vocab_size))
    context.resolve_name(call.model)
    tokenizer = context.engine.get_tokenizer()
    with context.gate.inside(new_id("detokenize")):
        text = await asyncio.to_thread(tokenizer.decode, call.token_ids, skip_special_tokens=False)
    return _json({"prompt": text})


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


ROUTES = [
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
