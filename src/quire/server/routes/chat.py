"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from quire.outputs import CompletionOutput, RequestOutput
from quire.server.body import read_object
from quire.server.context import ServerContext, new_id
from quire.server.delivery import deliver, naming_param
from quire.server.protocol import answers
from quire.server.protocol.chat import ChatCall, parse_chat
from quire.server.streams import Outputs, final_outputs, merged

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Go on with a conversation."""
    context: ServerContext = request.app.state.context
    body = await read_object(request)
    call = parse_chat(body, context.engine.get_default_sampling_params())
    answer = _Answer(context, call, context.cache_salt(request, call.delivery.cache_salt))
    with naming_param("prompt", "messages"):
        return await deliver(request, answer, stream=call.delivery.stream)


class _Answer:
    """One answer under way."""

    def __init__(self, context: ServerContext, call: ChatCall, cache_salt: str) -> None:
        self._context, self._call, self._cache_salt = context, call, cache_salt
        self.id = new_id("chatcmpl")
        self._head = {
            "id": self.id,
            "object": "chat.completion.chunk" if call.delivery.stream else "chat.completion",
            "created": int(time.time()),
            "model": context.resolve_name(call.delivery.model),
            "system_fingerprint": answers.FINGERPRINT,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        with self._context.gate.inside():
            (output,) = await final_outputs([await self._start()])
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice),
                "finish_reason": answers.check_finish(output, choice),
                "stop_reason": choice.stop_reason,
            }
            for choice in output.outputs
        ]
        num_tokens = sum(len(choice.token_ids) for choice in output.outputs)
        counted = self._usage(len(output.prompt_token_ids), num_tokens, output.num_cached_tokens)
        content: dict[str, Any] = {**self._head, "choices": choices, "usage": counted}
        if self._call.wants_prompt_logprobs:
            content["prompt_logprobs"] = answers.prompt_logprobs(output.prompt_logprobs)
        return content

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces: for each choice its role, what it says, why it ended; then usage."""
        include_usage = self._call.delivery.include_usage
        head = {**self._head, "usage": None} if include_usage else self._head
        begun: set[int] = set()
        num_prompt = num_tokens = cached = 0
        with self._context.gate.inside():
            async with aclosing(merged([await self._start()])) as outputs:
                async for _, output in outputs:
                    num_prompt = len(output.prompt_token_ids)
                    cached = max(cached, output.num_cached_tokens)
                    for choice in output.outputs:
                        num_tokens += len(choice.token_ids)
                        if choice.index not in begun:
                            begun.add(choice.index)
                            role = {"role": "assistant", "content": "", "refusal": None}
                            yield {**head, "choices": [_piece(choice.index, role)]}
                        for piece in self._pieces(output, choice):
                            yield {**head, "choices": [piece]}
        if include_usage:
            yield {**self._head, "choices": [], "usage": self._usage(num_prompt, num_tokens, cached)}

    def _pieces(self, output: RequestOutput, choice: CompletionOutput) -> list[dict[str, Any]]:
        finish_reason = answers.check_finish(output, choice)
        pieces = []
        if choice.text or (choice.logprobs and choice.token_ids):
            pieces.append(_piece(choice.index, {"content": choice.text}, self._logprobs(choice)))
        if finish_reason is not None:
            end = _piece(choice.index, {})
            pieces.append({**end, "finish_reason": finish_reason, "stop_reason": choice.stop_reason})
        return pieces

    async def _start(self) -> Outputs:
        engine, call = self._context.engine, self._call
        token_ids = await engine.encode_chat(
            call.messages,
            add_generation_prompt=call.add_generation_prompt,
            continue_final_message=call.continue_final_message,
            chat_template_kwargs=call.template_arguments,
        )
        return engine.generate(
            {"prompt_token_ids": token_ids},
            call.params,
            request_id=self.id,
            priority=call.delivery.priority,
            cache_salt=self._cache_salt,
        )

    def _logprobs(self, choice: CompletionOutput) -> dict[str, Any] | None:
        top = self._call.top_logprobs
        if top is None:
            return None
        return answers.chat_logprobs(choice, top, self._context.engine.get_tokenizer().token_bytes)

    def _usage(self, num_prompt: int, num_tokens: int, cached: int) -> dict[str, Any]:
        return answers.usage(num_prompt, num_tokens, cached if self._context.show_cached_tokens else None)


def _piece(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
